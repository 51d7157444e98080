"""The plots of a run: lines, data, labels, legends, and colors in the written file."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from tests.report.test_training import training_row, write
from tinyllama_hf.evaluation.score_files import BaselineRow, TextProtocol, TextRow, TextScoreFile
from tinyllama_hf.report import plots
from tinyllama_hf.report.training import TrainingCurves


STEPS, MILESTONES = 40, [1000, 2000, 4000]
QUANTITIES = {"loss": 4.0, "learning_rate": 1e-3, "gradient_norm": 0.5, "tokens_per_second": 2000.0}


def row(step: int) -> dict:
    """A row of metrics. Each quantity has a different curve."""
    values = {
        name: scale * (1 + np.sin(step + place)) for place, (name, scale) in enumerate(QUANTITIES.items(), start=2)
    }
    return training_row(step) | {
        name: float(value) + scale for (name, value), scale in zip(values.items(), QUANTITIES.values(), strict=True)
    }


@pytest.fixture
def curves(tmp_path) -> TrainingCurves:
    validation = [{"step": step, "tokens": step * 100, "validation_loss": 9 - step / 10} for step in (10, 20, 40)]
    write(tmp_path, [*(row(step) for step in range(1, STEPS + 1)), *validation])
    return TrainingCurves(tmp_path)


def expected(name: str) -> tuple[list[int], list[float]]:
    """Tokens and values of a quantity as logged."""
    rows = [row(step) for step in range(1, STEPS + 1)]
    return [r["tokens"] for r in rows], [r[name] for r in rows]


def series(axes, label: str | None = None) -> tuple[list[float], list[float]]:
    """The data of the line with this label, or of the only unlabeled line."""
    found = [
        line
        for line in axes.lines
        if line.get_label() == label or (label is None and line.get_label()[:6] == "_child")
    ]
    assert len(found) == 1, [line.get_label() for line in axes.lines]
    return list(found[0].get_xdata()), list(found[0].get_ydata())


def legend(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def assert_shows(axes, name: str, label: str | None = None) -> None:
    """Asserts that axes show the line of a quantity and its band."""
    tokens, values = series(axes, label)
    assert tokens == expected(name)[0] and values == pytest.approx(expected(name)[1])
    [band] = axes.collections
    corners = band.get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == pytest.approx((min(values), max(values)))


def assert_loss(axes) -> None:
    assert_shows(axes, "loss", "training")
    assert series(axes, "validation, held-out text") == ([1000, 2000, 4000], [8.0, 7.0, 5.0])
    marks = [line for line in axes.lines if line.get_xdata()[0] == line.get_xdata()[-1]]
    assert [line.get_xdata()[0] for line in marks] == MILESTONES
    assert legend(axes) == ["milestone", "training", "validation, held-out text"]
    assert axes.get_yscale() == "log" and "Loss" in axes.get_title()


def assert_colors(path: Path, *colors: str) -> None:
    """Asserts that a file has more than 150 pixels of each color. A line has more, an empty frame has none."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    for color in colors:
        wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - wanted).max(1) < 12).sum() > 150, color


