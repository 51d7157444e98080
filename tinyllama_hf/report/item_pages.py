"""A page per scored model with its first wrong items: question, choices and their log-likelihoods."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from ..evaluation.score_files import TaskRow, TaskScoreFile
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
        file (`str`, *optional*): name of its page; `None` if there is none.
        problem (`str`, *optional*): why there is none.
        items, wrong (`int`): numbers of items, and of wrong ones.
        tasks (`dict[str, list[WrongItem]]`): the first wrong items of each task.
        counts (`dict[str, tuple[int, int]]`): numbers of wrong items and of all by task.
    """

    name: str
    file: str | None = None
    problem: str | None = None
    items: int = 0
    wrong: int = 0
    tasks: dict[str, list[WrongItem]] = dataclasses.field(default_factory=dict)
    counts: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)


def read_item_pages(score_file: Path, scores: TaskScoreFile) -> list[ItemPage]:
    """Reads the items of all models of a score file that have some.

    A missing or damaged file of items is a problem of its page, not of the report, since the scores are complete
    without it.
    """
    pages: list[ItemPage] = []
    for row in scores.models:
        if row.items_file is None:
            continue
        try:
            items = read_scored_items(score_file, row)
        except InputError as error:
            pages.append(ItemPage(row.name, problem=str(error)))
            continue
        pages.append(_page(row, items, [page.file for page in pages]))
    return pages


def write_item_pages(pages: Sequence[ItemPage], scores: TaskScoreFile, caveat: str, output: Path) -> None:
    """Writes the pages into the folder of the report."""
    for page in pages:
        if page.file:
            template = Path(__file__).with_name("items.html.jinja")
            title = f"Wrong answers of {page.name}"
            text = render_template(template, title=title, page=page, protocol=scores.protocol, caveat=caveat)
            write_text(output / page.file, text)


def _page(row: TaskRow, items: Sequence[ScoredItem], taken: Sequence[str | None]) -> ItemPage:
    base = f"items-{re.sub(r'[^A-Za-z0-9._-]+', '-', row.name).strip('-')}"
    names = (f"{base}{'' if number == 1 else f'-{number}'}.html" for number in range(1, len(taken) + 2))
    wrong = [item for item in items if is_wrong(item, row)]
    tasks = list(dict.fromkeys(item.task for item in items))
    return ItemPage(
        name=row.name,
        file=next(name for name in names if name not in taken),
        items=len(items),
        wrong=len(wrong),
        tasks={t: [_shown(i) for i in wrong if i.task == t and i.question is not None] for t in tasks},
        counts={t: (sum(i.task == t for i in wrong), sum(i.task == t for i in items)) for t in tasks},
    )


def is_wrong(item: ScoredItem, row: TaskRow) -> bool:
    """Returns whether the answer to an item is wrong: another choice, or a metric of the task below 1."""
    if item.chosen is not None and item.gold is not None:
        return item.chosen != item.gold
    result = row.results.get(item.task)
    return result is not None and item.metrics.get(result.metric, 1.0) < 1


def _shown(item: ScoredItem) -> WrongItem:
    likelihoods = (
        item.log_likelihoods if len(item.log_likelihoods) == len(item.choices) else [None] * len(item.choices)
    )
    choices = [
        (text, value, number == item.gold, number == item.chosen)
        for number, (text, value) in enumerate(zip(item.choices, likelihoods, strict=True))
    ]
    return WrongItem(item.index, item.question or "", choices, item.replies)
