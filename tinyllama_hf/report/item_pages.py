"""A page per scored model with its first wrong items: question, choices and their log-likelihoods."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import InputError
from ..evaluation.milestone_selection import OTHER_TASKS_FILES, TASKS_FILE
from ..evaluation.protocol import caveat
from ..evaluation.score_files import Protocol, TaskRow, TaskScoreFile, read_scores
from ..evaluation.score_metrics import is_wrong
from ..evaluation.scored_items import ScoredItem, read_scored_items
from ..files import write_text
from .jinja import render_template


@dataclasses.dataclass(frozen=True)
class WrongItem:
    """A wrong item, as the page shows it. `choices` are text, log-likelihood and whether right and chosen."""

    index: int
    question: str
    choices: list[tuple[str, float | None, bool, bool]]
    replies: list[str]


@dataclasses.dataclass(frozen=True)
class ItemPage:
    """The items of a model.

    Attributes:
        name (`str`): of the model.
        protocol (`Protocol`): of the scores.
        caveat (`str`): why they are not a benchmark result, or `""`.
        file (`str`, *optional*): name of its page; `None` if there is none.
        problem (`str`, *optional*): why there is none.
        items, wrong (`int`): numbers of items, and of wrong ones.
        tasks (`dict[str, list[WrongItem]]`): the first wrong items of each task.
        counts (`dict[str, tuple[int, int]]`): numbers of wrong items and of all by task.
    """

    name: str
    protocol: Protocol
    caveat: str
    file: str | None = None
    problem: str | None = None
    items: int = 0
    wrong: int = 0
    tasks: dict[str, list[WrongItem]] = dataclasses.field(default_factory=dict)
    counts: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)


def read_task_files(run: Path) -> dict[Path, TaskScoreFile]:
    """Reads the task scores of a run: those of the seven tasks first, then of other tasks and protocols."""
    paths = [run / TASKS_FILE, *sorted(run.glob(OTHER_TASKS_FILES))]
    read = {path: read_scores(path, TaskScoreFile) for path in paths}
    return {path: file for path, file in read.items() if file and file.models}


def read_item_pages(files: Mapping[Path, TaskScoreFile]) -> list[ItemPage]:
    """Reads the items of all models of score files that have some.

    A missing or damaged file of items is a problem of its page, not of the report, since the scores are complete
    without it.
    """
    pages: list[ItemPage] = []
    for path, file in files.items():
        for row in file.models:
            if row.items_file is None:
                continue
            page = ItemPage(row.name, file.protocol, caveat(file))
            try:
                items = read_scored_items(path, row)
            except InputError as error:
                pages.append(dataclasses.replace(page, problem=str(error)))
                continue
            pages.append(_with_items(page, row, items, [page.file for page in pages]))
    return pages


def write_item_pages(pages: Sequence[ItemPage], output: Path) -> None:
    """Writes the pages into the folder of the report."""
    for page in pages:
        if page.file:
            template = Path(__file__).with_name("items.html.jinja")
            write_text(output / page.file, render_template(template, title=f"Wrong answers of {page.name}", page=page))


def _with_items(page: ItemPage, row: TaskRow, items: Sequence[ScoredItem], taken: Sequence[str | None]) -> ItemPage:
    base = f"items-{re.sub(r'[^A-Za-z0-9._-]+', '-', row.name).strip('-')}"
    names = (f"{base}{'' if number == 1 else f'-{number}'}.html" for number in range(1, len(taken) + 2))
    metrics = {task: result.metric for task, result in row.results.items()}
    wrong = [item for item in items if item.task in metrics and is_wrong(item, metrics[item.task])]
    tasks = list(dict.fromkeys(item.task for item in items))
    return dataclasses.replace(
        page,
        file=next(name for name in names if name not in taken),
        items=len(items),
        wrong=len(wrong),
        tasks={t: [_shown(i) for i in wrong if i.task == t and i.question is not None] for t in tasks},
        counts={t: (sum(i.task == t for i in wrong), sum(i.task == t for i in items)) for t in tasks},
    )


def _shown(item: ScoredItem) -> WrongItem:
    likelihoods = (
        item.log_likelihoods if len(item.log_likelihoods) == len(item.choices) else [None] * len(item.choices)
    )
    choices = [
        (text, value, number in item.right_choices, number == item.chosen)
        for number, (text, value) in enumerate(zip(item.choices, likelihoods, strict=True))
    ]
    return WrongItem(item.index, item.question or "", choices, item.replies)
