"""`eval tasks` that is interrupted or killed repeats no request, and ends with the same files."""

import json
import signal
import sys

import pytest

from tests.evaluation.test_commonsense import save
from tinyllama_hf.errors import InputError
from tinyllama_hf.evaluation import task_scores
from tinyllama_hf.evaluation.harness import prefix_tree
from tinyllama_hf.evaluation.harness.kept_answers import KeptAnswers, count_kept, open_answers
from tinyllama_hf.evaluation.task_scores import score_tasks


# Small forward passes; prints the number of requests that each answers, and sends a signal to itself before one.
COMMAND = """
import os, sys
from tinyllama_hf.evaluation.harness import prefix_tree
from tinyllama_hf.evaluation.harness.kept_answers import KeptAnswers
from tinyllama_hf_cli import main

number, last, add, passes = int(sys.argv.pop(1)), int(sys.argv.pop(1)), KeptAnswers.add, []
prefix_tree.TOKENS_PER_PASS["cpu"] = 1024

def add_and_print(self, answers):
    passes.append(len(answers))
    if len(passes) == last:
        os.kill(os.getpid(), number)
    print("answered", self.model, len(answers), file=sys.stderr, flush=True)
    add(self, answers)

KeptAnswers.add = add_and_print
main()
"""


@pytest.fixture(scope="module")
def models(tokenizer_folder, tmp_path_factory):
    """Two random models."""
    return [save(tmp_path_factory.mktemp("models") / f"model-{seed}", tokenizer_folder, seed) for seed in (1, 2)]


@pytest.fixture
def command(run_command, models, tmp_path):
    """Runs `eval tasks` on both models; it gets `number` as a signal before the answers of forward pass `last`."""

    def run(number: int = 0, last: int = 0, output: str = "out.json"):
        arguments = (*models, "--data", "embedded:sample", "--output", output, "--samples", f"{output}.items.jsonl")
        return run_command(
            sys.executable, "-c", COMMAND, number, last, "eval", "tasks", *map(str, arguments), cwd=tmp_path
        )

    return run


def answered(done) -> list[int]:
    return [int(line.split()[2]) for line in done.stderr.splitlines() if line.startswith("answered ")]


def rows_of(path) -> list[dict]:
    """The rows of a score file, without times."""
    rows = json.loads(path.read_text())["models"]
    return [{k: v for k, v in row.items() if k not in ("seconds", "items_file")} for row in rows]


@pytest.mark.slow
def test_an_interrupted_evaluation_repeats_no_request(command, tmp_path):
    """Interrupted in the first model, killed in the second one."""
    whole = answered(command(output="whole.json"))
    passes, total = len(whole) // 2, sum(whole)
    assert passes >= 4
    first = command(signal.SIGINT, 3)
    assert first.returncode == 130 and "Traceback" not in first.stderr
    message = first.stderr.splitlines()[-1]
    kept = sum(answered(first))
    assert message == f"interrupted; out.partial.jsonl has {kept} answers. Run the same command to resume"
    assert kept == sum(whole[:2]) and not (tmp_path / "out.json").exists()
    second = command(signal.SIGKILL, passes)  # two passes of the first model were answered before
    assert second.returncode == -signal.SIGKILL
    assert f"model-1: {kept} requests were answered before the interruption" in second.stdout
    assert [row["name"] for row in rows_of(tmp_path / "out.json")] == ["model-1"]
    with (tmp_path / "out.partial.jsonl").open("a") as partial:
        partial.write('{"model": "interru')  # in the middle of a line
    third = command()
    assert third.returncode == 0, third.stderr
    assert sum(answered(first)) + sum(answered(second)) + sum(answered(third)) == total
    rows = [rows_of(tmp_path / f"{name}.json") for name in ("out", "whole")]
    for ours, theirs in zip(*rows, strict=True):
        for result, other in zip(ours["results"].values(), theirs["results"].values(), strict=True):
            bits = result["metrics"].pop("bits_per_byte"), other["metrics"].pop("bits_per_byte")
            assert bits[0] == pytest.approx(bits[1], abs=1e-4)  # the shape of a batch changes the rounding
        assert ours == theirs
    items = [tmp_path / f"{name}.json.items.jsonl" for name in ("out", "whole")]
    for ours, theirs in zip(*(map(json.loads, path.open()) for path in items), strict=True):
        likelihoods = ours.pop("log_likelihoods"), theirs.pop("log_likelihoods")
        assert likelihoods[0] == pytest.approx(likelihoods[1], abs=1e-4)
        bits = ours["metrics"].pop("bits_per_byte"), theirs["metrics"].pop("bits_per_byte")
        assert bits[0] == pytest.approx(bits[1], abs=1e-4) and ours == theirs
    assert not list(tmp_path.glob("*partial*"))


