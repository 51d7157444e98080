"""The table of commonsense scores and its comparison with published scores, from made-up rows."""

from dataclasses import replace

import pytest

from tinyllama_hf.errors import InputError
from tinyllama_hf.evaluation.protocol import compare, published_row
from tinyllama_hf.evaluation.score_files import MetricScore, Protocol, TaskRow, TaskScore, TaskScoreFile
from tinyllama_hf.evaluation.scored_items import ScoredItem
from tinyllama_hf.evaluation.table import table_lines, wrong_item_lines
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


def test_some_of_the_tasks_are_compared_with_a_published_row():
    """As with `--task arc_easy --task boolq`, which have no average."""
    row = made_up()
    row = replace(row, results={task: row.results[task] for task in ("arc_easy", "boolq")}, average=None)
    row.results["boolq"] = replace(row.results["boolq"], score=61.83)
    lines = table(row, published_row("pythia-1b"))
    assert [line.split() for line in lines[-4:-1]] == [
        ["arc_easy", "boolq"],
        ["published", "pythia-1b", "48.99", "60.83"],
        ["difference", "+0.00", "+1.00*"],
    ]
    assert lines[-1] == "  tolerance, 0.9 per task: outside in boolq (*)"
    assert table(row) == lines[:-4]


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


def test_bits_per_byte_of_right_answers_are_a_line_of_the_table():
    row = made_up()
    assert not any("bits per byte" in line for line in table(row)), "early files have none"
    for number, task in enumerate(row.results):
        metrics = {"acc": MetricScore(50, 1), "bits_per_byte": MetricScore(1 + number / 8, 0.1)}
        row.results[task] = replace(row.results[task], metrics=metrics)
    (line,) = [line for line in table(row) if "bits per byte" in line]
    assert line.split()[3:] == ["1.000", "1.125", "1.250", "1.375", "1.500", "1.625", "1.750"]


def test_other_tasks_are_a_list_with_all_metrics():
    """Of many tasks in groups only the groups are listed."""
    metrics = {"exact_match,strict": MetricScore(12.5, 3.25), "exact_match,flexible": MetricScore(20, None)}
    score = TaskScore("exact_match,strict", 12.5, 3.25, 40, 1, metrics)
    row = replace(made_up(), results={"gsm8k": score}, average=None)
    lines = [line.split() for line in table(row)]
    assert lines[1:3] == [
        ["gsm8k", "exact_match,strict*", "12.50", "3.25", "40"],
        ["gsm8k", "exact_match,flexible", "20.00", "none", "40"],
    ]
    many = replace(row, results={f"task_{n}": score for n in range(21)}, groups={"all": score})
    text = "\n".join(table(many))
    assert "task_0" not in text and "21 tasks of these groups" in text and "all " in text


def test_wrong_items_are_shown_with_choices_and_replies():
    row = made_up()
    about = {"task": "piqa", "doc": "d", "metrics": {"acc": 0.0}}
    chosen = {"log_likelihoods": [-1.5, -2.25], "chosen": 0, "gold": 1, "choices": [" to fly", " to fall"]}
    items = [
        ScoredItem(index=0, **about),  # without texts, it is a right one
        ScoredItem(index=1, question="How\nis it?", **about, **chosen),
        ScoredItem(index=2, question="Why?", replies=["since"], **about),
    ]
    assert list(wrong_item_lines(row, items, 1)) == [
        "m, piqa, item 1:", "  How\n  is it?", "     -1.500  to fly  <- chosen", "     -2.250  to fall  <- right",
    ]  # fmt: skip
    both = [replace(items[1], chosen=2, gold=0, also_right=[1])]
    assert [line.rpartition("  ")[2] for line in wrong_item_lines(row, both, 1)][-2:] == ["<- right", "<- right"]
    assert list(wrong_item_lines(row, items, 2))[-2:] == ["  Why?", "  reply: since"]
    assert list(wrong_item_lines(row, items, 0)) == []
