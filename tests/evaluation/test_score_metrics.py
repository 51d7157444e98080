"""The summary metrics: values computed by hand, errors, and the `evaluate` modules, loaded without a Hub."""

import math
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tinyllama_hf.errors import InputError
from tinyllama_hf.evaluation.protocol import TASKS
from tinyllama_hf.evaluation.score_metrics import (
    average_standard_error,
    bits_per_byte,
    commonsense_average,
    median_length,
    stop_rate,
)
from tinyllama_hf.released import tables


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


OFFLINE = """
import socket, sys
def refuse(*_, **__): raise OSError("no network in this test")
socket.socket.connect = socket.getaddrinfo = refuse
import evaluate
folder = sys.argv[1]
print(evaluate.load(f"{folder}/stop_rate").compute(predictions=[[1, 2], [3]], eos_token_id=2))
bits = evaluate.load(f"{folder}/bits_per_byte/bits_per_byte.py")
print(bits.compute(predictions=[9.5, 3.0], references=["a", "äö"]))
average = evaluate.load(f"{folder}/commonsense_average")
tasks = "hellaswag openbookqa winogrande arc_challenge arc_easy boolq piqa".split()
print(average.compute(predictions=[50.0] * 6 + [29.0], references=tasks, standard_errors=[1.0] * 7))
try: average.compute(predictions=[50.0] * 6, references=tasks[:6])
except ValueError as error: print(error)
print(average.compute(predictions=[50.0] * 7, references=tasks)["average"])
"""


def test_evaluate_loads_them_by_path_without_network(tmp_path):
    """Their results are those of our functions, also after an error."""
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(ROOT / "eval" / "metrics")], capture_output=True, text=True, cwd=tmp_path
    )
    rate, bits, average, refusal, again = done.stdout.splitlines() or [done.stderr]
    assert rate == str({"stop_rate": stop_rate([[1, 2], [3]], 2), "median_length": 1.0})
    assert bits == str({"bits_per_byte": bits_per_byte([9.5, 3.0], ["a", "äö"])})
    scores, error = [50.0] * 6 + [29.0], average_standard_error([1.0] * 7)
    assert average == str({"average": commonsense_average(scores, TASKS), "standard_error": error})
    assert refusal.startswith("commonsense_average: got the tasks hellaswag") and again == "50.0"