def assert_draws(axes, run: Path, name: str, label: str | None = None) -> None:
    """Asserts that axes show the values that a run has logged."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    tokens, values = series(axes, label)
    assert tokens == [r["tokens"] for r in rows if name in r] and len(tokens) > 1
    assert values == pytest.approx([r[name] for r in rows if name in r])


def test_loss_curve(curves, drawn, tmp_path):
    plots.loss_curve(curves, MILESTONES, tmp_path / "loss.png")
    [[axes]] = [figure.axes for figure in drawn]
    assert_loss(axes)
    assert axes.get_xlabel() == "tokens"
    assert_colors(tmp_path / "loss.png", plots._COLORS["model"], plots._COLORS["validation"], "#cccccc")


def test_learning_rate_curve(curves, drawn, tmp_path):
    plots.learning_rate_curve(curves, tmp_path / "rate.png")
    [[above, below]] = [figure.axes for figure in drawn]
    assert_shows(above, "learning_rate")
    assert_shows(below, "gradient_norm")
    assert (
        "Learning rate" in above.get_title()
        and "Gradient norm" in below.get_title()
        and below.get_xlabel() == "tokens"
    )
    assert above.get_ylim()[0] == 0 and below.get_yscale() == "log"
    assert_colors(tmp_path / "rate.png", plots._COLORS["model"], plots._COLORS["validation"])


def test_training_panels(curves, drawn, tmp_path):
    plots.training_panels(curves, MILESTONES, "my run", tmp_path / "training.png")
    [figure] = drawn
    loss, rate, norm, speed = figure.axes
    assert_loss(loss)
    for axes, name, title in (
        (rate, "learning_rate", "Learning rate"),
        (norm, "gradient_norm", "Gradient norm"),
        (speed, "tokens_per_second", "Throughput"),
    ):
        assert_shows(axes, name)
        assert title in axes.get_title()
    assert figure.get_suptitle() == "my run" and norm.get_xlabel() == speed.get_xlabel() == "tokens"
    assert_colors(tmp_path / "training.png", *(plots._COLORS[name] for name in ("model", "validation", "5-gram")))


def test_compare_losses(drawn, tmp_path):
    """Each run in its own color over tokens and over hours; a run without validation has no line for it."""
    runs = {}
    for name, rate in (("slow", 100.0), ("fast", 200.0)):
        (tmp_path / name).mkdir()
        validation = [{"step": 2, "tokens": 200, "validation_loss": 6.0}] * (name == "slow")
        rows = [training_row(step, 9 - step - rate / 100) | {"tokens_per_second": rate} for step in (1, 2, 3)]
        write(tmp_path / name, [*rows[:2], *validation, rows[2]])
        runs[name] = TrainingCurves(tmp_path / name)
    plots.compare_losses(runs, tmp_path / "losses.png")
    [figure] = drawn
    tokens, hours = figure.axes
    expected = {"slow": ([1, 2, 3], [7, 6, 5]), "fast": ([0.5, 1, 1.5], [6, 5, 4])}
    for place, (name, (seconds, losses)) in enumerate(expected.items()):
        assert series(tokens, name) == ([100, 200, 300], losses)
        assert series(hours, name) == ([pytest.approx(s / 3600) for s in seconds], losses)
        colors = {line.get_color() for axes in figure.axes for line in axes.lines if line.get_label().startswith(name)}
        assert colors == {plots._RUN_COLORS[place]}
    assert series(tokens, "slow, validation") == ([200], [6.0])
    assert series(hours, "slow, validation") == ([pytest.approx(2 / 3600)], [6.0])
    assert len(tokens.lines) == len(hours.lines) == 3
    assert (tokens.get_xlabel(), hours.get_xlabel()) == ("tokens of training", "hours of training")
    assert tokens.get_yscale() == hours.get_yscale() == "log" and "validation" in figure.get_suptitle()
    [names] = figure.legends
    assert [text.get_text() for text in names.get_texts()] == ["slow", "fast"]
    figure.canvas.draw()
    below = names.get_window_extent().y1
    assert all(axes.get_tightbbox().y0 >= below for axes in figure.axes), "it covers nothing"
    assert_colors(tmp_path / "losses.png", *map(to_hex, plots._RUN_COLORS[:2]))


def test_ten_runs_with_long_names_fit(drawn, tmp_path):
    write(tmp_path, [training_row(1), training_row(2)])
    curves = TrainingCurves(tmp_path)
    plots.compare_losses({f"experiments/learning-rate-{i}/pretrain": curves for i in range(10)}, tmp_path / "x.png")
    [figure] = drawn
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and "validation" not in figure.get_suptitle()
    assert len({line.get_color() for line in figure.axes[0].lines}) == 10


def scored(tokens: int, bits: float) -> TextRow:
    protocol = TextProtocol(context=32, stride=16, bos=True, dtype="float32")
    figures = {"bits_per_byte": bits, "by_source": {}, "protocol": protocol, "seconds": 1.0}
    return TextRow(name="a", path="a", tokens=tokens, **figures)


def test_trajectory(drawn, tmp_path):
    """Shows every milestone with its value, and both n-gram models."""
    baselines = [
        BaselineRow(name=name, step=i, tokens=1000 * i, distinct_tokens=9, bits_per_byte=bits - i / 100, by_source={})
        for i in range(1, 5)
        for name, bits in (("unigram", 4.0), ("5-gram", 2.9))
    ]
    scores = TextScoreFile(data=[], models=[scored(1000 * i, 3 - i / 8) for i in range(1, 5)], baselines=baselines)
    plots.trajectory(scores, tmp_path / "trajectory.png")
    [[axes]] = [figure.axes for figure in drawn]
    tokens = [1000, 2000, 3000, 4000]
    assert series(axes, "model") == (tokens, [2.875, 2.75, 2.625, 2.5])
    assert series(axes, "unigram, same text") == (tokens, [3.99, 3.98, 3.97, 3.96])
    assert series(axes, "5-gram, same text") == (tokens, pytest.approx([2.89, 2.88, 2.87, 2.86]))
    assert legend(axes) == ["unigram, same text", "5-gram, same text", "model"]
    shown = {text.xy: text.get_text() for text in axes.texts}
    assert shown == {(1000, 2.875): "2.88", (2000, 2.75): "2.75", (3000, 2.625): "2.62", (4000, 2.5): "2.50"}
    assert axes.get_xlabel() == "tokens" and "bits per byte" in axes.get_ylabel()
    assert_colors(tmp_path / "trajectory.png", *(plots._COLORS[name] for name in ("model", "unigram", "5-gram")))


def test_trajectory_without_counting_models(drawn, tmp_path):
    plots.trajectory(TextScoreFile(data=[], models=[scored(5, 2.0)]), tmp_path / "trajectory.png")
    [[axes]] = [figure.axes for figure in drawn]
    assert series(axes, "model") == ([5], [2.0]) and legend(axes) == ["model"]


@pytest.mark.parametrize("validations", [100, 101])
def test_many_validations_have_no_markers(drawn, tmp_path, validations):
    """Markers would hide the line."""
    write(tmp_path, [training_row(1), *({"step": i, "tokens": i, "validation_loss": 2.0} for i in range(validations))])
    plots.loss_curve(TrainingCurves(tmp_path), [], tmp_path / "loss.png")
    [line] = [line for line in drawn[0].axes[0].lines if line.get_label().startswith("validation")]
    assert line.get_marker() == ("o" if validations == 100 else "None")
    [single] = [line for line in drawn[0].axes[0].lines if line.get_label() == "training"]
    assert single.get_marker() == ".", "of one row there is no line"


def test_a_thinned_curve_keeps_its_spike(drawn, tmp_path):
    """The band shows it, although the mean of the interval hides it."""
    losses = np.full(3000, 2.0)
    losses[1000] = 40.0
    write(tmp_path, [training_row(step, loss) for step, loss in enumerate(losses.tolist(), start=1)])
    plots.loss_curve(TrainingCurves(tmp_path), [], tmp_path / "loss.png")
    [[axes]] = [figure.axes for figure in drawn]
    assert max(series(axes, "training")[1]) < 15
    assert axes.collections[0].get_paths()[0].vertices[:, 1].max() == 40.0
