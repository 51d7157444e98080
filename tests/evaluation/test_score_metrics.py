"""The summary metrics: values computed by hand, errors, and the `evaluate` modules, loaded without a Hub."""

import math
import socket

import pytest

from tests.conftest import ROOT
from tinyllama_hf.errors import InputError
from tinyllama_hf.evaluation.harness import harness_results
from tinyllama_hf.evaluation.protocol import TASKS
from tinyllama_hf.evaluation.score_files import MetricScore
from tinyllama_hf.evaluation.score_metrics import (
    average_standard_error,
    bits_per_byte,
    commonsense_average,
    is_share,
    lower_is_better,
    median_length,
    metric_scale,
    metric_unit,
    stop_rate,
)
from tinyllama_hf.released import tables


@pytest.mark.parametrize(
    ("metric", "unit", "share"),
    [
        ("acc_norm", "points", True),
        ("exact_match,strict-match", "points", True),
        ("pass@1,create_test", "points", True),
        ("f1", "points", False),
        ("mcc", "points", False),
        ("prompt_level_strict_acc", "", False),
        ("pass@64,create_test", "", False),
        ("bleu", "", False),
        ("bits_per_byte", "bits", False),
    ],
)
def test_the_unit_of_a_metric_is_that_of_score_files(metric, unit, share):
    """The scale is part of the format of score files: another one would make those of other versions incomparable."""
    scale = 100 if unit == "points" else 1
    assert (metric_unit(metric), metric_scale(metric), is_share(metric)) == (unit, scale, share)
    name, _, selection = metric.partition(",")
    values = {f"{name},{selection or 'none'}": 0.25, f"{name}_stderr,{selection or 'none'}": 0.125}
    assert harness_results._metrics(values) == {metric: MetricScore(scale * 0.25, scale * 0.125)}


def test_the_direction_of_a_metric_is_that_of_lm_eval():
    import lm_eval.api.metrics  # noqa: F401 - registers them
    from lm_eval.api.registry import higher_is_better_registry as higher

    assert {"brier_score", "acc"} <= set(higher)
    assert [name for name in higher if lower_is_better(name) == higher.get(name)] == []
    assert lower_is_better("perplexity,filtered")


def test_commonsense_average():
    scores, errors = [43.50, 29.80, 53.28, 24.32, 44.91, 59.66, 67.30], [0.5, 2.0, 1.4, 1.3, 1.0, 0.9, 1.1]
    assert commonsense_average(scores, TASKS) == pytest.approx(322.77 / 7, abs=1e-12)
    assert commonsense_average(scores[::-1], TASKS[::-1]) == pytest.approx(322.77 / 7)
    squares = 0.25 + 4 + 1.96 + 1.69 + 1 + 0.81 + 1.21
    assert average_standard_error(errors) == pytest.approx(math.sqrt(squares) / 7, abs=1e-12)


def test_the_average_of_the_published_rows():
    """The printed average of each row is the mean of its scores, except for the row noted in released.yaml."""
    for section in ("base", "chat"):
        for row in tables()[section]["rows"]:
            if "scores" in row and row["name"] != "step-1431k-3T":
                average = commonsense_average(row["scores"], tables()[section]["columns"])
                assert average == pytest.approx(row["printed_average"], abs=0.0051), row["name"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([1.0] * 6, TASKS[:6]), "needs each of"),
        (([1.0] * 8, [*TASKS, "piqa"]), "needs each of"),
        (([1.0] * 7, [*TASKS[:6], "mmlu"]), "needs each of"),
        (([1.0] * 6 + [math.nan], TASKS), "one of the scores is not finite"),
        (([1.0] * 6, TASKS), "got 6 scores for 7 tasks"),
    ],
)
def test_commonsense_average_refuses_what_is_not_the_seven_tasks(given, message):
    with pytest.raises(InputError, match=message):
        commonsense_average(*given)


def test_standard_errors_that_do_not_fit_the_tasks():
    with pytest.raises(InputError, match="got 1 standard errors for 7 tasks"):
        average_standard_error([1.0])
    with pytest.raises(InputError, match="one of the standard errors is not finite"):
        average_standard_error([1.0] * 6 + [math.inf])


def test_bits_per_byte():
    """Three bits for 2 bytes and five for 6 bytes (three characters): 8 bits for 8 bytes."""
    nats = [3 * math.log(2), 5 * math.log(2)]
    assert bits_per_byte(nats, ["ab", "äöü"]) == pytest.approx(1.0)
    with pytest.raises(InputError, match="bits_per_byte: the references are empty"):
        bits_per_byte([0.0], [""])


def test_stop_rate():
    replies = [[5, 6, 7, 2], [2], [2, 5], [], [8, 9, 2]]
    assert stop_rate(replies, 2) == pytest.approx(3 / 5)
    assert median_length(replies, 2) == 2.0, "lengths 3, 0, 2, 0, 2"
    stopped = [[5, 6, 7, 2], [8, 9, 2], [4, 2]]
    assert stop_rate(stopped, 2) == 1.0
    assert median_length(stopped, 2) == 2.0, "a stop token at the end is not counted"
    assert stop_rate([[1, 2, 3]], 4) == 0.0 and median_length([[1, 2, 3]], 4) == 3.0
    with pytest.raises(InputError, match="stop_rate: got 0 replies"):
        stop_rate([], 2)


def test_evaluate_loads_them_by_path_without_network(monkeypatch):
    """Their results are those of our functions, also after an error."""
    import evaluate

    def refuse(*_, **__):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    folder = ROOT / "eval" / "metrics"
    rate = evaluate.load(str(folder / "stop_rate"))
    expected = {"stop_rate": stop_rate([[1, 2], [3]], 2), "median_length": 1.0}
    assert rate.compute(predictions=[[1, 2], [3]], eos_token_id=2) == expected
    bits = evaluate.load(str(folder / "bits_per_byte" / "bits_per_byte.py"))
    expected = {"bits_per_byte": bits_per_byte([9.5, 3.0], ["a", "äö"])}
    assert bits.compute(predictions=[9.5, 3.0], references=["a", "äö"]) == expected
    average, scores = evaluate.load(str(folder / "commonsense_average")), [50.0] * 6 + [29.0]
    expected = {"average": commonsense_average(scores, TASKS), "standard_error": average_standard_error([1.0] * 7)}
    assert average.compute(predictions=scores, references=TASKS, standard_errors=[1.0] * 7) == expected
    with pytest.raises(ValueError, match="commonsense_average: got the tasks hellaswag"):
        average.compute(predictions=[50.0] * 6, references=TASKS[:6])
    assert average.compute(predictions=[50.0] * 7, references=TASKS)["average"] == 50.0
