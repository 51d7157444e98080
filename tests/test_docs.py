"""The pages in docs/ by their word: every command is run, in its order, and prints what stands below it."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, run_here
from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load_tokenizer


def commands(page: Path) -> list[tuple[str, str]]:
    """Each command of a page's shell blocks with the words of the comment below it."""
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)).splitlines()
    found: list[tuple[str, str]] = []
    for line in lines:
        if line.startswith("# "):
            found[-1] = (found[-1][0], line.removeprefix("# "))
        elif line:
            found.append((line, ""))
    return found


def test_pages_are_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"docs/{page.name}" in readme for page in (ROOT / "docs").glob("*.md"))


def run(page: str, folder: Path, at_least: int) -> None:
    """Runs the commands of a page in a folder, then its Python, block after block in one process.

    Without `--sanity`, since a random model predicts nothing.
    """
    found = commands(ROOT / "docs" / page)
    assert len(found) >= at_least
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command, wanted in found:
        done = subprocess.run(
            command.replace(" --sanity", ""), shell=True, cwd=folder, env=os.environ | {"PATH": path},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        assert wanted in done.stdout, f"{command}\n{done.stdout}{done.stderr}"
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    code = "import torch\nfrom tinyllama_hf import load\n" + "\n".join(
        re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{code}\n{done.stdout}{done.stderr}"


@pytest.fixture
def my_model(tmp_path, tokenizer_folder) -> Path:
    """The folder that holds `my-model`, a small one with random weights."""
    torch.manual_seed(0)
    TinyLlamaForCausalLM(TinyLlamaConfig.preset("micro", vocab_size=512)).save_pretrained(tmp_path / "my-model")
    load_tokenizer(tokenizer_folder).save_pretrained(tmp_path / "my-model")
    return tmp_path


def test_comparing(tmp_path):
    """The first output on the page is that of its command."""
    page = ROOT / "docs" / "comparing.md"
    ((command, wanted),) = commands(page)
    shown = re.findall(r"```text\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)[0]
    printed = run_here(*shlex.split(command), cwd=tmp_path).stdout
    assert wanted in shown and shown in printed


@pytest.mark.slow
def test_evaluation(my_model):
    run("evaluation.md", my_model, at_least=1)
    assert len(list((my_model / "my-scores.items").iterdir())) == 1


@pytest.mark.slow
def test_converting(my_model, documents):
    (my_model / "my-text.txt").write_text("\n".join(documents), encoding="utf-8")
    run("converting.md", my_model, at_least=11)


@pytest.mark.slow
def test_memory(my_model):
    run("memory.md", my_model, at_least=4)


@pytest.mark.slow
def test_speculative(my_model):
    run("speculative.md", my_model, at_least=2)


@pytest.mark.slow
def test_quantization(my_model):
    run("quantization.md", my_model, at_least=6)
