"""The README by its word: every command in it is run, in its order, and every Python block."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_here


README = (ROOT / "README.md").read_text(encoding="utf-8")
LAUNCH = "accelerate launch --quiet --config_file recipes/accelerate/cpu.yaml"
MICRO = f"{LAUNCH} recipes/pretrain.py recipes/pretrain/micro.yaml      "
MILESTONE = "my-run/milestones/step-98-token-0.2M"
# What each command must print, by its beginning; a command that is not listed must only succeed.
PRINTS = {
    "tinyllama-hf tokenizer train": "wrote my-tokenizer: 2,048 ids",
    "tinyllama-hf tokenizer verify": "equal: 1 texts",
    "tinyllama-hf prepare": "wrote my-data",
    "tinyllama-hf plan": "time        90.8 days",
    MICRO + "output_dir=my-run": "wrote my-run/milestones/step-98-token-0.2M",
    MICRO + "output_dir=my-long-run": "wrote my-long-run/milestones/step-49-token-0.1M",
    MICRO + "output_dir=my-cooldown": "wrote my-cooldown/milestones/step-74-token-0.2M",
    "accelerate launch --quiet my-recipes": "would write other-run/ (dry run: nothing was written)",
    "tinyllama-hf eval text my-run --baselines": "wrote my-run/scores.json",
    "tinyllama-hf eval tasks my-run": "wrote my-run/commonsense.json",
    "accelerate launch --quiet --config_file recipes/accelerate/cpu.yaml recipes/sft.py": "wrote my-chat",
    "tinyllama-hf eval replies my-chat": "wrote my-chat/replies.json",
    'echo "What': "",
    "tinyllama-hf report my-run": "wrote my-report/index.html",
    "tinyllama-hf report my-long-run": "wrote my-comparison/index.html",
    f'tinyllama-hf generate {MILESTONE} "Return a list of" --temperature 0.7': "Return a list of",
    f'tinyllama-hf generate {MILESTONE} "Return a list of" --temperature 0  ': "Return a list of",
    "echo '{": "",
    "tinyllama-hf generate my-run/milestones/step-98-token-0.2M --input": "my-texts.jsonl",
    "tinyllama-hf memory": "cache       4.61 GB",
    "tinyllama-hf convert": "wrote my-gguf: gguf-q8_0",
    "tinyllama-hf verify": "equal within 1",
    "tinyllama-hf publish": "dry run: nothing was uploaded",
    "tinyllama-hf list": "step-1431k-3T",
    "tinyllama-hf recipes list": "demo/demo.sh",
    "tinyllama-hf recipes copy": "wrote my-recipes",
}


def commands() -> list[str]:
    """The shell commands below "One command per task", in order."""
    part = README.split("## One command per task")[1].split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", part, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    documents = README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?:^|`)make ([a-z-]+)", documents, re.MULTILINE))
    assert {"demo", "test", "lint"} <= targets
    assert all(f"\n{target}:" in makefile for target in targets), targets


def test_every_command_has_its_expectation():
    assert len(commands()) == len(PRINTS)
    assert all(any(command.startswith(beginning) for command in commands()) for beginning in PRINTS)


@pytest.mark.slow
def test_every_command_and_every_python_block(tmp_path):
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", tmp_path)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in commands():
        if command.startswith("tinyllama-hf ") and not set(command).intersection("|<>&;$*"):
            done = run_here(*shlex.split(command, comments=True), cwd=tmp_path)
        else:
            done = subprocess.run(
                command, shell=True, cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True
            )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        wanted = next(text for beginning, text in PRINTS.items() if command.startswith(beginning))
        assert wanted in done.stdout, f"{command}\n{done.stdout}"
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        code = re.sub(r"runs/demo/pretrain/milestones/[\w.-]+", "my-run/milestones/step-98-token-0.2M", block)
        code = code.replace("runs/demo/tokenizer", "my-tokenizer")
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.strip(), f"{code}\n{done.stderr[-2000:]}"
