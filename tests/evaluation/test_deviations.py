"""Scores as a reproduction of the published table: each way in which they go wrong is flagged."""

import dataclasses
import math

import numpy as np
import pytest

from tests.conftest import run_here
from tests.evaluation.simulated_scores import PROTOCOL, TABLE, compared
from tinyllama_hf.evaluation.comparison.deviations import check_against_published
from tinyllama_hf.evaluation.protocol import TASKS, published_row
from tinyllama_hf.evaluation.score_files import MetricScore, TaskRow, TaskScore, TaskScoreFile, write_scores


def reproduction(**changes) -> TaskRow:
    """A scored model that reproduces a published row exactly, with some fields changed."""
    published = published_row("step-1431k-3T")
    results = {}
    for task, items in TABLE["items"].items():
        score, metric = published.scores[task], TABLE["metric"][task]
        other = {"acc": MetricScore(score - 4, 1.0)} if metric == "acc_norm" else {}
        error = 100 * math.sqrt(score / 100 * (1 - score / 100) / (items - 1))
        metrics = {metric: MetricScore(score, error), **other, "bits_per_byte": MetricScore(1.0, 0.1)}
        results[task] = TaskScore(metric, score, error, items, 1.0, metrics)
    row = TaskRow(
        name="mine", path="mine", fingerprint="f" * 64, results=results, average=published.average, cut_requests=0,
        seconds=1.0,
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


def moved(row: TaskRow, task: str, **fields) -> TaskRow:
    """The row with another result of a task, and its average."""
    row = dataclasses.replace(row, results={**row.results, task: dataclasses.replace(row.results[task], **fields)})
    return dataclasses.replace(row, average=math.fsum(r.score for r in row.results.values()) / 7)


def checked(row: TaskRow, **protocol):
    found = check_against_published(row, dataclasses.replace(PROTOCOL, **protocol), published_row("step-1431k-3T"))
    return found.departures, {d.task: (round(d.difference, 2), d.causes) for d in found.deviations}


def test_a_true_reproduction_has_no_deviation():
    assert checked(reproduction()) == ([], {})
    assert checked(moved(reproduction(), "piqa", score=73.29 + 0.9)) == ([], {})


@pytest.mark.parametrize("value", [True, None])
def test_a_begin_of_sequence_token_is_flagged(value):
    row = moved(reproduction(), "hellaswag", score=59.20 - 4.6)
    departures, deviations = checked(row, add_bos_token=value)
    cause = f"add_bos_token is {value}, not False"
    assert departures == [cause]
    assert deviations == {"hellaswag": (-4.6, [cause]), "average": (-0.66, [cause])}
    assert checked(reproduction(), add_bos_token=value) == ([cause], {})


@pytest.mark.parametrize("label", ["acc", "acc_norm"])
def test_acc_in_place_of_acc_norm_is_flagged(label):
    """Also where the value is that of acc, and the label is not."""
    row = reproduction()
    acc = row.results["arc_easy"].metrics["acc"]
    metrics = {"acc": MetricScore(55.25, 1.0), "acc_norm": acc} if label == "acc_norm" else None
    row = moved(row, "arc_easy", score=acc.score, metric=label, **({"metrics": metrics} if metrics else {}))
    departures, deviations = checked(row)
    assert departures == (["arc_easy reports acc, not acc_norm"] if label == "acc" else [])
    other = "acc_norm" if label == "acc" else "acc"
    assert deviations == {
        "arc_easy": (-4.0, [f"{other} of the same row is 55.25, and {label} is reported"]),
        "average": (-0.57, ["another metric, see the tasks"]),
    }


def test_a_metric_with_a_unit_of_its_own_is_no_cause():
    row = reproduction()
    row = moved(row, "arc_easy", score=51.0, metrics={"perplexity": MetricScore(55.25, 1.0)})
    assert checked(row)[1]["arc_easy"] == (-4.25, [])


def test_acc_without_any_acc_norm_is_flagged():
    row = moved(reproduction(), "arc_easy", score=51.0, metric="acc", metrics={})
    assert checked(row)[1]["arc_easy"] == (-4.25, ["arc_easy reports acc, not acc_norm"])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_row_shifted_by_three_standard_errors_is_unexplained(task, sign):
    row = reproduction()
    result = row.results[task]
    departures, deviations = checked(moved(row, task, score=result.score + sign * 3 * result.standard_error))
    assert departures == [] and deviations[task] == (round(sign * 3 * result.standard_error, 2), [])


def test_a_truncated_split_is_flagged():
    """It explains what chance does to a score of 1,000 of 10,042 items: three deviations are 4.9 points."""
    row = moved(reproduction(), "hellaswag", score=59.20 + 4, items=1000)
    cause = "hellaswag has 1000 items, not 10042"
    assert checked(row)[0] == [cause]
    assert checked(row)[1] == {"hellaswag": (4.0, [cause]), "average": (0.57, [cause])}
    assert checked(moved(row, "hellaswag", score=59.20 + 6))[1]["hellaswag"] == (6.0, [])
    assert checked(moved(row, "hellaswag", score=59.20)) == ([cause], {})


def test_another_dtype_explains_small_deviations_only():
    cause = "dtype is bfloat16, not float32"
    row = moved(moved(reproduction(), "openbookqa", score=37.4), "boolq", score=57.83 + 4)
    departures, deviations = checked(row, dtype="bfloat16")
    assert departures == [cause]
    assert deviations["openbookqa"] == (1.4, [cause]) and deviations["boolq"] == (4.0, [])


def simulated_subset(random, shift: float, items: int) -> TaskRow:
    """Scores of the published model on some items per task, moved by a number of standard errors."""
    row = reproduction()
    results = {}
    for task, result in row.results.items():
        share = result.score / 100
        error = 100 * math.sqrt(share * (1 - share) / items)
        score = 100 * random.binomial(items, share) / items + shift * error
        results[task] = dataclasses.replace(result, score=score, items=items, metrics={})
    average = math.fsum(result.score for result in results.values()) / len(results)
    return dataclasses.replace(row, results=results, average=average)


@pytest.mark.parametrize("items", [100, 400])
def test_departures_explain_together_what_chance_does_and_no_more(items):
    """1,000 simulations with `--limit`: seven numbers of items, and another dtype, change the average together."""
    random, published = np.random.default_rng(0), published_row("step-1431k-3T")
    protocol, unexplained = dataclasses.replace(PROTOCOL, dtype="bfloat16"), {0: [], 3: []}
    for shift, found in unexplained.items():
        for _ in range(1000):
            check = check_against_published(simulated_subset(random, shift, items), protocol, published)
            found.append([deviation.task for deviation in check.deviations if not deviation.causes])
    assert sum(map(bool, unexplained[0])) <= 50, "the published model, in any task or in the average"
    assert sum("average" in tasks for tasks in unexplained[3]) >= 950, "every task three standard errors better"


def test_causes_that_are_needed_together_are_one():
    """Two tasks of 100 items reach 15 and 14 points of a task, 2.1 points of the average each, and 2.9 together."""
    row = reproduction()
    for task in ("boolq", "piqa"):
        row = moved(row, task, score=row.results[task].score + 9, items=100)
    both = ["boolq has 100 items, not 3270", "piqa has 100 items, not 1838"]
    departures, deviations = checked(row)
    assert departures == both and deviations["average"][1] == [" and ".join(both)]
    assert deviations["boolq"][1] == both[:1] and deviations["piqa"][1] == both[1:]


@pytest.mark.parametrize(
    ("changes", "protocol", "cause"),
    [
        ({"quantization": "nf4"}, {}, "the weights were quantized to nf4"),
        ({"adapter": "me/lora"}, {}, "the adapter me/lora was loaded"),
        ({"cut_requests": 3}, {}, "3 requests were truncated to the context"),
        ({}, {"num_fewshot": 5}, "num_fewshot is 5, not 0"),
        ({}, {"apply_chat_template": True}, "apply_chat_template is True, not False"),
    ],
)
def test_other_departures(changes, protocol, cause):
    row = moved(reproduction(**changes), "piqa", score=60.0)
    departures, deviations = checked(row, **protocol)
    assert departures == [cause] and deviations["piqa"] == (-13.29, [cause])
    assert checked(reproduction(), num_fewshot=dict.fromkeys(TASKS, 0)) == ([], {})


def test_a_published_row_is_compared_by_standard_errors(tmp_path):
    path = tmp_path / "mine.json"
    row = moved(reproduction(), "boolq", score=57.83 + 6)
    write_scores(path, TaskScoreFile(protocol=PROTOCOL, models=[row]))
    (found,) = compared("step-1431k-3T", path)
    boolq = next(task for task in found.tasks if task.task == "boolq")
    shares = (0.5783, 0.6383)
    errors = [100 * math.sqrt(share * (1 - share) / 3269) for share in (shares[0], shares[0])]
    assert boolq.test == "unpaired" and boolq.verdict == "better"
    assert boolq.standard_error == pytest.approx(math.hypot(*errors), rel=1e-9)
    assert found.published.deviations[0].causes == []
    done = run_here("tinyllama-hf", "compare", "step-1431k-3T", "mine.json", cwd=tmp_path)
    assert "as a reproduction of step-1431k-3T: boolq deviates by +6.00 points, UNEXPLAINED" in done.stdout
    (reverse,) = compared(path, "step-1431k-3T")
    assert reverse.published == found.published and reverse.tasks[0].difference == -found.tasks[0].difference