@pytest.fixture
def interrupted(models, monkeypatch, tmp_path):
    """The score file of an evaluation of the first model that was interrupted in its second forward pass."""
    calls, add = [], KeptAnswers.add

    def count(self, answers):
        calls.append(len(answers))
        if len(calls) == 2:
            raise KeyboardInterrupt
        add(self, answers)

    monkeypatch.setitem(prefix_tree.TOKENS_PER_PASS, "cpu", 1024)
    monkeypatch.setattr(KeptAnswers, "add", count)
    with pytest.raises(KeyboardInterrupt):
        score_tasks([str(models[0])], "embedded:sample", limit=4, output=tmp_path / "out.json")
    assert count_kept(tmp_path / "out.json") == calls[0]
    calls.append(0)
    return tmp_path / "out.json", calls


@pytest.mark.parametrize("difference", ["none", "model", "quantization"])
def test_answers_are_not_used_for_another_model(interrupted, models, difference):
    """Those of other models are kept until they are complete."""
    output, calls = interrupted
    options = {"data": "embedded:sample", "limit": 4, "output": output}
    if difference == "quantization":
        pytest.importorskip("bitsandbytes")
    folder, quantization = models[difference == "model"], "nf4" if difference == "quantization" else "none"
    score_tasks([str(folder)], **options, quantization=quantization)
    assert sum(calls[3:]) == 88 - (calls[0] if difference == "none" else 0)
    assert output.with_name("out.partial.jsonl").exists() == (difference != "none")
    if difference == "model":
        del calls[3:]
        score_tasks([str(models[0])], **options)
        assert sum(calls[3:]) == 88 - calls[0] and not output.with_name("out.partial.jsonl").exists()


@pytest.mark.parametrize(
    "text", ["not JSON\n", '{"model": "m"}\n', "[]\n", '{"model": "m", "request": "r", "answer": []}\n']
)
def test_a_damaged_file_of_answers(tmp_path, text):
    (tmp_path / "out.partial.jsonl").write_text(text)
    with (
        pytest.raises(InputError, match=r"out\.partial\.jsonl: damaged\..* remove it"),
        open_answers(tmp_path / "out.json"),
    ):
        pass
    assert (tmp_path / "out.partial.jsonl").read_text() == text


def test_rows_that_are_written_before_the_lock_are_kept(models, monkeypatch, tmp_path):
    output, lock = tmp_path / "out.json", task_scores.open_answers

    def lock_after_another(path):
        monkeypatch.setattr(task_scores, "open_answers", lock)
        score_tasks([str(models[1])], "embedded:sample", limit=2, output=path)
        return lock(path)

    monkeypatch.setattr(task_scores, "open_answers", lock_after_another)
    score_tasks([str(models[0])], "embedded:sample", limit=2, output=output)
    assert [row["name"] for row in rows_of(output)] == ["model-2", "model-1"]


def test_two_evaluations_do_not_write_the_same_file(models, tmp_path):
    with (
        open_answers(tmp_path / "out.json"),
        pytest.raises(InputError, match=r"--output .*out\.json: another process"),
    ):
        score_tasks([str(models[0])], "embedded:sample", output=tmp_path / "out.json")
