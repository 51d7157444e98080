"""The comparison of models as text: a table for the terminal, Markdown and JSON."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from .deviations import PublishedCheck
from .paired_tests import ALPHA, POWER
from .score_comparison import ModelComparison
from .score_differences import ScoreDifference


HEADER = ("task", "metric", "pairs", "A", "B", "B - A", "SE", "95 % interval", "p", "p (Holm)", "verdict")
_LEFT_ALIGNED = ("task", "metric", "verdict")


def comparison_lines(comparisons: Sequence[ModelComparison], resamples: int, seed: int) -> Iterator[str]:
    """Yields the lines of the tables for a terminal."""
    for number, comparison in enumerate(comparisons):
        yield from [""] if number else []
        yield from _titles(comparison)
        rows = [HEADER, *map(_cells, comparison.differences)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = zip(HEADER, row, widths, strict=True)
            yield "  ".join(c.ljust(w) if name in _LEFT_ALIGNED else c.rjust(w) for name, c, w in cells).rstrip()
        yield from _remarks(comparison)
    yield ""
    yield from method_lines(comparisons, resamples, seed)


def comparison_markdown(comparisons: Sequence[ModelComparison], resamples: int, seed: int) -> str:
    """Returns the tables as a Markdown page."""
    lines = ["# Comparison of scores", ""]
    for comparison in comparisons:
        lines += [f"## {_escape(comparison.model)} compared with {_escape(comparison.reference)}", ""]
        lines += [f"- {_escape(line)}" for line in _titles(comparison)]
        lines += [
            "",
            _markdown_row(HEADER),
            "|" + "|".join("---" if h in _LEFT_ALIGNED else "--:" for h in HEADER) + "|",
        ]
        lines += [_markdown_row(_cells(found)) for found in comparison.differences]
        lines += ["", *(f"- {_escape(line.strip())}" for line in _remarks(comparison)), ""]
    return "\n".join([*lines, *map(_escape, method_lines(comparisons, resamples, seed)), ""])


def comparison_json(comparisons: Sequence[ModelComparison], resamples: int, seed: int) -> dict[str, Any]:
    """Returns the comparisons as JSON values, with unrounded numbers."""
    return {
        "alpha": ALPHA,
        "power": POWER,
        "resamples": resamples,
        "seed": seed,
        "comparisons": [
            {**dataclasses.asdict(comparison), "regressions": comparison.regressions} for comparison in comparisons
        ],
    }


def method_lines(comparisons: Sequence[ModelComparison], resamples: int, seed: int) -> Iterator[str]:
    """Yields a description of the methods."""
    tests = {found.test for comparison in comparisons for found in comparison.differences}
    if tests - {"unpaired"}:
        yield f"Intervals of pairs: percentile bootstrap over items, {resamples:,} resamples, seed {seed}."
    names = [name for name in ("exact McNemar", "paired t", "unpaired") if name in tests]
    yield (
        f"p: {', '.join(names)}; verdicts by p (Holm) < {ALPHA}, corrected for the tasks of a table. "
        f'"Could show": found with a power of {100 * POWER:.0f} % at p < {ALPHA}.'
    )


def _titles(comparison: ModelComparison) -> Iterator[str]:
    yield f"A  {comparison.reference}"
    yield f"B  {comparison.model}"
    for difference in comparison.protocol_differences:
        yield f"DIFFERENT PROTOCOLS  B: {difference}"


def _cells(found: ScoreDifference) -> tuple[str, ...]:
    digits = 2 if found.unit == "points" else 4
    low, high = found.interval or (None, None)
    return (
        found.task,
        found.metric,
        "unpaired" if found.pairs is None else f"{found.pairs:,}",
        *(f"{score:.{digits}f}" for score in found.scores),
        f"{found.difference:+.{digits}f}",
        "none" if found.standard_error is None else f"{found.standard_error:.{digits}f}",
        "none" if low is None else f"{low:+.{digits}f} to {high:+.{digits}f}",
        _probability(found.p_value),
        "" if found.task == "average" else _probability(found.corrected),
        _verdict(found, digits),
    )


def _probability(value: float | None) -> str:
    return "none" if value is None else "<0.0001" if value < 0.0001 else f"{value:.4f}"


def _verdict(found: ScoreDifference, digits: int) -> str:
    if found.verdict != "no difference shown":
        return found.verdict
    could = "could not show any"
    if found.detectable is not None:
        could = f"could show {found.detectable:.{digits}f} {found.unit}".rstrip()
    return f"{found.verdict} ({could})"


def _remarks(comparison: ModelComparison) -> Iterator[str]:
    for remark in comparison.remarks:
        yield f"  {remark}"
    if comparison.published:
        yield from _published_lines(comparison.published)


def _published_lines(check: PublishedCheck) -> Iterator[str]:
    if check.departures:
        yield f"  departures from the published protocol: {'; '.join(check.departures)}"
    if not check.deviations:
        yield f"  as a reproduction of {check.published}: within the tolerance in every task"
    for found in check.deviations:
        causes = f"explained by: {'; or '.join(found.causes)}" if found.causes else "UNEXPLAINED"
        difference = f"{found.task} deviates by {found.difference:+.2f} points"
        yield f"  as a reproduction of {check.published}: {difference}, {causes}"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_escape, cells)) + " |"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("_", "\\_").replace("*", "\\*")
