"""Comparing score files: pairing, tests, verdicts. Scores and items are simulated, and once those of real models."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from statsmodels.stats.contingency_tables import mcnemar

from tests.conftest import run_here
from tests.evaluation.simulated_scores import COUNTS, PROTOCOL, TABLE, compared, simulate, write
from tinyllama_hf.errors import InputError
from tinyllama_hf.evaluation.protocol import TASKS
from tinyllama_hf.evaluation.scored_items import ScoredItem


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
    assert found.remarks == ["1,400 pairs of items; every item is paired"]
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
    assert "no items for better" in unpaired.remarks[0]


def test_another_metric(files):
    (found,) = compared(files / "a.json", files / "better.json", metric="acc")
    assert {task.metric for task in found.tasks} == {"acc"}
    piqa = next(task for task in found.tasks if task.task == "piqa")
    assert piqa.scores[0] == pytest.approx(
        100 * np.mean([i.metrics["acc"] for i in simulate(0.0, 1) if i.task == "piqa"])
    )
    with pytest.raises(InputError, match="no brier in a and better"):
        compared(files / "a.json", files / "better.json", metric="brier")


@pytest.mark.parametrize("metric", ["prompt_level_strict_acc", "pass@2"])
def test_fractions_are_compared_as_fractions(tmp_path, metric):
    """Score files have only some metrics in percent; IFEval's accuracies and pass@2 are between 0 and 1."""
    right = np.random.default_rng(0).random((2, 50)) < np.array([[0.2], [0.8]])
    if metric == "pass@2":
        right = right / 2
    for name, values in zip("ab", right, strict=True):
        items = [
            ScoredItem(task="ifeval", index=i, doc=f"{i}", metrics={metric: float(v)}) for i, v in enumerate(values)
        ]
        write(tmp_path / f"{name}.json", {name: items}, reported=metric)
    (found,) = compared(tmp_path / "a.json", tmp_path / "b.json")
    (task,) = found.tasks
    assert task.scores == pytest.approx(right.mean(1)) and task.pairs == 50 and task.unit == ""
    assert task.verdict == "better" and found.average is None
    output = run_here("tinyllama-hf", "compare", "a.json", "b.json", cwd=tmp_path).stdout
    assert f"{right[0].mean():.4f}" in output and " points" not in output


def test_metrics_of_different_units_have_no_average(files):
    for name in ("a", "better"):
        contents = json.loads((files / f"{name}.json").read_text())
        contents["models"][0]["results"]["piqa"] |= {"metric": "bleu", "score": 20.0, "standard_error": 1.0}
        (files / f"{name}.json").write_text(json.dumps(contents))
    (found,) = compared(files / "a.json", files / "better.json")
    assert len(found.tasks) == 7 and found.average is None


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
    assert "unpaired items left out (a and some): piqa 1 and 0" in found.remarks[0]
    assert "every item is paired" in compared(files / "a.json", path)[0].remarks[0]


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
    assert "unpaired items left out (1 and 2): boolq 1 and 0, piqa 0 and 1" in straight.remarks[0]
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
    series = files / "series.json"
    series.write_text(series.read_text().replace('"name": "step-1"', '"name": "step-0"'))
    first, second = compared(series)
    assert first.reference == f"step-0 ({series}:models/step-0)" and first.model == f"step-0 ({series}:models/step-1)"
    assert second.model == "step-2"


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
    assert found.tasks[0].unit == "bits" and found.remarks[0] == "70 pairs of items; every item is paired"
    done = run_here("tinyllama-hf", "compare", "both.json", cwd=tmp_path)
    assert done.returncode == 0 and "no difference shown" in done.stdout
