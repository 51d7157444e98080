"""Compares the scores of models with those of a reference, task by task, on the items that both answered."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from ...errors import InputError, check_seed
from ..protocol import TASKS
from ..score_metrics import metric_unit
from .compared_models import ComparedModel, ItemValues
from .deviations import PublishedCheck, check_against_published
from .paired_tests import RESAMPLES
from .score_differences import (
    ScoreDifference,
    average_difference,
    correct_for_tasks,
    paired_difference,
    unpaired_difference,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelComparison:
    """A model compared with the reference.

    Attributes:
        reference (`str`), model (`str`): their labels.
        tasks (`list[ScoreDifference]`): the differences by task.
        average (`ScoreDifference`, *optional*): of the seven tasks, under the published protocol.
        protocol_differences (`list[str]`): how the model's protocol differs from that of the reference.
        published (`PublishedCheck`, *optional*): if one of the two is a row of the published table, whether the other
            reproduces it.
        remarks (`list[str]`): tasks and items that are left out, and why a comparison is unpaired.
    """

    reference: str
    model: str
    tasks: list[ScoreDifference]
    average: ScoreDifference | None
    protocol_differences: list[str]
    published: PublishedCheck | None
    remarks: list[str]

    @property
    def differences(self) -> list[ScoreDifference]:
        """The differences by task, and that of the average if there is one."""
        return [*self.tasks, *([self.average] if self.average else [])]

    @property
    def regressions(self) -> list[str]:
        """The tasks on which the model is worse, and `"average"`."""
        return [found.task for found in self.differences if found.verdict == "worse"]


def check_comparison(
    models: Sequence[ComparedModel],
    metric: str | None = None,
    different_protocols: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> None:
    """Checks everything that needs no items. For the arguments see [`compare_models`].

    Raises:
        InputError: for different protocols, unless they are allowed; a published row with another metric, or with
            scores of made-up items; models without a common task or metric; numbers out of range.
    """
    check_seed(seed)
    if not 1000 <= resamples <= 1_000_000:
        raise InputError(f"--resamples {resamples}: must be from 1,000 to 1,000,000")
    published = next((model.label for model in models if model.published), None)
    if published and metric:
        raise InputError(f"--metric {metric}: {published} has only the published metric of each task. Remove --metric")
    sample = next((model.label for model in models if model.protocol and model.protocol.sample), None)
    if published and sample:
        raise InputError(f"{sample} has scores of made-up items, which cannot be compared with {published}")
    for model in models[1:]:
        differences = _protocol_differences(models[0], model)
        if differences and not different_protocols:
            raise InputError(
                f"{model.label} was scored under a different protocol than {models[0].label}: "
                f"{'; '.join(differences)}. Score both under one protocol, or pass --different-protocols"
            )
        _common_metrics(models[0], model, metric)


def compare_models(
    models: Sequence[ComparedModel],
    metric: str | None = None,
    different_protocols: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
    advance: Callable[[], Any] = lambda: None,
) -> list[ModelComparison]:
    """Compares each model with the first one.

    Args:
        models (`Sequence[ComparedModel]`): from [`find_compared_models`].
        metric (`str`, *optional*): metric for all tasks; by default, for each task the one that the reference reports.
        different_protocols (`bool`, *optional*, defaults to `False`): allow scores of different protocols.
        resamples (`int`, *optional*, defaults to 10,000): bootstrap samples per interval.
        seed (`int`, *optional*, defaults to 0): seed of the bootstrap.
        advance (`Callable`): called after each model.

    Raises:
        InputError: as [`check_comparison`] and [`ComparedModel.item_values`].
    """
    check_comparison(models, metric, different_protocols, resamples, seed)
    reference = models[0]
    metrics = {task: metric or reference.metric(task) for task in reference.tasks}
    items = reference.item_values({t: name for t, name in metrics.items() if reference.score(t, name)})
    found = []
    for model in models[1:]:
        found.append(_compare(reference, items, model, metric, resamples, seed))
        advance()
    return found


def _compare(
    reference: ComparedModel,
    items: dict[str, ItemValues],
    model: ComparedModel,
    metric: str | None,
    resamples: int,
    seed: int,
) -> ModelComparison:
    metrics, left_out = _common_metrics(reference, model, metric)
    other_items = model.item_values(metrics) if items else {}
    tasks, means, unmatched = [], [], []
    for task, name in metrics.items():
        own, other = items.get(task, {}), other_items.get(task, {})
        if len(own.keys() & other.keys()) >= 2:
            difference, bootstrapped = paired_difference(task, name, (own, other), resamples, seed)
            means.append(bootstrapped)
        else:
            first, second = reference.score(task, name), model.score(task, name)
            assert first and second
            difference = unpaired_difference(task, name, (first, second))
            unmatched += [task] if own and other else []
        tasks.append(difference)
    correct_for_tasks(tasks)
    is_published = all(m.published or (m.protocol and m.protocol.name == "published") for m in (reference, model))
    names = set(metrics.values())
    seven = sorted(metrics) == sorted(TASKS) and (
        len(names) == 1 or {metric_unit(name) for name in names} == {"points"}
    )
    return ModelComparison(
        reference=reference.label,
        model=model.label,
        tasks=tasks,
        average=average_difference(tasks, means) if is_published and seven else None,
        protocol_differences=_protocol_differences(reference, model),
        published=_published_check(reference, model),
        remarks=[*left_out, *_item_remarks(reference, model, tasks, unmatched)],
    )


def _protocol_differences(reference: ComparedModel, model: ComparedModel) -> list[str]:
    """Returns how the protocol of a model differs; empty for a published row, see [`check_against_published`]."""
    if not reference.protocol or not model.protocol:
        return []
    return reference.protocol.differences(model.protocol)


def _common_metrics(
    reference: ComparedModel, model: ComparedModel, metric: str | None
) -> tuple[dict[str, str], list[str]]:
    """Returns the metric of each task that both models have, and a line per reason for leaving tasks out.

    Raises:
        InputError: if no task is left.
    """
    found, reasons = {}, {}
    for task in [*reference.tasks, *(task for task in model.tasks if task not in reference.tasks)]:
        name = metric or (reference.metric(task) if task in reference.tasks else "")
        owners = [m for m in (reference, model) if task in m.tasks]
        without = [m.label for m in owners if not m.score(task, name)]
        if len(owners) < 2:
            reasons[task] = f"only {owners[0].label} has it"
        elif without:
            reasons[task] = f"no {name} in {' and '.join(without)}"
        else:
            found[task] = name
    if not found:
        raise InputError(
            f"{reference.label} and {model.label} have no task to compare: "
            f"{'; '.join(f'{task}: {reason}' for task, reason in reasons.items())}. "
            "Score both on the same tasks, or choose another --metric"
        )
    lines = [
        f"left out: {', '.join(task for task in reasons if reasons[task] == reason)} ({reason})"
        for reason in dict.fromkeys(reasons.values())
    ]
    return found, lines


def _item_remarks(
    reference: ComparedModel, model: ComparedModel, tasks: list[ScoreDifference], unmatched: list[str]
) -> list[str]:
    """Returns remarks on the pairs: how many there are, and what is unpaired."""
    both, remarks = (reference, model), []
    pairs = sum(task.pairs or 0 for task in tasks)
    if pairs:
        incomplete = [task for task in tasks if any(task.left_out)]
        counts = [f"{task.task} {task.left_out[0]:,} and {task.left_out[1]:,}" for task in incomplete]
        without = f"unpaired items left out ({reference.label} and {model.label}): {', '.join(counts)}"
        remarks.append(f"{pairs:,} pairs of items; {without if incomplete else 'every item is paired'}")
    names = [m.label for m in both if not m.row or not m.row.items_file]
    if names:
        remarks.append(
            f"unpaired, since there are no items for {' and '.join(names)}: standard errors are upper bounds"
        )
    if unmatched:
        remarks.append(f"unpaired, since the models have no items in common: {', '.join(unmatched)}")
    if not names and (others := [t.task for t in tasks if t.test == "unpaired" and t.task not in unmatched]):
        remarks.append(f"unpaired, since the score is not the mean of its items: {', '.join(others)}")
    rows = [m.row for m in both if m.row]
    if len(rows) == 2 and rows[0].fingerprint == rows[1].fingerprint and rows[0].quantization == rows[1].quantization:
        remarks.append("both have the same weights")
    return remarks


def _published_check(reference: ComparedModel, model: ComparedModel) -> PublishedCheck | None:
    published = reference.published or model.published
    scored = model if reference.published else reference
    if not published or not scored.row or not scored.protocol:
        return None
    return check_against_published(scored.row, scored.protocol, published)
