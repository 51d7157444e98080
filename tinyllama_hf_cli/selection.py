"""`tinyllama-hf select`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .outputs import check_output_file


if TYPE_CHECKING:
    from collections.abc import Iterator

    from tinyllama_hf.evaluation.milestone_selection import Ranking


def select_command(
    series: Annotated[
        Path, typer.Argument(help="Run with scored milestones, or a score file of `eval tasks` or `eval text`.")
    ],
    metric: Annotated[
        str | None,
        typer.Option(
            help="bits_per_byte (of the right answers), accuracy, or text (bits per byte of held-out text); default: "
            "the first of these that has scores."
        ),
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="Use only this task, repeatable; default: all.")] = None,
    json: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Rank the milestones of a series, and list those that cannot be told apart from the best one.

    For task scores, each milestone gets a paired interval: how much worse it is than the best one, on the items that
    all of them answered. With 95 % confidence, the truly best milestone is the first one or one of its ties. Text
    scores are ranked without intervals.

    Example: tinyllama-hf select runs/demo/pretrain

    Example: tinyllama-hf select commonsense.json --metric accuracy --task arc_easy --task piqa --json ranking.json
    """
    from tinyllama_hf.evaluation.milestone_selection import rank_milestones

    if json is not None:
        check_output_file("--json", json)
    ranking = rank_milestones(series, metric, task or ())
    for line in ranking_lines(ranking):
        print(line)
    if json is not None:
        from tinyllama_hf.files import write_json

        json.parent.mkdir(parents=True, exist_ok=True)
        write_json(json, ranking.to_json())
        print(f"wrote {json}")


def ranking_lines(ranking: "Ranking") -> "Iterator[str]":
    """Yields the lines that the command prints."""
    digits = 2 if ranking.unit == "points" else 4
    unit = {"points": "percent", "bits": "bits/byte"}.get(ranking.unit, "score")
    sizes = ", ".join(f"{number:,} of {name}" for name, number in ranking.items.items())
    yield f"{ranking.metric}: {'bytes' if ranking.metric == 'text' else 'items'}: {sizes}"
    if ranking.left_out:
        yield f"left out {ranking.left_out:,} items that not all milestones answered"
    yield f"{unit:>10}  {'worse by':>9}  {'95 % interval':>20}  {'tokens':>13}  milestone"
    for number, milestone in enumerate(ranking.milestones):
        interval = ""
        if number and milestone.low is not None and milestone.high is not None:
            interval = f"{milestone.low:.{digits}f} to {milestone.high:.{digits}f}"
        difference = f"{milestone.difference:.{digits}f}" if number else ""
        tokens = f"{milestone.tokens:,}" if milestone.tokens is not None else ""
        tie = "  (tie)" if number and milestone.is_tied else ""
        yield (
            f"{milestone.score:>10.{digits}f}  {difference:>9}  {interval:>20}  {tokens:>13}  {milestone.name}{tie}"
        )
    if ranking.note:
        yield f"note: {ranking.note}"
    best = ranking.milestones[0]
    place = f" ({best.path})"
    yield f"best: {best.name.removesuffix(place)}{place}"  # the path is in the name if several share this name
    if ranking.confidence:
        names = ", ".join(milestone.name for milestone in ranking.ties) or "none"
        yield f"cannot be told apart from it with these items: {names}"
