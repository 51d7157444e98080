"""The table of commonsense scores and its comparison with published scores, from made-up rows."""

from dataclasses import replace

import pytest

from tinyllama_hf.errors import InputError
from tinyllama_hf.evaluation.protocol import compare, published_row
from tinyllama_hf.evaluation.score_files import Protocol, TaskRow, TaskScore, TaskScoreFile
from tinyllama_hf.evaluation.table import table_lines
from tinyllama_hf.released import tables


def made_up(shift: float = 0.0, average_shift: float = 0.0) -> TaskRow:
    """The published scores of pythia-1b, the first one moved by `shift`."""
    published = published_row("pythia-1b")
    results = {
        task: TaskScore("acc", published.scores[task], 1.0, items, 1)
        for task, items in tables()["protocol"]["items"].items()
    }
    results["hellaswag"] = replace(results["hellaswag"], score=published.scores["hellaswag"] + shift)
    average = published.average + average_shift
    return TaskRow(
        name="m",
        path="m",
        fingerprint="f",
        results=results,
        average=average,
        average_standard_error=0.4,
        cut_requests=0,
        seconds=1.0,
    )


def table(row: TaskRow, published=None) -> list[str]:
    metrics = tables()["protocol"]["metric"]
    protocol = Protocol("lm-eval", {}, metrics, "float32", 0, False, False, 512, None, {}, sample=False)
    return list(table_lines(TaskScoreFile(protocol=protocol, models=[row]), published))


@pytest.mark.parametrize(
    ("shift", "average_shift", "outside"),
    [(0.9, 0.25, []), (-0.9, 0, []), (0.91, 0, ["hellaswag"]), (0, -0.26, ["average"])],
)
def test_the_tolerance_of_the_published_table(shift, average_shift, outside):
    row = made_up(shift, average_shift)
    found = compare(row, published_row("pythia-1b"))
    assert found.outside == outside and found.differences["hellaswag"] == pytest.approx(shift)
    text = "\n".join(table(row, published_row("pythia-1b")))
    assert ("outside in " + ", ".join(outside) if outside else "for the average: within") in text
    assert "SUBSET" not in text and "SAMPLE" not in text


def test_the_tolerance_is_one_of_hundredths():
    """45.41 - 44.51 is above 0.9 in floats, and within the tolerance."""
    published, beyond = published_row("pythia-1b"), 0
    for task, printed in published.scores.items():
        row = made_up()
        row.results[task] = replace(row.results[task], score=round(printed + 0.9, 2))
        beyond += row.results[task].score - printed > 0.9
        assert compare(row, published).outside == [], task
    assert beyond


def test_the_table_with_a_published_row():
    row = made_up(0.5)
    published = [47.16, 31.40, 53.43, 27.05, 48.99, 60.83, 69.21, 48.30]
    lines = table(row, published_row("pythia-1b"))
    assert lines[4].split()[2:] == [f"{score:.2f}" for score in published]
    assert lines[5].split() == ["difference", "+0.50", *["+0.00"] * 7]
    assert lines[6] == "  tolerance, 0.9 per task and 0.25 for the average: within"


def test_a_subset_says_that_it_is_one_and_is_not_compared():
    row = made_up()
    row.results["boolq"] = replace(row.results["boolq"], items=100)
    lines = table(row, published_row("pythia-1b"))
    assert lines[0].startswith("SUBSET: 100 of 3270 items of boolq; not comparable")
    assert lines[1].startswith("pythia-1b is not compared")
    assert lines[2:] == table(row)[1:] and not any(word in "".join(lines[2:]) for word in ("published", "tolerance"))


def test_published_rows():
    assert published_row("chat-v0.3").scores["arc_easy"] == 53.20
    with pytest.raises(InputError, match="did you mean 'step-50k-105b'"):
        published_row("step-50k-105")
    with pytest.raises(InputError, match=r"--published 'chat-v1.0' has no published scores"):
        published_row("chat-v1.0")
