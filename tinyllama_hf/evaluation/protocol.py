"""The protocol of the commonsense evaluation, and the published scores to compare with."""

import dataclasses
from typing import Any

from ..errors import InputError, did_you_mean
from ..released import Released, released, tables
from .score_files import CommonsenseRow


TASKS = tuple(tables()["protocol"]["metric"])


@dataclasses.dataclass(frozen=True)
class Protocol:
    """All settings that change a commonsense score. Scores are comparable if their protocols are equal.

    Attributes:
        harness (`str`): name and version of the harness.
        task_versions (`dict`): the harness's version of each task.
        metrics (`dict`): the reported metric of each task. `"acc"` picks the choice with the highest log-likelihood,
            `"acc_norm"` the one with the highest log-likelihood per character.
        dtype (`str`): dtype of weights and arithmetic.
        num_fewshot (`int`): number of solved examples before each question.
        add_bos_token (`bool`): whether each request starts with the begin-of-sequence token.
        apply_chat_template (`bool`): whether each question is formatted as a user turn.
        context_length (`int`): context of the model in tokens. Longer requests are truncated from the left.
        limit (`int`, *optional*): number of items per task, from the first; `None` for all.
        data (`dict`): for each task, the SHA-256 of the file that was read, or the location on the Hub.
        sample (`bool`): whether the data are the made-up items that ship with the package.
    """

    harness: str
    task_versions: dict[str, Any]
    metrics: dict[str, str]
    dtype: str
    num_fewshot: int
    add_bos_token: bool
    apply_chat_template: bool
    context_length: int
    limit: int | None
    data: dict[str, str]
    sample: bool

    def to_dict(self) -> dict[str, Any]:
        """Returns the protocol as it is written to a score file."""
        return dataclasses.asdict(self)

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Lists the differences from a protocol of a score file: `"limit (100, not None)"`, `"data of piqa"`."""
        own, found = self.to_dict(), []
        for key in (key for key in own | other if own.get(key) != other.get(key)):
            mine, theirs = own.get(key), other.get(key)
            if isinstance(mine, dict) and isinstance(theirs, dict):
                tasks = [task for task in mine | theirs if mine.get(task) != theirs.get(task)]
                found.append(f"{key} of {', '.join(tasks)}")
            else:
                found.append(f"{key} ({theirs}, not {mine})")
        return found


def published_row(name: str) -> Released:
    """Returns a row of the published table by its name. The table includes the peer and the chat models.

    Raises:
        InputError: if the table has no such row, or no scores for it.
    """
    rows = {model.name: model for model in released()}
    with_scores = [model.name for model in rows.values() if model.scores]
    if name not in rows:
        raise InputError(f"--published {name!r} is not in the published table{did_you_mean(name, with_scores)}")
    if not rows[name].scores:
        raise InputError(f"--published {name!r} has no published scores. Use one of {', '.join(with_scores)}")
    return rows[name]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Published scores, score minus published score, and the names of differences beyond the tolerance.

    Both are in percent, by task and for the `"average"`.
    """

    published: dict[str, float]
    differences: dict[str, float]
    outside: list[str]


def compare(row: CommonsenseRow, published: Released) -> Comparison:
    """Compares the scores of a model with a row of the published table, with the tolerance in `released.yaml`.

    Raises:
        InputError: if the row has no scores.
    """
    if published.average is None:
        raise InputError(f"{published.name} has no published scores")
    scores = {**{task: row.results[task].score for task in TASKS}, "average": row.average}
    printed = {**{task: published.scores[task] for task in TASKS}, "average": published.average}
    differences = {name: score - printed[name] for name, score in scores.items()}
    tolerance = tables()["protocol"]["tolerance"]
    allowed = dict.fromkeys(TASKS, tolerance["per_task"]) | {"average": tolerance["average"]}
    # Published scores have two decimals, so differences are rounded to hundredths: 45.41 - 44.51 is 0.8999... in
    # floats.
    outside = [name for name, difference in differences.items() if round(abs(difference), 2) > allowed[name]]
    return Comparison(printed, differences, outside)


def caveat(protocol: dict[str, Any], results: dict[str, dict[str, Any]]) -> str:
    """Returns why scores are not a benchmark result (sample data or a subset of the items), or `""` if they are one.

    Args:
        protocol (`dict`): the protocol of a score file.
        results (`dict`): the results of one of its models, by task.
    """
    if protocol["sample"]:
        return "a few made-up items that test the pipeline; the scores have no meaning"
    official = tables()["protocol"]["items"]
    partial = [f"{r['items']} of {official[t]} items of {t}" for t, r in results.items() if r["items"] != official[t]]
    return f"{', '.join(partial)}; not comparable with scores on all items" if partial else ""
