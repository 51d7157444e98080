"""Curves are read from the metrics: every row once, with spikes, also while the run continues."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinyllama_hf.report import plots
from tinyllama_hf.report.training import QUANTITIES, TrainingCurves


def training_row(step: int, loss: float = 3.0) -> dict:
    """A row as the training loop logs it."""
    values = {"learning_rate": 1e-3, "gradient_norm": 0.5, "tokens_per_second": 2000.0}
    return {"step": step, "tokens": step * 100, "loss": loss, **values}


def write(run: Path, rows: list[dict], mode: str = "a") -> None:
    with (run / "metrics.jsonl").open(mode) as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def test_a_short_run_is_drawn_as_it_is(tmp_path):
    write(tmp_path, [training_row(1, 9.0), {"step": 1, "tokens": 100, "validation_loss": 8.5}, training_row(2, 7.0)])
    curves = TrainingCurves(tmp_path)
    loss = curves.curve("loss")
    assert loss.tokens.tolist() == [100, 200] and loss.mean.tolist() == loss.low.tolist() == [9.0, 7.0]
    assert curves.validation == [(100, 8.5)] and curves.first["loss"] == 9.0 and curves.last["loss"] == 7.0
    assert [curves.curve(name).mean[0] for name in QUANTITIES] == [9.0, 1e-3, 0.5, 2000.0]


def test_hours_are_those_of_the_steps(tmp_path):
    """Rows of 100 tokens at 2000 and 1000 tokens per second, the last one at 500; a validation between two rows."""
    rows = [training_row(1), training_row(2) | {"tokens_per_second": 1000.0}]
    write(tmp_path, [*rows, {"step": 3, "tokens": 260, "validation_loss": 8.5}])
    curves = TrainingCurves(tmp_path)
    assert curves.curve("loss").hours * 3600 == pytest.approx([0.05, 0.15])
    assert curves.validation_hours == pytest.approx([0.21 / 3600]), "until it at the rate of the last row"
    write(tmp_path, [training_row(4) | {"tokens_per_second": 500.0}])
    curves.refresh()
    assert curves.hours * 3600 == pytest.approx(0.55)
    assert curves.tokens_per_second == pytest.approx(400 / 0.55)


def test_hours_of_a_branch_are_its_own(tmp_path):
    write(tmp_path, [training_row(11), training_row(13)])
    assert TrainingCurves(tmp_path).hours * 3600 == pytest.approx(1300 / 2000), "from the first token"
    branch = TrainingCurves(tmp_path, branched_at=1000)
    assert branch.hours * 3600 == pytest.approx(300 / 2000) and branch.tokens_per_second == pytest.approx(2000)
    unknown = TrainingCurves(tmp_path, branched_at=None)
    assert unknown.hours * 3600 == pytest.approx(200 / 2000) and unknown.tokens_per_second == pytest.approx(2000)
    (tmp_path / "metrics.jsonl").unlink()
    write(tmp_path, [{"step": 0, "tokens": 0, "validation_loss": 8.5}, training_row(11)])
    assert TrainingCurves(tmp_path, branched_at=None).tokens_per_second is None
    assert TrainingCurves(tmp_path).validation_hours == [0]


@pytest.mark.parametrize("number", [1, 999, 1000, 1001, 12_345])
def test_a_long_run_is_thinned_without_losing_a_spike(tmp_path, number):
    losses = 2 + np.random.default_rng(0).random(number)
    losses[number // 3], losses[number // 2] = 40.0, 0.5
    rows = [training_row(step, loss) for step, loss in enumerate(losses.tolist(), start=1)]
    write(tmp_path, rows)
    loss = TrainingCurves(tmp_path).curve("loss")
    assert len(loss.tokens) <= 1001 and np.all(np.diff(loss.tokens) > 0)
    assert loss.high.max() == losses.max() and loss.low.min() == losses.min()
    assert np.all((loss.low <= loss.mean) & (loss.mean <= loss.high))
    assert abs(loss.mean.mean() - losses.mean()) < 0.05
    assert loss.hours * 3600 == pytest.approx(loss.tokens / 2000)


def test_only_what_was_added_is_read(tmp_path):
    rows = [training_row(step) for step in range(1, 50)]
    write(tmp_path, rows)
    curves = TrainingCurves(tmp_path)
    (tmp_path / "metrics.jsonl").open("r+").write("x" * 10)  # what was read already is not looked at again
    write(tmp_path, [training_row(50, 1.0)])
    curves.refresh()
    assert len(curves.curve("loss").tokens) == 50 and curves.last["step"] == 50


def test_a_row_that_is_being_written_is_read_when_it_is_whole(tmp_path):
    write(tmp_path, [training_row(1)])
    text = json.dumps(training_row(2)) + "\n"
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write(text[:20])
        stream.flush()
        curves = TrainingCurves(tmp_path)
        assert curves.last["step"] == 1
        stream.write(text[20:])
    curves.refresh()
    assert curves.last["step"] == 2 and len(curves.curve("loss").tokens) == 2


def test_rows_that_a_resume_cuts_are_forgotten(tmp_path):
    """The loop replaces the file. The new one may be longer than the part of the old one that was read."""
    write(tmp_path, [training_row(step, 9.0) for step in range(1, 11)])
    curves = TrainingCurves(tmp_path)
    (tmp_path / "cut").mkdir()
    write(tmp_path / "cut", [training_row(step, 9.0 if step < 6 else 1.0) for step in range(1, 30)])
    os.replace(tmp_path / "cut" / "metrics.jsonl", tmp_path / "metrics.jsonl")
    curves.refresh()
    loss = curves.curve("loss")
    assert len(loss.tokens) == 29 and loss.mean[5:].max() == 1.0


def test_pictures_of_a_run_with_one_row_and_without_validation(tmp_path):
    write(tmp_path, [training_row(1)])
    plots.training_panels(TrainingCurves(tmp_path), [], "run", tmp_path / "training.png")
    with Image.open(tmp_path / "training.png") as picture:
        assert picture.size == (1650, 960)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "training.png"]


def test_a_picture_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    write(tmp_path, [training_row(1)])
    curves, path = TrainingCurves(tmp_path), tmp_path / "training.png"
    plots.training_panels(curves, [], "run", path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        plots.training_panels(curves, [], "other", path)
    assert path.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "training.png"]


@pytest.mark.parametrize("high", [0.6, 2.0, 20.0, 300.0, 1e6])
def test_a_logarithmic_axis_has_plain_numbers(high):
    """A spike makes the axis span decades, for which matplotlib would label powers of ten."""
    figure, axes = plots.plt.subplots()
    axes.plot([0.4, high])
    plots._logarithmic(axes)
    figure.canvas.draw()
    low, top = axes.get_ylim()
    shown = [t.get_text() for t in axes.yaxis.get_ticklabels(which="both") if low <= t.get_position()[1] <= top]
    plots.plt.close(figure)
    assert 3 <= len(shown) <= 12 and all(float(text) > 0 for text in shown)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (250_000, "250k"), (1.5e6, "1.5M"), (3e11, "300B"), (3e12, "3T")]
)
def test_counts_as_one_says_them(count, text):
    assert plots._short(count) == text
