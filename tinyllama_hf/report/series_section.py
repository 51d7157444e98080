"""The part of a run's report on its milestones as a series: scores over tokens, fitted curves, forecasts."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..evaluation.protocol import TASKS
from ..evaluation.score_files import TaskScoreFile, TextScoreFile
from ..evaluation.score_metrics import metric_unit
from ..evaluation.series_forecast import (
    AVERAGE,
    FittedSeries,
    ScorePoint,
    bits_points,
    fit_series,
    mean_points,
    overlay_problem,
    published_series,
    task_points,
)
from ..released import Released
from .training import TrainingCurves


@dataclasses.dataclass(frozen=True)
class SeriesSection:
    """What the section shows.

    Attributes:
        fitted (`list[FittedSeries]`): the series to which a curve is fitted, also those where that failed.
        scores (`dict[str, list[ScorePoint]]`): task scores, by task.
        unit (`str`): `"percent"`, or `"score"` if the metric of a task has another unit.
        bits (`dict[str, list[ScorePoint]]`): bits per byte of the right answers, by task.
        published (`list[Released]`): rows of the published table to draw with the scores.
        overlay_problem (`str`, *optional*): why there are none, if there are scores.
        schedule (`str`): name of the schedule of the learning rate.
    """

    fitted: list[FittedSeries]
    scores: dict[str, list[ScorePoint]]
    unit: str
    bits: dict[str, list[ScorePoint]]
    published: list[Released]
    overlay_problem: str | None
    schedule: str

    @property
    def drawn(self) -> list[FittedSeries]:
        """The series that have a curve."""
        return [series for series in self.fitted if series.curve]


def series_section(
    config: dict[str, Any],
    curves: TrainingCurves,
    milestones: Sequence[int],
    text: TextScoreFile | None,
    tasks: TaskScoreFile | None,
) -> SeriesSection:
    """Fits curves to the validation losses and scores of a run.

    Args:
        config (`dict`): its recipe.
        curves (`TrainingCurves`): its metrics.
        milestones (`Sequence[int]`): tokens of its milestones.
        text (`TextScoreFile`, *optional*), tasks (`TaskScoreFile`, *optional*): its scores.
    """
    bits = bits_points(tasks) if tasks else {}
    series = {
        ("Validation loss", "nats per token"): curves.validation,
        ("Held-out text", "bits per byte"): [(r.tokens, r.bits_per_byte) for r in text.models if r.tokens]
        if text
        else [],
        ("Right answers, mean of the tasks", "bits per byte"): mean_points(bits),
    }
    warmup, planned = config["schedule"]["warmup_tokens"], config["training"]["total_tokens"]
    fitted = [fit_series(*name, points, milestones, warmup, planned) for name, points in series.items() if points]
    points = _ordered(task_points(tasks)) if tasks else {}
    problem = overlay_problem(tasks) if tasks else None
    published = published_series() if points and not problem else []
    metrics = {result.metric for row in tasks.models for result in row.results.values()} if tasks else set()
    unit = "percent" if all(metric_unit(metric) == "points" for metric in metrics) else "score"
    return SeriesSection(fitted, points, unit, bits, published, problem, config["schedule"]["name"])


def _ordered(points: dict[str, list[ScorePoint]]) -> dict[str, list[ScorePoint]]:
    """Puts the published tasks first, in their order, and the average last."""
    names = [*TASKS, *(name for name in points if name not in (*TASKS, AVERAGE)), AVERAGE]
    return {name: points[name] for name in names if name in points}


def draw_series(section: SeriesSection, output: Path) -> list[str]:
    """Draws the pictures of the section into a folder, and returns their names without `.png`."""
    from . import plots

    pictures = []
    if section.drawn:
        plots.scaling_curves(section.drawn, output / "scaling.png")
        pictures.append("scaling")
    if section.scores:
        unit = f"{section.unit}, with 95 % intervals"
        plots.task_scores(section.scores, unit, section.published, output / "tasks.png")
        pictures.append("tasks")
    if section.bits:
        unit = "bits per byte of the right answers, with 95 % intervals"
        plots.task_scores(section.bits, unit, [], output / "answers.png")
        pictures.append("answers")
    return pictures
