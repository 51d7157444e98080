"""Preparing on Slurm. A fake `sbatch` runs the scripts that datatrove submits, task by task."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, run_here
from tinyllama_hf.files import read_json


SBATCH = """#!{python}
import os, re, subprocess, sys
wrap = [a.removeprefix("--wrap=") for a in sys.argv if a.startswith("--wrap=")]
with open({log!r} + ".jobs", "a") as jobs:
    number = 17 + jobs.tell()
    jobs.write("j")
env = os.environ | {{"SLURM_JOB_ID": str(number), "SLURM_NODELIST": "localhost", "SLURM_NODEID": "0"}}
for argument in sys.argv[1:]:
    if argument.startswith("--export=ALL,"):
        name, value = argument.removeprefix("--export=ALL,").split("=")
        env[name] = value
with open({log!r}, "a") as log:
    print(*sys.argv[1:], file=log)
    if wrap:
        subprocess.run(["bash", "-c", wrap[0]], check=True, stdout=log, stderr=log)
    else:
        script = open(sys.argv[-1]).read()
        first, last = map(int, re.search(r"--array=(\\d+)-(\\d+)", script).groups())
        for task in range(first, last + 1) if "launch_pickled_pipeline" in script else ():
            env["SLURM_ARRAY_TASK_ID"] = str(task)
            subprocess.run(["bash", sys.argv[-1]], check=True, env=env, stdout=log, stderr=log)
print("Submitted batch job", number)
"""
SRUN = """#!/bin/bash
while [ "$1" != launch_pickled_pipeline ]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/sh
echo localhost  # show hostnames
"""


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """An environment with a fake `sbatch` and `srun`."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    sbatch = SBATCH.format(python=sys.executable, log=str(tmp_path / "log"))
    for name, text in (("sbatch", sbatch), ("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    scripts = Path(sys.executable).parent
    return os.environ | {"PATH": f"{folder}{os.pathsep}{scripts}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture
def data_recipe(corpus, tokenizer_folder, tmp_path) -> Path:
    lines = corpus.read_text().splitlines(keepends=True)
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jsonl").write_text("".join(lines[number::3]))
    values = yaml.safe_load((ROOT / "recipes" / "data" / "slimpajama.yaml").read_text())
    values |= {"sources": [str(folder)], "tokenizer": str(tokenizer_folder), "where": None, "validation_fraction": 0.1}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml"


def run(*command: object, env: dict[str, str], cwd: Path) -> str:
    done = subprocess.run([str(c) for c in command], env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_equals_the_local_executor(cluster, data_recipe, tmp_path):
    script = ROOT / "recipes" / "slurm" / "prepare.py"
    options = ("--partition", "cpu", "--time", "01:00:00", "--max-array-size", 2)
    assert "3 task(s) on partition cpu" in run(
        sys.executable, script, data_recipe, "output=there", *options, "--dry-run", env=cluster, cwd=tmp_path
    )
    assert not (tmp_path / "log").exists(), "a dry run submits nothing"
    run(sys.executable, script, data_recipe, "output=there", *options, env=cluster, cwd=tmp_path)
    submitted = (tmp_path / "log").read_text()
    # Two arrays. The second starts even if the first fails, so the last job waits for both; 19 merges statistics.
    assert "--export=ALL,RUN_OFFSET=1 --dependency=afterany:17" in submitted
    assert "--dependency=afterok:17:18 --kill-on-invalid-dep=yes" in submitted
    assert "--wrap=:; tinyllama-hf prepare" in submitted
    assert not (tmp_path / "there" / "work").exists(), "the last job finishes the data set"
    run("tinyllama-hf", "prepare", data_recipe, "output=here", "--workers", "1", env=cluster, cwd=tmp_path)
    here, there = tmp_path / "here", tmp_path / "there"
    shards = sorted(path.relative_to(here) for path in here.glob("*/*.tokens*"))
    assert len(shards) == 12
    assert [path for path in shards if (here / path).read_bytes() != (there / path).read_bytes()] == []
    records = [read_json(folder / "dataset.json") for folder in (here, there)]
    assert records[0]["fingerprint"] == records[1]["fingerprint"] and records[0]["rows"] == records[1]["rows"]
    assert "already finished" in run(
        sys.executable, script, data_recipe, "output=there", *options, env=cluster, cwd=tmp_path
    )


def test_bad_recipe(data_recipe, tmp_path):
    script = ROOT / "recipes" / "slurm" / "prepare.py"
    done = run_here(script, data_recipe, "separator=none", "--partition", "x", "--time", 1, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "separator" in done.stderr
    assert not (tmp_path / "data").exists()


def test_the_sbatch_script_is_shell_and_names_what_exists():
    path = ROOT / "recipes" / "slurm" / "pretrain.sbatch"
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    for name in ("recipes/pretrain.py", "recipes/accelerate/hybrid.yaml", "recipes/pretrain/tinyllama-1.1b.yaml"):
        assert name in text and (ROOT / name).is_file()
