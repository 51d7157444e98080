"""Helpers that run recipes, in this process or launched, and compare two runs."""

import json
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from tinyllama_hf.pretrain.config import PretrainConfig, load_pretrain_config
from tinyllama_hf.pretrain.loop import Hooks, prepare_run, train_run
from tinyllama_hf.pretrain.metrics import METRICS_FILE
from tinyllama_hf.pretrain.milestones import list_milestones


# Values that must be equal in two runs, unlike times and rates.
EXACT = (
    "step",
    "tokens",
    "loss",
    "learning_rate",
    "gradient_norm",
    "blocks",
    "block_ids",
    "validation_loss",
    "validation_loss_by_source",
    "skipped_steps",
)


def pretrain(config: PretrainConfig, overwrite: bool = False, measure_peak: bool = False, hooks: Hooks | None = None):
    prepared = prepare_run(config, overwrite)
    prepared.print(*prepared.summary)
    train_run(prepared, measure_peak, hooks)


def run(recipe: Path, *overrides: str, **options) -> Path:
    config = load_pretrain_config(recipe, overrides)
    pretrain(config, **options)
    return Path(config.output_dir)


SCRIPT = SimpleNamespace(**runpy.run_path(str(ROOT / "recipes" / "pretrain.py"), run_name="script"))


def run_script(*arguments: str | Path) -> int:
    """The exit status of `recipes/pretrain.py`, in this process."""
    before, sys.argv = sys.argv, ["pretrain.py", *map(str, arguments)]
    try:
        return SCRIPT.main()
    finally:
        sys.argv = before


def read_metrics(run: Path) -> list[dict]:
    """The rows of `metrics.jsonl`; an incomplete last line, left by a killed process, is ignored."""
    with (run / METRICS_FILE).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.endswith("\n")]


def exact_rows(output: Path) -> list[dict]:
    return [{name: row[name] for name in EXACT if name in row} for row in read_metrics(output)]


def assert_same_run(a: Path, b: Path) -> None:
    """Same milestones, same weights, same metrics."""
    assert exact_rows(a) == exact_rows(b)
    names = [folder.name for folder in list_milestones(a)]
    assert names == [folder.name for folder in list_milestones(b)]
    for name in names:
        weights = [load_file(x / "milestones" / name / "model.safetensors") for x in (a, b)]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0]), name


def run_launched(recipe: Path, folder: Path, *overrides: str, processes: int = 2) -> subprocess.Popen:
    """Starts a run on several processes, or on one without a launcher, with its output in log.txt."""
    launcher = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", str(processes)]
    command = [*(launcher if processes > 1 else [sys.executable]), str(ROOT / "recipes" / "pretrain.py"), str(recipe)]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with (folder / "log.txt").open("a") as log:
        return subprocess.Popen(
            [*command, *overrides], env=env, cwd=folder, stdout=log, stderr=log, start_new_session=True
        )


def wait_for(path: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.01)


def signal_after(step: int, number: int):
    """A hook that sends this process a signal at its `step`-th call."""
    state = {"calls": 0}

    def send(*_: Path) -> None:
        state["calls"] += 1
        if state["calls"] == step:
            os.kill(os.getpid(), number)

    return send
