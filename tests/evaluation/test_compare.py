"""Comparing score files: pairing, verdicts, the published table, and the command. Scores and items are simulated, and
written by the functions that `eval tasks` uses."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from statsmodels.stats.contingency_tables import mcnemar

from tests.conftest import run_here
from tinyllama_hf.errors import InputError
from tinyllama_hf.evaluation.compared_models import find_compared_models
from tinyllama_hf.evaluation.deviations import check_against_published
from tinyllama_hf.evaluation.protocol import TASKS, published_row
from tinyllama_hf.evaluation.score_comparison import compare_models
from tinyllama_hf.evaluation.score_files import (
    MetricScore,
    Protocol,
    TaskRow,
    TaskScore,
    TaskScoreFile,
    write_scores,
)
from tinyllama_hf.evaluation.scored_items import ScoredItem, items_file_name, read_scored_items, write_scored_items
from tinyllama_hf.released import tables


TABLE = tables()["protocol"]
COUNTS = {"hellaswag": 400, "openbookqa": 100, "winogrande": 150, "arc_challenge": 120, "arc_easy": 200,
          "boolq": 250, "piqa": 180}  # fmt: skip
PROTOCOL = Protocol(
    harness="lm-eval 0.4.13",
    task_versions=dict.fromkeys(TASKS, 1.0),
    metrics=TABLE["metric"],
    dtype="float32",
    num_fewshot=0,
    add_bos_token=False,
    apply_chat_template=False,
    context_length=2048,
    limit=None,
    data=dict.fromkeys(TASKS, "f" * 64),
    sample=False,
)


def simulate(ability: float, seed: int, counts=COUNTS) -> list[ScoredItem]:
    """Items of a model. Their difficulty is that of the item, so that two models are right on similar items."""
    shared, own, items = np.random.default_rng(0), np.random.default_rng(seed), []
    for task in TASKS:
        difficulty, noise = shared.normal(0, 1, max(COUNTS.values())), own.normal(0, 0.7, (2, counts[task]))
        for index in range(counts[task]):
            strength = ability + difficulty[index] + noise[:, index]
            metrics = {"acc": float(strength[0] > 0), "acc_norm": float(strength[1] > 0)}
            bits = float(np.exp(-0.3 * strength.mean()))
            doc = f"{task}-{index}"
            items.append(ScoredItem(task=task, index=index, doc=doc, metrics={**metrics, "bits_per_byte": bits}))
    return items


def task_score(task: str, items: list[ScoredItem]) -> TaskScore:
    """The score of a task as lm-eval computes it."""
    own = [item.metrics for item in items if item.task == task]
    metrics = {}
    for name in own[0]:
        values, scale = np.array([m[name] for m in own if name in m]), 1 if name == "bits_per_byte" else 100
        error = scale * values.std(ddof=1) / math.sqrt(len(values))
        metrics[name] = MetricScore(scale * float(values.mean()), float(error) if error else None)
    reported = metrics[TABLE["metric"][task]]
    return TaskScore(TABLE["metric"][task], reported.score, reported.standard_error, len(own), 1.0, metrics)


def write(path: Path, models: dict[str, list[ScoredItem]], protocol: Protocol = PROTOCOL) -> Path:
    """Writes a score file with the items of its models."""
    rows = []
    for name, items in models.items():
        results = {task: task_score(task, items) for task in dict.fromkeys(item.task for item in items)}
        average = math.fsum(r.score for r in results.values()) / len(results)
        row = TaskRow(
            name=name, path=f"models/{name}", fingerprint=f"{name:0>16}", results=results, average=average,
            average_standard_error=None, cut_requests=0, seconds=1.0,
        )  # fmt: skip
        rows.append(dataclasses.replace(row, items_file=items_file_name(path, row)))
        write_scored_items(path.parent / rows[-1].items_file, items)
    write_scores(path, TaskScoreFile(protocol=protocol, models=rows))
    return path


def change(path: Path, **fields) -> None:
    """Changes fields of the first row of a score file."""
    contents = json.loads(path.read_text())
    contents["models"][0] |= fields
    path.write_text(json.dumps(contents))


@pytest.fixture
def files(tmp_path) -> Path:
    """A folder with a model, a better one, a worse one, an equal one and a series of three."""
    write(tmp_path / "a.json", {"a": simulate(0.0, 1)})
    write(tmp_path / "better.json", {"better": simulate(0.9, 2)})
    write(tmp_path / "worse.json", {"worse": simulate(-0.9, 3)})
    write(tmp_path / "equal.json", {"equal": simulate(0.0, 4)})
    write(tmp_path / "series.json", {f"step-{i}": simulate(0.4 * i, 5 + i) for i in range(3)})
    return tmp_path


def compared(*arguments, **options):
    return compare_models(find_compared_models([str(argument) for argument in arguments]), resamples=1000, **options)


def test_pairs_are_tested_as_statsmodels_does(files):
    (found,) = compared(files / "a.json", files / "better.json")
    assert [task.task for task in found.tasks] == list(TASKS)
    for task in found.tasks:
        values = [
            np.array([i.metrics[task.metric] for i in simulate(*model) if i.task == task.task])
            for model in ((0.0, 1), (0.9, 2))
        ]
        cells = [[int(((values[0] == x) & (values[1] == y)).sum()) for y in (1, 0)] for x in (1, 0)]
        assert task.p_value == pytest.approx(mcnemar(cells, exact=True).pvalue, rel=1e-9)
        assert task.scores == pytest.approx([100 * v.mean() for v in values], abs=1e-9)
        assert task.metric == TABLE["metric"][task.task] and task.pairs == COUNTS[task.task]
        assert task.test == "exact McNemar" and task.left_out == (0, 0)
        assert task.interval[0] < task.difference < task.interval[1]
    assert found.remarks == ["1,400 pairs of items; every item has its partner"]
    assert found.average.scores == pytest.approx(np.mean([task.scores for task in found.tasks], axis=0))


@pytest.mark.parametrize(("name", "verdict"), [("better", "better"), ("worse", "worse")])
@pytest.mark.parametrize("metric", [None, "bits_per_byte"])
def test_verdicts(files, name, verdict, metric):
    """Of bits per byte a lower value is better."""
    (found,) = compared(files / "a.json", files / f"{name}.json", metric=metric)
    assert {task.verdict for task in found.differences} == {verdict}
    assert found.regressions == ([*TASKS, "average"] if name == "worse" else [])
    assert (found.average.difference > 0) == ((name == "better") != (metric == "bits_per_byte"))
    assert {task.test for task in found.tasks} == ({"paired t"} if metric else {"exact McNemar"})
    assert {task.unit for task in found.differences} == {"bits" if metric else "points"}


def test_equal_models_show_no_difference(files):
    (found,) = compared(files / "a.json", files / "equal.json")
    assert {task.verdict for task in found.differences} == {"no difference shown"} and found.regressions == []
    assert all(task.detectable > abs(task.difference) for task in found.tasks)
    assert all(task.corrected >= task.p_value for task in found.tasks)


def test_pairs_have_narrower_intervals_than_scores_without_items(files):
    (paired,) = compared(files / "a.json", files / "better.json")
    change(files / "better.json", items_file=None)
    (unpaired,) = compared(files / "a.json", files / "better.json")
    for with_items, without in zip(paired.differences, unpaired.differences, strict=True):
        assert without.test == "unpaired" and without.pairs is None
        assert without.difference == pytest.approx(with_items.difference)
        assert without.standard_error > 1.1 * with_items.standard_error
    assert "no items of better" in unpaired.remarks[0]


def test_another_metric(files):
    (found,) = compared(files / "a.json", files / "better.json", metric="acc")
    assert {task.metric for task in found.tasks} == {"acc"}
    piqa = next(task for task in found.tasks if task.task == "piqa")
    assert piqa.scores[0] == pytest.approx(
        100 * np.mean([i.metrics["acc"] for i in simulate(0.0, 1) if i.task == "piqa"])
    )
    with pytest.raises(InputError, match="no brier in a and better"):
        compared(files / "a.json", files / "better.json", metric="brier")


def test_a_task_that_one_model_lacks_is_named(files):
    some = [item for item in simulate(0.5, 9) if item.task != "boolq"]
    (found,) = compared(files / "a.json", write(files / "some.json", {"some": some}))
    assert "boolq" not in [task.task for task in found.tasks] and found.average is None
    assert found.remarks[0] == "left out: boolq (only a has it)"


def test_items_without_bits_per_byte_are_left_out(files):
    """Of an empty right choice, the score is the mean of the others; accuracy has them all."""
    some = simulate(0.5, 9)
    some = [
        dataclasses.replace(item, metrics={"acc": 1.0, "acc_norm": 1.0}) if item.doc == "piqa-3" else item
        for item in some
    ]
    path = write(files / "some.json", {"some": some})
    (found,) = compared(files / "a.json", path, metric="bits_per_byte")
    assert "left out without a partner (of a and of some): piqa 1 and 0" in found.remarks[0]
    assert "every item has its partner" in compared(files / "a.json", path)[0].remarks[0]


def test_a_score_that_is_not_the_mean_of_its_items_is_unpaired(files):
    for name in ("a", "better"):
        contents = json.loads((files / f"{name}.json").read_text())
        contents["models"][0]["results"]["piqa"]["metrics"]["bits_per_byte"]["score"] += 1.0
        (files / f"{name}.json").write_text(json.dumps(contents))
    (found,) = compared(files / "a.json", files / "better.json", metric="bits_per_byte")
    assert [task.task for task in found.tasks if task.test == "unpaired"] == ["piqa"]
    assert found.remarks[-1] == "unpaired, since the score is not the mean of its items: piqa"
    assert found.average.test == "unpaired"


def test_scores_of_another_protocol_have_their_own_kind(files):
    protocol = dataclasses.replace(PROTOCOL, name="modern")
    for name, ability in (("m", 0.0), ("n", 0.9)):
        path = write(files / f"{name}.json", {name: simulate(ability, 3)}, protocol)
        path.write_text(path.read_text().replace('"task": "commonsense"', '"task": "tasks"'))
    (found,) = compared(files / "m.json", files / "n.json")
    assert len(found.tasks) == 7 and found.average is None


def test_items_are_paired_by_their_hash_and_not_by_their_place(files):
    """Reversed, with one item missing in each and with two equal rows, which are paired in their order."""
    items, other = simulate(0.0, 1), simulate(0.9, 2)
    items = [dataclasses.replace(i, doc="piqa-0") if i.doc == "piqa-1" else i for i in items if i.doc != "piqa-5"]
    other = [dataclasses.replace(i, doc="piqa-0") if i.doc == "piqa-1" else i for i in other if i.doc != "boolq-7"]
    (expected,) = compared(files / "a.json", files / "better.json")
    straight = compared(write(files / "1.json", {"1": items}), write(files / "2.json", {"2": other}))[0]
    whole = {task.task: task for task in expected.tasks}
    assert "left out without a partner (of 1 and of 2): boolq 1 and 0, piqa 0 and 1" in straight.remarks[0]
    for task in straight.tasks:
        assert task.pairs == whole[task.task].pairs - (task.task in ("piqa", "boolq"))
        if task.task not in ("piqa", "boolq"):
            assert task == whole[task.task]
    shuffled = [other[i] for i in np.random.default_rng(0).permutation(len(other)) if other[i].doc != "piqa-0"]
    shuffled += [item for item in other if item.doc == "piqa-0"]
    found = compared(files / "1.json", write(files / "3.json", {"2": shuffled}))[0]
    assert found.tasks == straight.tasks and found.average == straight.average


def test_models_without_common_items_are_unpaired(files):
    renamed = [dataclasses.replace(i, doc=f"other {i.doc}") for i in simulate(0.9, 2)]
    (found,) = compared(files / "a.json", write(files / "renamed.json", {"renamed": renamed}))
    assert {task.test for task in found.differences} == {"unpaired"}
    assert found.remarks == [f"unpaired, since the models have no items in common: {', '.join(TASKS)}"]


def test_a_series_is_compared_with_its_first_model(files):
    found = compared(files / "series.json")
    assert [(c.reference, c.model) for c in found] == [("step-0", "step-1"), ("step-0", "step-2")]
    assert found[1].tasks == compared(f"{files}/series.json:step-0", f"{files}/series.json:models/step-2")[0].tasks
    others = compared(files / "a.json", files / "series.json")
    assert [c.model for c in others] == ["step-0", "step-1", "step-2"] and {c.reference for c in others} == {"a"}


def test_equal_names_are_told_apart(files):
    path = write(files / "other" / "commonsense.json", {"a": simulate(0.5, 8)})
    (found,) = compared(files / "a.json", path.parent)
    assert (found.reference, found.model) == (f"a ({files / 'a.json'})", f"a ({path})")


def test_the_same_seed_gives_the_same_interval_in_any_order(files):
    one = compared(files / "a.json", files / "better.json", files / "equal.json", seed=3)
    other = compared(files / "a.json", files / "equal.json", files / "better.json", seed=3)
    assert one[0].tasks == other[1].tasks and one[1].tasks == other[0].tasks
    assert one[0].tasks[0].interval != compared(files / "a.json", files / "better.json", seed=4)[0].tasks[0].interval


def test_different_protocols_are_compared_only_if_asked(files):
    path = write(files / "bos.json", {"bos": simulate(0.0, 6)}, dataclasses.replace(PROTOCOL, add_bos_token=True))
    with pytest.raises(InputError, match=r"bos .* than a: add_bos_token \(True, not False\)"):
        compared(files / "a.json", path)
    (found,) = compared(files / "a.json", path, different_protocols=True)
    assert found.protocol_differences == ["add_bos_token (True, not False)"]
    done = run_here("tinyllama-hf", "compare", "a.json", "bos.json", "--different-protocols", cwd=files)
    assert done.stdout.splitlines()[2] == "DIFFERENT PROTOCOLS  B: add_bos_token (True, not False)"


def test_the_same_weights_are_noted(files):
    path = write(files / "again.json", {"a": simulate(0.0, 1)})
    (found,) = compared(files / "a.json", path)
    assert "both have the same weights" in found.remarks
    assert all(task.p_value == 1 and task.difference == 0 for task in found.differences)


# A scored model that reproduces a published row exactly; each mutation is one way in which scores go wrong.


def reproduction(**changes) -> TaskRow:
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


def test_a_published_row_is_compared_by_standard_errors(files):
    path = files / "mine.json"
    row = moved(reproduction(), "boolq", score=57.83 + 6)
    write_scores(path, TaskScoreFile(protocol=PROTOCOL, models=[row]))
    (found,) = compared("step-1431k-3T", path)
    boolq = next(task for task in found.tasks if task.task == "boolq")
    shares = (0.5783, 0.6383)
    errors = [100 * math.sqrt(share * (1 - share) / 3269) for share in (shares[0], shares[0])]
    assert boolq.test == "unpaired" and boolq.verdict == "better"
    assert boolq.standard_error == pytest.approx(math.hypot(*errors), rel=1e-9)
    assert found.published.deviations[0].causes == []
    done = run_here("tinyllama-hf", "compare", "step-1431k-3T", "mine.json", cwd=files)
    assert "as a reproduction of step-1431k-3T: boolq deviates by +6.00 points, UNEXPLAINED" in done.stdout
    (reverse,) = compared(path, "step-1431k-3T")
    assert reverse.published == found.published and reverse.tasks[0].difference == -found.tasks[0].difference


# The command.


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
    "a.json better.json --json x --markdown x": "--json x is also the Markdown file",
    "a.json step-1431k-3T --metric acc": "--metric acc: step-1431k-3T has only the published metric",
    "sample.json step-1431k-3T": "sample has scores of made-up items",
    "a.json moved.json": "moved.items/0000000000better.jsonl.gz is missing",
    "a.json fewer.json": "it has 179 items of piqa, and the score is of 180",
    "a.json other.json": "the mean of acc_norm on hellaswag is ",
    "a.json lacking.json": "item 3 of boolq has acc nan",
    "a.json torn.json": "torn.items/000000000000torn.jsonl.gz: damaged",
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


def test_models_that_were_really_scored(tmp_path, tokenizer_folder):
    """Two small models on the bundled questions, through `eval tasks`; each score is that of its pairs."""
    from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load_tokenizer

    for name, seed in (("one", 0), ("two", 1)):
        torch.manual_seed(seed)
        model = TinyLlamaForCausalLM(TinyLlamaConfig.preset("micro", vocab_size=512))
        torch.nn.init.normal_(model.lm_head.weight, std=0.2)
        model.save_pretrained(tmp_path / name)
        load_tokenizer(tokenizer_folder).save_pretrained(tmp_path / name)
    scored = run_here(
        "tinyllama-hf",
        "eval",
        "tasks",
        "one",
        "two",
        "--data",
        "embedded:sample",
        "--output",
        "both.json",
        cwd=tmp_path,
    )
    assert scored.returncode == 0, scored.stderr
    rows = json.loads((tmp_path / "both.json").read_text())["models"]
    for metric in (None, "bits_per_byte"):
        (found,) = compared(tmp_path / "both.json", metric=metric)
        for task in found.tasks:
            scores = [row["results"][task.task]["metrics"][task.metric]["score"] for row in rows]
            assert task.pairs == 10 and task.scores == pytest.approx(scores, abs=1e-9)
    assert found.tasks[0].unit == "bits" and found.remarks[0] == "70 pairs of items; every item has its partner"
    done = run_here("tinyllama-hf", "compare", "both.json", cwd=tmp_path)
    assert done.returncode == 0 and "no difference shown" in done.stdout
