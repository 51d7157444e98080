"""`recipes/slurm/pretrain.sbatch` with fake Slurm commands and a fake launcher: when it requeues the job."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tinyllama_hf.pretrain.run_folder import STOPPED_FILE


COMMANDS = {
    "scontrol": 'case $1 in show) echo node1;; requeue) echo "$2" > requeued;; esac',
    "srun": 'shift; exec "$@"',
    "accelerate": 'echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" > timeout; mkdir -p "$OUTPUT"; eval "$RUN"',
}


def submit(folder: Path, *arguments: str, run: str) -> subprocess.CompletedProcess:
    """Runs the batch script, with the shell command `run` as its launch."""
    bin_folder = folder / "venv" / "bin"
    bin_folder.mkdir(parents=True)
    for name, text in COMMANDS.items():
        (bin_folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (bin_folder / name).chmod(0o755)
    (bin_folder / "activate").write_text(f'PATH="{bin_folder}:{Path(sys.executable).parent}:$PATH"\n')
    variables = {
        "VENV": str(folder / "venv"),
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_JOB_ID": "7",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "OUTPUT": str(folder / "elsewhere" / "run"),
        "RUN": run,
        "PYTHONPATH": str(ROOT),
    }
    script = ROOT / "recipes" / "slurm" / "pretrain.sbatch"
    return subprocess.run(
        ["bash", str(script), *arguments], cwd=folder, env=os.environ | variables, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "status", "is_requeued"),
    [
        (f'touch "$OUTPUT/{STOPPED_FILE}"; exit 1', 1, True),
        ("exit 1", 1, False),  # an error, after an earlier job was stopped
        (f"touch other/run/{STOPPED_FILE}; exit 1", 1, False),  # another run of the same folder
        ("exit 0", 0, False),
    ],
)
def test_queued_again_if_this_run_was_asked_to_stop(recipe, tmp_path, run, status, is_requeued):
    output = tmp_path / "elsewhere" / "run"
    for folder in (output, tmp_path / "other" / "run" / "checkpoints" / "step-9"):
        folder.mkdir(parents=True)
    (output / STOPPED_FILE).write_text("of an earlier job")
    (tmp_path / "other" / "run" / "checkpoints" / "step-9" / "checkpoint.json").write_text("newer than the job")
    done = submit(tmp_path, str(recipe), f"output_dir={output}", run=run)
    assert done.returncode == status, done.stderr
    assert (tmp_path / "requeued").exists() == is_requeued, done.stderr
    assert (tmp_path / "timeout").read_text() == "280\n"


def test_torchs_launcher_knows_the_variable():
    from torch.distributed.launcher.api import LaunchConfig

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "280")
        assert LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1).shutdown_timeout == 280


def test_overwriting_is_refused(recipe, tmp_path):
    done = submit(tmp_path, str(recipe), "--overwrite", run="exit 0")
    assert done.returncode == 2 and "would remove its own run" in done.stderr and not (tmp_path / "timeout").exists()
