"""`eval tasks` that is interrupted or killed resumes with the task that it was in, and ends with the same files."""

import json
import signal
import sys

import pytest

from tests.evaluation.test_commonsense import save
from tinyllama_hf.errors import InputError
from tinyllama_hf.evaluation import commonsense
from tinyllama_hf.evaluation.commonsense import score_commonsense
from tinyllama_hf.evaluation.partial_scores import PartialScores
from tinyllama_hf.evaluation.protocol import TASKS


# Prints each task as it starts, and sends a signal to itself at the start of one.
COMMAND = """
import os, sys
from tinyllama_hf.evaluation import commonsense
from tinyllama_hf_cli import main

number, last, run_task, started = int(sys.argv.pop(1)), int(sys.argv.pop(1)), commonsense.run_task, []

def run(model, name, *arguments):
    started.append(name)
    print("started", name, file=sys.stderr, flush=True)
    if len(started) == last:
        os.kill(os.getpid(), number)
    return run_task(model, name, *arguments)

commonsense.run_task = run
main()
"""


@pytest.fixture(scope="module")
def models(tokenizer_folder, tmp_path_factory):
    """Two random models."""
    return [save(tmp_path_factory.mktemp("models") / f"model-{seed}", tokenizer_folder, seed) for seed in (1, 2)]


@pytest.fixture
def command(run_command, models, tmp_path):
    """Runs `eval tasks` on both models; it gets `number` as a signal when its task `last` starts."""

    def run(number: int = 0, last: int = 0, output: str = "out.json"):
        arguments = (*models, "--data", "embedded:sample", "--output", output, "--samples", f"{output}.items.jsonl")
        return run_command(
            sys.executable, "-c", COMMAND, number, last, "eval", "tasks", *map(str, arguments), cwd=tmp_path
        )

    return run


def started(done) -> list[str]:
    return [line.split()[1] for line in done.stderr.splitlines() if line.startswith("started ")]


def rows_of(path) -> list[dict]:
    """The rows of a score file, without times."""
    rows = json.loads(path.read_text())["models"]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.slow
def test_an_interrupted_evaluation_resumes_with_the_task_it_was_in(command, tmp_path):
    """Interrupted in the third task of the first model, killed in the third task of the second one."""
    assert started(command(output="whole.json")) == [*TASKS, *TASKS]
    first = command(signal.SIGINT, 3)
    assert first.returncode == 130 and started(first) == list(TASKS[:3]) and "Traceback" not in first.stderr
    message = first.stderr.splitlines()[-1]
    assert message.startswith("interrupted; out.partial.jsonl") and message.endswith("Run the same command to resume")
    assert "hellaswag, openbookqa of model-1" in message and not (tmp_path / "out.json").exists()
    second = command(signal.SIGKILL, 8)
    assert second.returncode == -signal.SIGKILL and started(second) == [*TASKS[2:], *TASKS[:3]]
    assert [row["name"] for row in rows_of(tmp_path / "out.json")] == ["model-1"]
    third = command()
    assert third.returncode == 0 and started(third) == list(TASKS[2:]), third.stderr
    assert "model-2: hellaswag, openbookqa: finished before the interruption" in third.stdout
    assert rows_of(tmp_path / "out.json") == rows_of(tmp_path / "whole.json")
    items = [tmp_path / f"{name}.json.items.jsonl" for name in ("out", "whole")]
    assert items[0].read_bytes() == items[1].read_bytes() and len(items[0].read_text().splitlines()) == 140
    assert not list(tmp_path.glob("*partial*"))


@pytest.fixture
def tasks_run(monkeypatch):
    """Names of the tasks that are scored; at the third one an interruption is raised once."""
    names, run_task = [], commonsense.run_task

    def run(model, name, *arguments):
        names.append(name)
        if len(names) == 3:
            raise KeyboardInterrupt
        return run_task(model, name, *arguments)

    monkeypatch.setattr(commonsense, "run_task", run)
    return names


@pytest.fixture
def interrupted(models, tasks_run, tmp_path):
    """The score file of an evaluation of the first model that has finished two tasks."""
    with pytest.raises(KeyboardInterrupt):
        score_commonsense([str(models[0])], "embedded:sample", output=tmp_path / "out.json")
    assert [json.loads(line)["task"] for line in (tmp_path / "out.partial.jsonl").open()] == list(TASKS[:2])
    tasks_run.append("interruption")
    return tmp_path / "out.json"


@pytest.mark.parametrize("difference", ["limit", "model", "quantization"])
def test_finished_tasks_are_not_used_for_other_scores(interrupted, models, tasks_run, tmp_path, difference):
    """Those of other models are kept until they are complete."""
    folder, options = models[0], {"data": "embedded:sample", "output": interrupted}
    if difference == "limit":
        options["limit"] = 3
    elif difference == "quantization":
        pytest.importorskip("bitsandbytes")
        options["quantization"] = "nf4"
    else:
        folder = models[1]
    score_commonsense([str(folder)], **options)
    assert tasks_run[4:] == list(TASKS)
    assert (tmp_path / "out.partial.jsonl").exists() == (difference != "limit")
    if difference == "model":
        score_commonsense([str(models[0])], **options)
        assert tasks_run[11:] == list(TASKS[2:]) and not (tmp_path / "out.partial.jsonl").exists()


@pytest.mark.parametrize("text", ["not JSON\n", '{"task": "piqa"}\n', "[]\n"])
def test_a_damaged_file_of_finished_tasks(tmp_path, text):
    (tmp_path / "out.partial.jsonl").write_text(text)
    with pytest.raises(InputError, match=r"out\.partial\.jsonl: damaged\..* remove it"):
        PartialScores(tmp_path / "out.json")
