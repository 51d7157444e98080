"""Files and folders are on the disk before they get their names: a power cut leaves the old or the new ones."""

import signal

import pytest

from tests.power_cut import Disk
from tests.pretrain.runs import run, signal_after
from tinyllama_hf.pretrain.loop import Hooks
from tinyllama_hf.pretrain.signals import Stopped


def test_a_run_that_was_stopped_and_resumed(recipe, monkeypatch):
    settings = (
        "training.total_tokens=1024",
        "checkpoints.every_tokens=256",
        "milestones.tokens=[]",
        "milestones.keep_training_state=true",
        "schedule.warmup_tokens=0",
    )
    disk = Disk(recipe.parent / "run", monkeypatch)
    with pytest.raises(Stopped):
        run(recipe, *settings, hooks=Hooks(after_checkpoint=signal_after(2, signal.SIGTERM)))
    disk.check("training.yaml", "checkpoints/step-1", "checkpoints/step-2", "checkpoints/step-3", "stopped.json")
    disk.named.clear()
    run(recipe, *settings)
    last = "step-4-token-0.001M"
    disk.check("metrics.jsonl", f"milestones/{last}", f"training_state/{last}", "checkpoints/step-4")
