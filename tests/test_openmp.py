"""How threads wait is set before torch is imported, in the command and in the scripts that train."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tinyllama_hf_cli.openmp import CHOICES, WAITING, let_threads_sleep


@pytest.fixture
def unset(monkeypatch):
    for name in CHOICES:
        monkeypatch.delenv(name, raising=False)


def test_what_the_user_sets_stays(monkeypatch, unset):
    for name in CHOICES:
        with monkeypatch.context() as patch:
            patch.setenv(name, "7")
            let_threads_sleep()
            assert {name: os.environ[name] for name in CHOICES if name in os.environ} == {name: "7"}
    monkeypatch.setattr(os, "environ", dict(os.environ))
    let_threads_sleep()
    assert {name: os.environ[name] for name in CHOICES if name in os.environ} == WAITING


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        (None, ["memory", "1.1b"]),
        (ROOT / "recipes" / "pretrain.py", ["recipes/pretrain/micro.yaml"]),
        (ROOT / "recipes" / "sft.py", ["recipes/sft/full.yaml"]),
        (ROOT / "eval" / "bits_per_byte.py", ["{run}"]),
    ],
    ids=["command", "pretrain", "sft", "eval"],
)
def test_it_is_set_before_torch_is_imported(script, arguments, unset, tmp_path):
    (tmp_path / "milestones").mkdir()
    arguments = [word.replace("{run}", str(tmp_path)) for word in arguments]
    start = (
        "from tinyllama_hf_cli import main; main()"
        if script is None
        else f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    watch = f"""
import os, sys
class Watch:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            print("torch with", {{n: os.environ[n] for n in {CHOICES!r} if n in os.environ}}, flush=True)
            os._exit(0)
sys.meta_path.insert(0, Watch)
sys.argv = ["x", *{arguments!r}]
{start}
"""
    done = subprocess.run([sys.executable, "-c", watch], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1:] == [f"torch with {WAITING}"], done.stderr
