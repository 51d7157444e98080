"""Finds the models of a comparison: rows of task score files, and rows of the published table."""

import dataclasses
import difflib
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...errors import InputError, did_you_mean
from ...released import Released, released, tables
from ..score_files import MetricScore, Protocol, TaskRow, TaskScoreFile, read_scores
from ..score_metrics import metric_scale
from ..scored_items import read_scored_items
from .paired_tests import binomial_standard_error, is_binary


# The value of each item of a task, by the hash of its row and the number of earlier items with the same hash.
ItemValues = dict[tuple[str, int], float]


@dataclasses.dataclass(kw_only=True)
class ComparedModel:
    """A model of a comparison.

    Attributes:
        label (`str`): its name in the output, unique in a comparison.
        file (`Path`, *optional*), row (`TaskRow`, *optional*), protocol (`Protocol`, *optional*): for a scored model.
        published (`Released`, *optional*): the row of the published table, for any other model.
    """

    label: str
    file: Path | None = None
    row: TaskRow | None = None
    protocol: Protocol | None = None
    published: Released | None = None

    @property
    def tasks(self) -> list[str]:
        """The tasks that have a score."""
        return list(self.row.results if self.row else self.published.scores if self.published else ())

    def is_same(self, other: "ComparedModel") -> bool:
        """Returns whether both are the same row of a file or of the table."""
        files = [model.file and model.file.resolve() for model in (self, other)]
        return files[0] == files[1] and self.row == other.row and self.published == other.published

    def metric(self, task: str) -> str:
        """Returns the reported metric of a task."""
        return self.row.results[task].metric if self.row else str(tables()["protocol"]["metric"][task])

    def items(self, task: str) -> int:
        """Returns the number of items of a task; for a published row, those of the official split."""
        return self.row.results[task].items if self.row else int(tables()["protocol"]["items"][task])

    def score(self, task: str, metric: str) -> MetricScore | None:
        """Returns a score and its standard error; `None` if the model has no such task or metric.

        For a published row, the standard error is that of a share of the official number of items.

        Raises:
            InputError: if the score is not finite.
        """
        if task not in self.tasks or (metric != self.metric(task) and self.row is None):
            return None
        if self.row:
            return self._row_score(self.row, task, metric)
        assert self.published
        score = self.published.scores[task]
        error = binomial_standard_error(score / 100, self.items(task))
        return MetricScore(score, None if error is None else 100 * error)

    def _row_score(self, row: TaskRow, task: str, metric: str) -> MetricScore | None:
        result = row.results[task]
        reported = MetricScore(result.score, result.standard_error)
        found = reported if metric == result.metric else result.metrics.get(metric)
        if found is None:
            return None
        if not math.isfinite(found.score):
            raise InputError(
                f"{self.file}: {metric} of {task} is {found.score} for {row.name}. A comparison needs finite scores; "
                "score the model with `eval tasks --rescore`"
            )
        # Files of early versions have 0 if all or no items are right, although the score is uncertain.
        error = found.standard_error
        return MetricScore(found.score, error if error and 0 < error < math.inf else None)

    def item_values(self, metrics: dict[str, str]) -> dict[str, ItemValues]:
        """Returns the values of all items by task; empty if the model was scored without items.

        Tasks are left out if their score is not the mean of their items, as for a corpus metric such as BLEU.

        Args:
            metrics (`dict`): the tasks to read and the metric of each.

        Raises:
            InputError: if the file of items is missing or damaged, or its items are not those of the scores.
        """
        if not self.row or not self.file or not self.row.items_file:
            return {}
        values: dict[str, ItemValues] = {task: {} for task in metrics}
        seen: Counter[tuple[str, str]] = Counter()
        counts: Counter[str] = Counter()
        for item in read_scored_items(self.file, self.row):
            if item.task not in metrics:
                continue
            value = item.metrics.get(metrics[item.task])
            if value is not None and not math.isfinite(value):
                raise self._other_items(f"item {item.index} of {item.task} has {metrics[item.task]} {value}")
            if value is not None:  # an item has no bits per byte if the text of its right choice is empty
                values[item.task][item.doc, seen[item.task, item.doc]] = value
            seen[item.task, item.doc] += 1
            counts[item.task] += 1
        for task in metrics:
            if counts[task] != self.items(task):
                raise self._other_items(
                    f"it has {counts[task]} items of {task}, but the score is over {self.items(task)}"
                )
        return {task: found for task, found in values.items() if self._is_mean(task, metrics[task], found)}

    def _is_mean(self, task: str, metric: str, found: ItemValues) -> bool:
        """Returns whether the score of a task is the mean of its items, as it must be for 0/1 metrics."""
        array, score = np.array(list(found.values())), self.score(task, metric)
        if not found or score is None:
            return False
        mean = metric_scale(metric) * float(array.mean())
        is_mean = abs(mean - score.score) < 1e-4 * metric_scale(metric)  # 0.01 points
        if not is_mean and is_binary(array):
            raise self._other_items(f"the mean of {metric} on {task} is {mean:.2f}, but the score {score.score:.2f}")
        return is_mean

    def _other_items(self, problem: str) -> InputError:
        assert self.file and self.row and self.row.items_file
        return InputError(
            f"{self.file.parent / self.row.items_file}: {problem}. The items must be those of the scores of "
            f"{self.row.name} in {self.file}; score the model with `eval tasks --rescore`"
        )


