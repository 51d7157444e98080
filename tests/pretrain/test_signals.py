"""Runs that are stopped by a signal, or killed."""

import contextlib
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT
from tests.pretrain.runs import assert_same_run, run, run_launched, signal_after, wait_for
from tinyllama_hf.pretrain.loop import Hooks
from tinyllama_hf.pretrain.signals import Stopped


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_saves_stops_and_goes_on(self, recipe, uninterrupted, number):
        hooks = Hooks(after_checkpoint=signal_after(1, number))
        with pytest.raises(
            Stopped, match=rf"{signal.Signals(number).name} after step 5 \(1,280 tokens\).*resumes from .*step-5"
        ):
            run(recipe, hooks=hooks)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "handlers are given back"
        assert signal.set_wakeup_fd(-1) == -1 and not any(t.name == "stop requests" for t in threading.enumerate())
        assert_same_run(run(recipe), uninterrupted)

    def test_exit_status(self, recipe, tmp_path):
        process = start(recipe, tmp_path, "training.total_tokens=2_560_000", "milestones.tokens=[]")
        wait_for(recipe.parent / "run" / "checkpoints" / "step-4")
        process.send_signal(signal.SIGTERM)
        printed = process.communicate(timeout=60)[0]
        assert process.returncode == 75, printed
        assert "The same command resumes from" in printed

    HANGS = {
        "in a step that never ends": "while True: time.sleep(1)",
        # No Python code runs in the main thread while it waits for another process that never comes.
        "in C code": "stuck.wait(['never'])",
    }

    @pytest.mark.slow
    @pytest.mark.parametrize("hangs", HANGS.values(), ids=HANGS)
    def test_a_second_signal_ends_it_at_once(self, recipe, hangs):
        """At any point; but signals within 3 s count as one request."""
        script = f"""
import threading, time
import torch.distributed as dist
from tinyllama_hf.pretrain.config import load_pretrain_config
from tinyllama_hf.pretrain.loop import Hooks
from tests.pretrain.runs import pretrain
stuck = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
def never_ends(run):
    print("hanging", flush=True)
    {hangs}
pretrain(load_pretrain_config({str(recipe)!r}), hooks=Hooks(after_checkpoint=never_ends))
"""
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, "-c", script], cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )
        assert any(line == "hanging\n" for line in process.stdout)
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.7)
        time.sleep(3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 128 + signal.SIGTERM
        said = "SIGTERM: finishing the step and writing a checkpoint. A second signal ends the run at once.\n"
        assert process.stdout.read().count(said) == 1

    @pytest.mark.slow
    def test_through_torchs_launcher(self, recipe, tmp_path):
        """SIGTERM to the launcher and to one of its processes, as Slurm sends it: both processes save, and resume."""
        settings = ["training.total_tokens=25_600", "milestones.tokens=[]", "training.micro_batch_size=2"]
        whole = run_launched(recipe, tmp_path, *settings, f"output_dir={tmp_path / 'whole'}")
        assert whole.wait(300) == 0
        process = run_launched(recipe, tmp_path, *settings)
        wait_for(recipe.parent / "run" / "checkpoints" / "step-4")
        for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children()]:
            member.send_signal(signal.SIGTERM)
        assert process.wait(60) != 0
        printed = (tmp_path / "log.txt").read_text()
        assert "stopped: SIGTERM after step" in printed and "The same command resumes from" in printed
        assert run_launched(recipe, tmp_path, *settings).wait(300) == 0
        assert_same_run(recipe.parent / "run", tmp_path / "whole")


def start(recipe: Path, folder: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "recipes" / "pretrain.py"), str(recipe), *overrides]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_kill_anywhere(recipe, tmp_path, processes):
    """SIGKILL three times, once during the write of a checkpoint: same weights and metrics as without."""
    settings = [
        "training.total_tokens=102_400",
        "milestones.tokens=[30_000, 70_000]",
        "checkpoints.every_tokens=5120",
        "validation.every_tokens=20_480",
        "model.overrides={hidden_size: 256, num_attention_heads: 4}",
        "training.micro_batch_size=2",
    ]

    def launch(output: Path) -> subprocess.Popen:
        return run_launched(recipe, tmp_path, *settings, f"output_dir={output}", processes=processes)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert launch(whole).wait(600) == 0, (tmp_path / "log.txt").read_text()[-3000:]
    random.seed(0)
    kills = during_a_write = 0
    while kills < 3:
        process = launch(killed)
        metrics = killed / "metrics.jsonl"
        wait_until_it_moves(metrics, process)
        if during_a_write == 0:
            during_a_write += wait_for_a_write(killed / "checkpoints", process)
        else:
            time.sleep(random.uniform(0, 2))
        assert process.poll() is None, f"over before it was killed: {(tmp_path / 'log.txt').read_text()[-3000:]}"
        kill_all(process)
        kills += 1
    assert during_a_write == 1
    assert launch(killed).wait(600) == 0
    assert f"{processes} process(es)" in (tmp_path / "log.txt").read_text()
    assert_same_run(killed, whole)


def kill_all(process: subprocess.Popen) -> None:
    """Sends SIGKILL to the launcher and its workers, which run in separate sessions."""
    family = psutil.Process(process.pid)
    for member in [family, *family.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def wait_until_it_moves(metrics: Path, process: subprocess.Popen) -> None:
    """Waits until the resumed run has written a row."""
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    while (metrics.stat().st_mtime_ns if metrics.exists() else 0) == before:
        assert process.poll() is None
        time.sleep(0.005)


def wait_for_a_write(folder: Path, process: subprocess.Popen) -> int:
    """Waits until a checkpoint is partly written, under its temporary name."""
    while process.poll() is None:
        if any(folder.glob(".step-*.tmp/*")):
            return 1
    return 0
