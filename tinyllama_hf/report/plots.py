"""Pictures of a run, as PNG files."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")  # files only: works without a display

import matplotlib.pyplot as plt


_SIZE = (7.2, 4.2)
_MAX_POINTS = 4000  # more than there are columns of pixels
_COLOURS = {"model": "#1f77b4", "validation": "#d62728", "unigram": "#999999", "5-gram": "#2ca02c"}


def loss_curve(rows: Sequence[dict[str, Any]], milestones: Sequence[int], path: Path) -> None:
    """Training and validation loss over tokens, with the milestones marked.

    Args:
        rows (`Sequence[dict]`): of `metrics.jsonl`.
        milestones (`Sequence[int]`): tokens of each milestone.
        path (`Path`): PNG file to write.
    """
    figure, axes = plt.subplots(figsize=_SIZE)
    training = [row for row in rows if "loss" in row]
    validation = [row for row in rows if "validation_loss" in row]
    axes.plot([r["tokens"] / 1e6 for r in training], [r["loss"] for r in training], color=_COLOURS["model"],
              linewidth=1, alpha=0.6, label="training, each logged step")  # fmt: skip
    axes.plot([r["tokens"] / 1e6 for r in validation], [r["validation_loss"] for r in validation], "o-",
              color=_COLOURS["validation"], markersize=4, label="validation, unseen text")  # fmt: skip
    for tokens in milestones:
        axes.axvline(tokens / 1e6, color="#cccccc", linewidth=0.8, zorder=0)
    axes.set(xlabel="million tokens (grey lines: milestones)", ylabel="loss, nats per token", title="Loss")
    axes.legend(frameon=False)
    _save(figure, path)


def learning_rate_curve(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Learning rate and gradient norm over tokens."""
    training = [row for row in rows if "loss" in row]
    tokens = [row["tokens"] / 1e6 for row in training]
    figure, (above, below) = plt.subplots(2, 1, figsize=_SIZE, sharex=True)
    above.plot(tokens, [row["learning_rate"] for row in training], color=_COLOURS["model"])
    above.set(ylabel="learning rate", title="Learning rate and gradient norm")
    below.plot(tokens, [row["gradient_norm"] for row in training], color=_COLOURS["validation"], linewidth=1)
    below.set(xlabel="million tokens", ylabel="gradient norm")
    _save(figure, path)


def training_panels(rows: Sequence[dict[str, Any]], milestones: Sequence[int], title: str, path: Path) -> None:
    """A run at a glance: loss, learning rate, gradient norm and throughput over tokens, in one picture.

    Args:
        rows (`Sequence[dict]`): of `metrics.jsonl`; of long runs every n-th training row is drawn.
        milestones (`Sequence[int]`): tokens of each milestone so far.
        title (`str`): above the picture.
        path (`Path`): PNG file to write, under a temporary name first.
    """
    training = [row for row in rows if "loss" in row]
    training = training[:: max(len(training) // _MAX_POINTS, 1)]
    validation = [row for row in rows if "validation_loss" in row]
    unit, name = (1e9, "billion") if training and training[-1]["tokens"] >= 1e9 else (1e6, "million")
    figure, grid = plt.subplots(2, 2, figsize=(11, 6.4), sharex=True)
    loss, rate, norm, speed = grid.flat
    tokens = [row["tokens"] / unit for row in training]
    loss.plot(
        tokens, [row["loss"] for row in training], color=_COLOURS["model"], linewidth=1, alpha=0.6, label="training"
    )
    loss.plot([row["tokens"] / unit for row in validation], [row["validation_loss"] for row in validation], "o-",
              color=_COLOURS["validation"], markersize=3, linewidth=1, label="validation")  # fmt: skip
    for count in milestones:
        loss.axvline(count / unit, color="#cccccc", linewidth=0.8, zorder=0)
    loss.set(ylabel="loss, nats per token", title="Loss (grey lines: milestones)")
    loss.legend(frameon=False)
    rate.plot(tokens, [row["learning_rate"] for row in training], color=_COLOURS["model"])
    rate.set(title="Learning rate", ylim=(0, None))
    norm.plot(tokens, [row["gradient_norm"] for row in training], color=_COLOURS["validation"], linewidth=1)
    norm.set(title="Gradient norm before clipping", yscale="log", xlabel=f"{name} tokens")
    speed.plot(tokens, [row["tokens_per_second"] for row in training], color=_COLOURS["5-gram"], linewidth=1)
    speed.set(title="Tokens per second", ylim=(0, None), xlabel=f"{name} tokens")
    figure.suptitle(title)
    temporary = path.with_name(f".{path.name}.tmp.png")
    _save(figure, temporary)
    os.replace(temporary, path)


def trajectory(scores: dict[str, Any], path: Path) -> None:
    """Bits per byte of each milestone over tokens, beside the counting models that read the same text."""
    figure, axes = plt.subplots(figsize=_SIZE)
    series = {name: [row for row in scores["baselines"] if row["name"] == name] for name in ("unigram", "5-gram")}
    for name, rows in series.items():
        if rows:
            axes.plot([r["tokens"] / 1e6 for r in rows], [r["bits_per_byte"] for r in rows], "s--",
                      color=_COLOURS[name], markersize=4, label=f"{name}, same text")  # fmt: skip
    models = scores["models"]
    axes.plot([r["tokens"] / 1e6 for r in models], [r["bits_per_byte"] for r in models], "o-",
              color=_COLOURS["model"], label="model")  # fmt: skip
    for row in models:
        axes.annotate(f"{row['bits_per_byte']:.2f}", (row["tokens"] / 1e6, row["bits_per_byte"]),
                      textcoords="offset points", xytext=(0, -13), ha="center", fontsize=8)  # fmt: skip
    axes.margins(y=0.12)  # room for the figures below the points
    axes.set(xlabel="million tokens", ylabel="bits per byte, unseen text", title="What each milestone has learned")
    axes.legend(frameon=False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#eeeeee")
        axes.set_axisbelow(True)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