def find_compared_models(arguments: Sequence[str]) -> list[ComparedModel]:
    """Returns the models of a comparison, the reference first.

    Args:
        arguments (`Sequence[str]`): score files for all their models, in their order; `FILE:MODEL` for one of them; or
            names of rows of the published table. A folder stands for its `commonsense.json`.

    Raises:
        InputError: for an unknown name or file, a file of another kind, a file without models, a model that is given
            twice, or fewer than two models.
    """
    models = [model for argument in arguments for model in _find(argument)]
    for number, model in enumerate(models):
        if any(model.is_same(other) for other in models[:number]):
            raise InputError(f"{model.label} is given twice. Name each model once")
    if len(models) < 2:
        raise InputError(
            f"{' '.join(arguments)}: has one model, and a comparison needs two. Add a score file, FILE:MODEL, or a "
            "name from `tinyllama-hf list`"
        )
    names, in_file = Counter(m.label for m in models), Counter((m.label, m.file) for m in models)
    for model in models:
        is_in_file_twice = in_file[model.label, model.file] > 1
        place = f"{model.file}:{model.row.path}" if model.row and is_in_file_twice else model.file or "published"
        if names[model.label] > 1:
            model.label += f" ({place})"
    return models


def _find(argument: str) -> list[ComparedModel]:
    path = Path(argument)
    if path.is_dir():
        if not (path / "commonsense.json").is_file():
            raise InputError(f"{path}: has no commonsense.json. Score it with `tinyllama-hf eval tasks {path}`")
        path /= "commonsense.json"
    if path.is_file():
        return _read_models(path)
    # A path and a name may both contain a colon; the first split that is a file is taken.
    for place in (place for place, letter in enumerate(argument) if letter == ":"):
        if Path(argument[:place]).is_file():
            return [_pick(_read_models(Path(argument[:place])), argument[place + 1 :], argument[:place])]
    return [_published_model(argument)]


def _read_models(path: Path) -> list[ComparedModel]:
    file = read_scores(path, TaskScoreFile)
    assert file
    if not file.models:
        raise InputError(f"{path}: has no models. Score one with `tinyllama-hf eval tasks MODEL --output {path}`")
    return [ComparedModel(label=row.name, file=path, row=row, protocol=file.protocol) for row in file.models]


def _pick(models: list[ComparedModel], name: str, file: str) -> ComparedModel:
    rows = [(model, model.row) for model in models if model.row]
    found = [model for model, row in rows if row.path == name] or [model for model, row in rows if row.name == name]
    if not found:
        raise InputError(f"{file}: has no model {name!r}{did_you_mean(name, [row.name for _, row in rows])}")
    if len(found) > 1:
        paths = ", ".join(f"{file}:{row.path}" for model, row in rows if model in found)
        raise InputError(f"{file}: has {len(found)} models {name!r}. Use the path: {paths}")
    return found[0]


def _published_model(name: str) -> ComparedModel:
    with_scores = {model.name: model for model in released() if model.scores}
    if name in with_scores:
        return ComparedModel(label=name, published=with_scores[name])
    if any(model.name == name for model in released()):
        raise InputError(f"{name!r} has no published scores. Use one of {', '.join(with_scores)}")
    if name.endswith(".json") or "/" in name:
        raise InputError(f"{name}: file not found. Name a score file of `tinyllama-hf eval tasks`, or FILE:MODEL")
    near = difflib.get_close_matches(name, with_scores, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else f"published: {', '.join(with_scores)}"
    raise InputError(f"{name!r} is neither a score file nor a row of the published table; {hint}")
