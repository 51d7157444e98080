"""Our `evaluate` modules: values computed by hand, refusals, and loading by path without a Hub."""

import math
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tinyllama_hf.errors import InputError
from tinyllama_hf.evaluation.protocol import TASKS
from tinyllama_hf.evaluation.score_metrics import load_metric
from tinyllama_hf.released import tables


def test_commonsense_average():
    scores, errors = [43.50, 29.80, 53.28, 24.32, 44.91, 59.66, 67.30], [0.5, 2.0, 1.4, 1.3, 1.0, 0.9, 1.1]
    found = load_metric("commonsense_average").compute(
        predictions=scores, references=list(TASKS), standard_errors=errors
    )
    assert found["average"] == pytest.approx(322.77 / 7, abs=1e-12)
    squares = 0.25 + 4 + 1.96 + 1.69 + 1 + 0.81 + 1.21
    assert found["standard_error"] == pytest.approx(math.sqrt(squares) / 7, abs=1e-12)
    without = load_metric("commonsense_average").compute(predictions=scores[::-1], references=list(TASKS)[::-1])
    assert without == {"average": pytest.approx(322.77 / 7), "standard_error": None}


def test_the_average_of_the_published_rows():
    """Each row's printed average is the mean of its own scores, but for the one that released.yaml marks."""
    metric = load_metric("commonsense_average")
    for section in ("base", "chat"):
        for row in tables()[section]["rows"]:
            if "scores" in row and row["name"] != "step-1431k-3T":
                average = metric.compute(predictions=row["scores"], references=tables()[section]["columns"])["average"]
                assert average == pytest.approx(row["printed_average"], abs=0.0051), row["name"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"predictions": [1.0] * 6, "references": TASKS[:6]}, "needs each of"),
        ({"predictions": [1.0] * 8, "references": [*TASKS, "piqa"]}, "needs each of"),
        ({"predictions": [1.0] * 7, "references": [*TASKS[:6], "mmlu"]}, "needs each of"),
        ({"predictions": [1.0] * 6 + [math.nan], "references": TASKS}, "not a number"),
        ({"predictions": [1.0] * 7, "references": TASKS, "standard_errors": [1.0]}, "1 standard errors for 7 scores"),
    ],
)
def test_commonsense_average_refuses_what_is_not_the_seven_tasks(given, message):
    metric = load_metric("commonsense_average")
    with pytest.raises(ValueError, match=message):
        metric.compute(**given)
    assert metric.compute(predictions=[1.0] * 7, references=TASKS)["average"] == 1, "it works again after a refusal"


def test_bits_per_byte():
    """Three bits for two bytes, five for three characters of six bytes: eight bits for eight bytes."""
    metric = load_metric("bits_per_byte")
    nats = [3 * math.log(2), 5 * math.log(2)]
    assert metric.compute(predictions=nats, references=["ab", "äöü"]) == {"bits_per_byte": pytest.approx(1.0)}
    with pytest.raises(ValueError, match="hold no text"):
        metric.compute(predictions=[0.0], references=[""])


def test_stop_rate():
    metric = load_metric("stop_rate")
    replies = [[5, 6, 7, 2], [2], [2, 5], [], [8, 9, 2]]
    found = metric.compute(predictions=replies, eos_token_id=2)
    assert found == {"stop_rate": pytest.approx(3 / 5), "median_length": 2.0}, "lengths 3, 0, 2, 0, 2"
    lengths_3_2_1 = metric.compute(predictions=[[5, 6, 7, 2], [8, 9, 2], [4, 2]], eos_token_id=2)
    assert lengths_3_2_1 == {"stop_rate": 1.0, "median_length": 2.0}, "a stop token at the end is not counted"
    assert metric.compute(predictions=[[1, 2, 3]], eos_token_id=4) == {"stop_rate": 0.0, "median_length": 3.0}
    with pytest.raises(ValueError, match="got no reply"):
        metric.compute(predictions=[], eos_token_id=2)


def test_unknown_metric():
    with pytest.raises(InputError, match="did you mean 'stop_rate'"):
        load_metric("stop_rat")


OFFLINE = """
import socket, sys
def refuse(*_, **__): raise OSError("no network in this test")
socket.socket.connect = socket.getaddrinfo = refuse
sys.modules["tinyllama_hf"] = None
import evaluate
folder = sys.argv[1]
print(evaluate.load(f"{folder}/stop_rate").compute(predictions=[[1, 2], [3]], eos_token_id=2)["stop_rate"])
print(evaluate.load(f"{folder}/bits_per_byte/bits_per_byte.py").compute(predictions=[0.0], references=["a"]))
tasks = "hellaswag openbookqa winogrande arc_challenge arc_easy boolq piqa".split()
print(evaluate.load(f"{folder}/commonsense_average").compute(predictions=[50.0] * 7, references=tasks)["average"])
"""


def test_each_is_usable_alone_without_network_and_without_this_package(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(ROOT / "eval" / "metrics")], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.split("\n")[:3] == ["0.5", "{'bits_per_byte': 0.0}", "50.0"], done.stderr
