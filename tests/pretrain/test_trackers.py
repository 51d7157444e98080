"""Trackers through accelerate: what is logged can be read back, also across a resume."""

import importlib.util
import signal
from pathlib import Path

import pytest

from tests.pretrain.test_resume import signal_after
from tinyllama_hf.errors import InputError
from tinyllama_hf.pretrain.config import load_config
from tinyllama_hf.pretrain.hooks import Hooks
from tinyllama_hf.pretrain.loop import pretrain
from tinyllama_hf.pretrain.metrics import read_metrics
from tinyllama_hf.pretrain.signals import Stopped
from tinyllama_hf.pretrain.trackers import row_values


def test_tensorboard_across_a_resume(recipe):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = load_config(recipe, ["logging.trackers=[tensorboard]"])
    with pytest.raises(Stopped):
        pretrain(config, hooks=Hooks(after_checkpoint=signal_after(1, signal.SIGTERM)))
    pretrain(config)
    run = Path(config.output_dir)
    events = EventAccumulator(str(run / "tinyllama_hf"))
    events.Reload()
    rows = {row["step"]: row["loss"] for row in read_metrics(run) if "loss" in row}
    logged = {event.step: event.value for event in events.Scalars("loss")}
    assert logged == pytest.approx(rows)
    assert {event.step for event in events.Scalars("validation_loss")} == {4, 6, 8, 12}


def test_a_missing_package_is_known_before_the_first_step(recipe):
    missing = [name for name in ("trackio", "wandb") if importlib.util.find_spec(name) is None]
    if not missing:
        pytest.skip("all trackers are installed here")
    with pytest.raises(InputError, match=rf"needs the package {missing[0]}: pip install 'tinyllama_hf\[trackers\]'"):
        pretrain(load_config(recipe, [f"logging.trackers=[{missing[0]}]"]))
    assert not (recipe.parent / "run").exists()


def test_rows_are_flat():
    row = {"step": 3, "loss": 1.5, "mfu": None, "blocks": [0, 8], "validation_loss_by_source": {"a": 2.0}}
    assert row_values(row) == {"loss": 1.5, "validation_loss_by_source.a": 2.0}
