"""The command `compare`: exit status, outputs, and bad input."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from tests.conftest import limited_files, run_here
from tests.evaluation.simulated_scores import PROTOCOL, simulate, write
from tinyllama_hf.evaluation.comparison.compared_models import find_compared_models
from tinyllama_hf.evaluation.comparison.score_comparison import compare_models
from tinyllama_hf.evaluation.protocol import TASKS
from tinyllama_hf.evaluation.scored_items import read_scored_items, write_scored_items


@pytest.fixture
def files(tmp_path) -> Path:
    """A folder with a model, a better one, a worse one and an equal one."""
    for name, ability, seed in (("a", 0.0, 1), ("better", 0.9, 2), ("worse", -0.9, 3), ("equal", 0.0, 4)):
        write(tmp_path / f"{name}.json", {name: simulate(ability, seed)})
    return tmp_path


def run(folder, *words):
    done = run_here("tinyllama-hf", "compare", *words, cwd=folder)
    return done.returncode, done.stdout, done.stderr


def test_exit_status(files):
    assert run(files, "a.json", "better.json", "--fail-on-regression")[0] == 0
    assert run(files, "a.json", "worse.json")[0] == 0
    status, output, _ = run(files, "a.json", "better.json", "worse.json", "--fail-on-regression")
    assert status == 1
    assert output.splitlines()[-1] == f"regression: worse in {', '.join(TASKS)}, average"


def test_the_outputs(files):
    status, output, _ = run(
        files,
        "a.json",
        "better.json",
        "equal.json",
        "--markdown",
        "new/c.md",
        "--json",
        "c.json",
        "--resamples",
        "2000",
    )
    assert status == 0 and output.endswith("wrote new/c.md\nwrote c.json\n")
    lines = output.splitlines()
    assert lines[:2] == ["A  a", "B  better"] and lines[2].split()[:3] == ["task", "metric", "pairs"]
    assert lines[3].split()[:3] == ["hellaswag", "acc_norm", "400"] and lines[3].endswith("better")
    assert "2,000 resamples, seed 0" in output and "no difference shown (could show " in output
    written = json.loads((files / "c.json").read_text())
    expected = compare_models(
        find_compared_models([str(files / f"{n}.json") for n in ("a", "better")]), resamples=2000
    )
    assert [c["model"] for c in written["comparisons"]] == ["better", "equal"] and written["resamples"] == 2000
    assert written["comparisons"][0]["tasks"] == json.loads(
        json.dumps(list(map(dataclasses.asdict, expected[0].tasks)))
    )
    assert written["comparisons"][0]["regressions"] == []
    tables_written = [line for line in (files / "new" / "c.md").read_text().splitlines() if line.startswith("|")]
    assert len(tables_written) == 2 * (2 + 8) and {line.count("|") for line in tables_written} == {12}
    assert tables_written[2].split(" | ")[1:3] == ["acc\\_norm", "400"]


@pytest.mark.parametrize(
    "command", [("compare", "a.json", "worse.json", "--fail-on-regression"), ("select", "a.json")]
)
def test_an_output_that_cannot_be_written(files, command):
    """Status 2, since 1 is a regression. What is known before is checked before."""
    write(files / "a.json", {name: simulate(0.0, seed) for name, seed in (("a", 1), ("b", 2))})

    def run_with(output):
        done = run_here("tinyllama-hf", *command, "--json", output, cwd=files)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        return done.stdout, done.stderr

    for output, message in (
        (
            "worse.json/x.json",
            f"error: --json worse.json/x.json: {files}/worse.json is a file. Name a file in a folder",
        ),
        (".", "error: --json . is a folder. Name a file"),
    ):
        printed, error = run_with(output)
        assert printed == "" and error == f"{message}\n"
    before = set(files.rglob("*"))
    assert run_with("/proc/x.json")[1].startswith("error: /proc/x.json: No such file or directory. Check the name")
    with limited_files(100):
        assert run_with("full.json")[1].startswith("error: full.json: File too large. Check")
    assert set(files.rglob("*")) == before


def test_a_folder_without_permission(files, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write to any folder
    status, output, error = run(files, "a.json", "worse.json", "--markdown", "new/c.md")
    assert (status, output) == (2, "") and error.startswith(
        f"error: --markdown new/c.md: {files} cannot be written to"
    )


def without_items(path: Path) -> dict:
    """The contents of a score file, as if its models had been scored without items."""
    contents = json.loads(path.read_text())
    for row in contents["models"]:
        del row["items_file"]
    return contents


@pytest.mark.parametrize("error", [0.0, math.nan, math.inf])
def test_a_standard_error_of_zero_is_an_unknown_one(files, error):
    """Files of early versions have it where all or no items are right."""
    for name in ("a", "better"):
        contents = without_items(files / f"{name}.json")
        contents["models"][0]["results"]["boolq"]["standard_error"] = error
        (files / f"{name}.json").write_text(json.dumps(contents))
    status, _, message = run(files, "a.json", "better.json", "--json", "out.json")
    assert (status, message) == (0, "")
    tasks = json.loads((files / "out.json").read_text())["comparisons"][0]["tasks"]
    verdicts = {task["task"]: (task["standard_error"] is None, task["verdict"]) for task in tasks}
    assert verdicts.pop("boolq") == (True, "not tested") and set(verdicts.values()) == {(False, "better")}


BAD = {
    "step-1431k-3 a.json": "did you mean 'step-1431k-3T'?",
    "step-1431k-3T.json a.json": "step-1431k-3T.json: file not found",
    "chat-v1.0 a.json": "'chat-v1.0' has no published scores. Use one of step-50k-105b",
    "a.json scores.json": "scores.json: is not a file of commonsense scores",
    "a.json void.json": "void.json: damaged, not valid JSON",
    "a.json none.json": "none.json: has no models",
    "a.json folder": "folder: has no commonsense.json",
    "a.json": "has one model, and a comparison needs two",
    "a.json a.json": "a is given twice",
    "step-1431k-3T step-1431k-3T": "step-1431k-3T is given twice",
    "a.json series.json:step-9": "series.json: has no model 'step-9'; did you mean 'step-",
    "a.json better.json --resamples 10": "--resamples 10: must be from 1,000 to 1,000,000",
    "a.json better.json --seed -1": "--seed -1: ",
    "a.json better.json --json folder": "--json folder is a folder",
    "a.json better.json --json x --markdown x": "--json x is also the --markdown file",
    "a.json step-1431k-3T --metric acc": "--metric acc: step-1431k-3T has only the published metric",
    "sample.json step-1431k-3T": "sample has scores of made-up items",
    "a.json moved.json": "moved.items/0000000000better.jsonl.gz is missing",
    "a.json fewer.json": "it has 179 items of piqa, but the score is over 180",
    "a.json other.json": "the mean of acc_norm on hellaswag is ",
    "a.json lacking.json": "item 3 of boolq has acc nan",
    "a.json torn.json": "torn.items/000000000000torn.jsonl.gz: damaged",
    "a.json nan.json": "nan.json: acc_norm of piqa is nan for better. A comparison needs finite scores",
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "folder").mkdir()
    (folder / "void.json").touch()
    (folder / "scores.json").write_text('{"task": "bits_per_byte", "data": [], "models": []}')
    write(folder / "a.json", {"a": simulate(0.0, 1)})
    write(folder / "better.json", {"better": simulate(0.9, 2)})
    write(folder / "none.json", {})
    write(folder / "series.json", {f"step-{i}": simulate(0.4 * i, 5 + i) for i in range(2)})
    write(folder / "sample.json", {"sample": simulate(0.0, 1)}, dataclasses.replace(PROTOCOL, sample=True))
    (folder / "moved.json").write_text((folder / "better.json").read_text().replace("better.items", "moved.items"))
    contents = without_items(folder / "better.json")
    contents["models"][0]["results"]["piqa"]["score"] = math.nan
    (folder / "nan.json").write_text(json.dumps(contents))
    items = simulate(0.9, 2)
    for name, damaged in {
        "fewer": [item for item in items if item.doc != "piqa-9"],
        "other": simulate(-0.9, 7),
        "lacking": [dataclasses.replace(i, metrics={"acc": math.nan}) if i.doc == "boolq-3" else i for i in items],
    }.items():
        path = write(folder / f"{name}.json", {name: items})
        row = find_compared_models([str(path), str(folder / "a.json")])[0].row
        assert read_scored_items(path, row) == items
        write_scored_items(folder / row.items_file, damaged)
    write(folder / "torn.json", {"torn": items})
    torn = folder / "torn.items" / "000000000000torn.jsonl.gz"
    torn.write_bytes(torn.read_bytes()[:-100])
    return folder


@pytest.mark.parametrize(("words", "message"), BAD.items())
def test_bad_input(bad_files, words, message):
    before = set(bad_files.rglob("*"))
    status, output, error = run(bad_files, *words.split())
    assert status == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1
    assert output == "" and set(bad_files.rglob("*")) == before


def test_a_name_that_is_given_twice_in_a_file_needs_its_path(files):
    path = write(files / "two.json", {"m": simulate(0.0, 1), "n": simulate(0.5, 2)})
    contents = json.loads(path.read_text())
    contents["models"][1]["name"] = "m"
    path.write_text(json.dumps(contents))
    status, _, error = run(files, "a.json", "two.json:m")
    assert status == 2 and "has 2 models 'm'. Use the path: two.json:models/m, two.json:models/n" in error
    assert run(files, "a.json", "two.json:models/n")[0] == 0
