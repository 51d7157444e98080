"""Everything that moves a commonsense score besides the model, and the published scores to compare with."""

import dataclasses
from typing import Any

from ..errors import InputError, did_you_mean
from ..released import Released, released, tables


TASKS = tuple(tables()["protocol"]["metric"])


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How scores were made. Scores are comparable when their protocols are equal.

    Attributes:
        harness (`str`): name and version.
        task_versions (`dict`): the harness's version of each task.
        metrics (`dict`): the metric that counts, by task: `"acc"` takes the likeliest choice, `"acc_norm"` the likeliest
            by character.
        dtype (`str`): of weights and arithmetic.
        num_fewshot (`int`): solved examples before each question.
        add_bos_token (`bool`): whether a begin-of-sequence comes first.
        apply_chat_template (`bool`): whether questions are put as a user's turn.
        context_length (`int`): tokens that the model reads; of a longer request the beginning is cut.
        limit (`int`, *optional*): items of each task, from the first; all if `None`.
        data (`dict`): by task the SHA-256 of the file that was read, or its place on the Hub.
        sample (`bool`): whether the data are the made-up items that come with the package, and no benchmark.
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
        """As it stands in a score file."""
        return dataclasses.asdict(self)

    def differences(self, other: dict[str, Any]) -> list[str]:
        """What another protocol, read from a score file, has otherwise: `"limit (100, not None)"`, `"data of piqa"`."""
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
    """The row of the published table with this name, the peer's and those of the chat models included.

    Raises:
        InputError: if there is no such row, or it has no scores.
    """
    rows = {model.name: model for model in released()}
    with_scores = [model.name for model in rows.values() if model.scores]
    if name not in rows:
        raise InputError(f"--published {name!r}: no row of the published table{did_you_mean(name, with_scores)}")
    if not rows[name].scores:
        raise InputError(f"--published {name!r}: no scores were published for it; there are: {', '.join(with_scores)}")
    return rows[name]


def compare(row: dict[str, Any], published: Released) -> dict[str, Any]:
    """Sets the scores of a model beside published ones.

    Args:
        row (`dict`): an entry of `models` in a score file.
        published (`Released`): the row to compare with.

    Returns:
        `dict`: `differences` (ours less the published) by task and of the `"average"`, in points, and `outside`: the
        names of those that are beyond the tolerance of `released.yaml`.
    """
    tolerance = tables()["protocol"]["tolerance"]
    differences = {task: row["results"][task]["score"] - published.scores[task] for task in TASKS}
    differences["average"] = row["average"] - published.average
    allowed = dict.fromkeys(TASKS, tolerance["per_task"]) | {"average": tolerance["average"]}
    # 45.41 - 44.51 is 0.8999...: published scores have two decimals, so hundredths are compared.
    outside = [name for name, difference in differences.items() if round(abs(difference), 2) > allowed[name]]
    return {"differences": differences, "outside": outside}


def caveat(protocol: dict[str, Any], results: dict[str, dict[str, Any]]) -> str:
    """What commonsense scores were made on if that is no benchmark result, empty if they are one.

    Args:
        protocol (`dict`): of a score file.
        results (`dict`): of one of its models, by task.
    """
    if protocol["sample"]:
        return "a few made-up items that show that the pipeline runs; no benchmark, the scores mean nothing"
    official = tables()["protocol"]["items"]
    partial = [f"{r['items']} of {official[t]} items of {t}" for t, r in results.items() if r["items"] != official[t]]
    return f"{', '.join(partial)}; not comparable with scores on all items" if partial else ""
