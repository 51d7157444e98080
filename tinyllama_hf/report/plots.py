"""Plots of a run or of several runs, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")  # files only: works without a display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ..evaluation.score_files import TextScoreFile
from ..evaluation.series_forecast import AVERAGE, FittedSeries, ScorePoint
from ..files import new_file
from ..released import Released
from .run_names import MAX_RUNS
from .training import TrainingCurves


_SIZE = (7.2, 4.2)
_MAX_MARKERS = 100  # more would hide the line
_COLORS = {"model": "#1f77b4", "validation": "#d62728", "unigram": "#999999", "5-gram": "#2ca02c"}
_PUBLISHED_COLORS = {"base": "#8c564b", "peer": "#e377c2"}
_RUN_COLORS = matplotlib.color_sequences["tab10"][:MAX_RUNS]
_LEGEND_WIDTH = 110  # characters


def loss_curve(curves: TrainingCurves, milestones: Sequence[int], path: Path) -> None:
    """Plots training and validation loss over tokens, with the milestones marked.

    Args:
        curves (`TrainingCurves`): curves of the run.
        milestones (`Sequence[int]`): tokens of each milestone.
        path (`Path`): PNG file to write.
    """
    figure, axes = plt.subplots(figsize=_SIZE)
    _loss(axes, curves, milestones)
    axes.set(xlabel="tokens")
    _save(figure, path)


def learning_rate_curve(curves: TrainingCurves, path: Path) -> None:
    """Plots learning rate and gradient norm over tokens."""
    figure, (above, below) = plt.subplots(2, 1, figsize=_SIZE, sharex=True)
    _learning_rate(above, curves)
    _gradient_norm(below, curves)
    below.set(xlabel="tokens")
    _save(figure, path)


def training_panels(curves: TrainingCurves, milestones: Sequence[int], title: str, path: Path) -> None:
    """Plots loss, learning rate, gradient norm and throughput over tokens, in one picture.

    Args:
        curves (`TrainingCurves`): curves of the run.
        milestones (`Sequence[int]`): tokens of each milestone so far.
        title (`str`): title of the picture.
        path (`Path`): PNG file to write.
    """
    figure, ((loss, rate), (norm, speed)) = plt.subplots(2, 2, figsize=(11, 6.4), sharex=True)
    _loss(loss, curves, milestones)
    _learning_rate(rate, curves)
    _gradient_norm(norm, curves)
    _line(speed, curves, "tokens_per_second", _COLORS["5-gram"])
    speed.set(title="Throughput, tokens per second", ylim=(0, None))
    speed.yaxis.set_major_formatter(FuncFormatter(_short))
    for axes in (norm, speed):
        axes.set(xlabel="tokens")
    figure.suptitle(title)
    _save(figure, path)


def compare_losses(runs: Mapping[str, TrainingCurves], path: Path) -> None:
    """Plots training and validation losses of several runs, over tokens and over hours.

    Args:
        runs (`Mapping[str, TrainingCurves]`): names of the runs, at most `MAX_RUNS`, and their curves.
        path (`Path`): PNG file to write.
    """
    figure, panels = plt.subplots(1, 2, figsize=(11, 5), sharey=True, layout="constrained")
    colors = dict(zip(runs, _RUN_COLORS, strict=False))
    for axes, over in zip(panels, ("tokens", "hours"), strict=True):
        for name, curves in runs.items():
            _line(axes, curves, "loss", colors[name], name, over, alpha=0.45)
        for name, curves in runs.items():  # on top of all training losses
            _validation(axes, curves, colors[name], f"{name}, validation", over, linewidth=2)
        axes.set(xlabel=f"{over} of training")
    _logarithmic(panels[0])
    is_validated = any(curves.validation for curves in runs.values())
    kinds = "training (thin) and validation on held-out text (thick)" if is_validated else "training"
    figure.suptitle(f"Loss, nats per token: {kinds}")
    names = [Line2D([], [], color=color, linewidth=3, label=name) for name, color in colors.items()]
    num_columns = max(_LEGEND_WIDTH // (max(map(len, runs)) + 6), 1)
    figure.legend(handles=names, loc="outside lower center", ncols=num_columns, frameon=False)
    _save(figure, path)


def _loss(axes: Any, curves: TrainingCurves, milestones: Sequence[int]) -> None:
    for number, milestone in enumerate(milestones):
        axes.axvline(milestone, color="#cccccc", linewidth=0.8, zorder=0, label="_" * (number > 0) + "milestone")
    _line(axes, curves, "loss", _COLORS["model"], label="training")
    _validation(axes, curves, _COLORS["validation"], "validation, held-out text")
    axes.set(title="Loss, nats per token")
    _logarithmic(axes)
    axes.legend(frameon=False)


def _learning_rate(axes: Any, curves: TrainingCurves) -> None:
    _line(axes, curves, "learning_rate", _COLORS["model"])
    axes.set(title="Learning rate", ylim=(0, None))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _gradient_norm(axes: Any, curves: TrainingCurves) -> None:
    _line(axes, curves, "gradient_norm", _COLORS["validation"])
    axes.set(title="Gradient norm before clipping")
    _logarithmic(axes)


def _line(
    axes: Any,
    curves: TrainingCurves,
    name: str,
    color: Any,
    label: str | None = None,
    over: str = "tokens",
    alpha: float = 1,
) -> None:
    """Draws the mean of each interval as a line over tokens or hours, and its range as a band."""
    curve = curves.curve(name)
    place = getattr(curve, over)
    axes.fill_between(place, curve.low, curve.high, color=color, alpha=0.3 * alpha, linewidth=0.8)
    marker = "." * (len(place) == 1)
    axes.plot(place, curve.mean, color=color, linewidth=1, label=label, marker=marker, alpha=alpha)
    axes.xaxis.set_major_formatter(FuncFormatter(_short))


def _validation(
    axes: Any, curves: TrainingCurves, color: Any, label: str, over: str = "tokens", linewidth: float = 1
) -> None:
    """Draws the validation losses, with markers unless they would hide the line."""
    if curves.validation:
        style = "o-" if len(curves.validation) <= _MAX_MARKERS else "-"
        tokens, losses = zip(*curves.validation, strict=True)
        place = tokens if over == "tokens" else curves.validation_hours
        axes.plot(place, losses, style, color=color, markersize=2 + linewidth, linewidth=linewidth, label=label)


def _logarithmic(axes: Any) -> None:
    """Makes the y axis logarithmic, with plain numbers as ticks for narrow and wide ranges."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high / low < 30:
        axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    else:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1000 else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())  # its labels would mix powers of ten with plain numbers
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _short(value: float, position: int = 0) -> str:
    """Formats a count: `250k`, `1.5M`, `300B`, `3T`."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def trajectory(scores: TextScoreFile, path: Path) -> None:
    """Plots bits per byte of each milestone over tokens, with the n-gram models that were fitted on the same text."""
    figure, axes = plt.subplots(figsize=_SIZE)
    for name in ("unigram", "5-gram"):
        counted = [(row.tokens, row.bits_per_byte) for row in scores.baselines if row.name == name]
        if counted:
            label = f"{name}, same text"
            axes.plot(*zip(*counted, strict=True), "s--", color=_COLORS[name], markersize=4, label=label)
    points = [(row.tokens, row.bits_per_byte) for row in scores.models]
    axes.plot(*zip(*points, strict=True), "o-", color=_COLORS["model"], label="model")
    for point in points:
        axes.annotate(f"{point[1]:.2f}", point, textcoords="offset points", xytext=(0, -13), ha="center", fontsize=8)
    axes.margins(y=0.12)  # room for the labels below the points
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    axes.set(xlabel="tokens", ylabel="bits per byte, held-out text", title="Bits per byte of each milestone")
    axes.legend(frameon=False)
    _save(figure, path)


def scaling_curves(fitted: Sequence[FittedSeries], path: Path) -> None:
    """Plots fitted curves over tokens, one column per series, with their forecasts and, below, their residuals.

    Points that were not fitted are hollow. The forecast is dashed, with a band for its 95 % interval.

    Args:
        fitted (`Sequence[FittedSeries]`): series that have a curve.
        path (`Path`): PNG file to write.
    """
    size = (4.1 * len(fitted) + 2, 5.2)
    figure, panels = plt.subplots(2, len(fitted), figsize=size, squeeze=False, sharex="col", height_ratios=(3, 1))
    for (above, below), series in zip(panels.T, fitted, strict=True):
        _scaling_curve(above, series)
        if series.curve:
            below.axhline(0, color=_COLORS["validation"], linewidth=1)
            below.plot(series.curve.tokens, series.curve.residuals, "o", color=_COLORS["model"], markersize=3)
        below.set(xlabel="tokens", ylabel="residual, %")
        below.xaxis.set_major_formatter(FuncFormatter(_short))
    _save(figure, path)


def _scaling_curve(axes: Any, series: FittedSeries) -> None:
    curve, forecast = series.curve, series.forecast
    assert curve is not None and forecast is not None
    early = [point for point in series.points if point[0] < curve.tokens[0]]
    if early:
        axes.plot(*zip(*early, strict=True), "o", color=_COLORS["model"], mfc="none", markersize=4, label="not fitted")
    axes.plot(curve.tokens, curve.values, "o", color=_COLORS["model"], markersize=4, label="measured")
    known = np.geomspace(curve.tokens[0], curve.tokens[-1], 100)
    axes.plot(known, curve.at(known), color=_COLORS["validation"], linewidth=1.2, label="fitted curve")
    ahead = np.geomspace(curve.tokens[-1], forecast.tokens, 50)
    bounds = [curve.forecast(place) for place in ahead]
    low, high = [bound.low for bound in bounds], [bound.high for bound in bounds]
    axes.fill_between(ahead, low, high, color=_COLORS["validation"], alpha=0.15, linewidth=0)
    axes.plot(ahead, curve.at(ahead), "--", color=_COLORS["validation"], linewidth=1.2, label="forecast, 95 %")
    axes.set(title=f"{series.name}, {series.unit}")
    _logarithmic(axes)
    axes.legend(frameon=False, fontsize=8)


def task_scores(
    points: Mapping[str, Sequence[ScorePoint]], unit: str, published: Sequence[Released], path: Path
) -> None:
    """Plots scores over tokens with their 95 % intervals, one panel per task.

    Args:
        points (`Mapping[str, Sequence[ScorePoint]]`): the points of each task.
        unit (`str`): of the scores.
        published (`Sequence[Released]`): rows of the published table to draw too; then tokens are logarithmic.
        path (`Path`): PNG file to write.
    """
    num_columns = min(len(points), 4)
    num_rows = -(-len(points) // num_columns)
    size = (2.9 * num_columns + 0.6, 2.5 * num_rows + 0.5)
    figure, grid = plt.subplots(num_rows, num_columns, figsize=size, squeeze=False, layout="constrained")
    for axes, (task, scores) in zip(grid.flat, points.items(), strict=False):
        own = [(point.tokens, point.score) for point in scores]
        sides = [(p.score - p.low, p.high - p.score) if p.low is not None and p.high is not None else (0, 0)
                 for p in scores]  # fmt: skip
        style = {"fmt": "o-", "color": _COLORS["model"], "markersize": 4, "linewidth": 1, "elinewidth": 1}
        axes.errorbar(*zip(*own, strict=True), yerr=np.array(sides).T, capsize=2, label="this run", **style)
        _published(axes, task, published)
        axes.set(title=task)
        if published:
            axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(_short))
        axes.tick_params(labelsize=8)
    for axes in list(grid.flat)[len(points) :]:
        axes.set_axis_off()
    for axes in list(grid.flat)[: len(points)][-num_columns:]:
        axes.set_xlabel("tokens", fontsize=9)
    figure.supylabel(unit, fontsize=10)
    names = grid.flat[0].get_legend_handles_labels()
    if published:
        figure.legend(*names, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    _save(figure, path)


def _published(axes: Any, task: str, published: Sequence[Released]) -> None:
    """Draws the published scores of a task, or the published averages."""
    for kind, label in (("base", "TinyLlama, published"), ("peer", "{}, published")):
        rows = [row for row in published if row.kind == kind and (task == AVERAGE or task in row.scores)]
        if rows:
            places = [(row.tokens, row.average if task == AVERAGE else row.scores[task]) for row in rows]
            names = label.format(", ".join(row.name for row in rows))
            axes.plot(*zip(*places, strict=True), "s", color=_PUBLISHED_COLORS[kind], markersize=3.5, label=names)


def _save(figure: Any, path: Path) -> None:
    """Saves a figure under a temporary name and renames it, so that a partial picture is never visible."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#eeeeee")
        axes.set_axisbelow(True)
    if figure.get_layout_engine() is None:
        figure.tight_layout()
    try:
        with new_file(path) as file:
            figure.savefig(file, dpi=150, format="png")
    finally:
        plt.close(figure)
