"""The benchmark of choosing a milestone: its figures from fine-tunings whose best milestone is known."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.evaluation.test_milestone_selection import write_series
from tests.hub.conftest import bits_per_byte_scores


NAMES = ["step-1", "step-2", "step-3"]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import milestone_selection

    return milestone_selection


def tuned_series(folder: Path) -> Path:
    """Three milestones: the second is best after fine-tuning, the third by accuracy and bits per byte."""
    bits = np.tile([[2.0], [1.5], [1.0]], 50) + np.linspace(0, 1, 50)
    run = write_series(folder, {"piqa": bits}, {"piqa": np.tile([[False], [False], [True]], 50)})
    (run / "commonsense.json").rename(run / "tasks-published.json")
    (run / "tuning").mkdir()
    for number, (name, loss) in enumerate(zip(NAMES, (3.0, 2.0, 2.25), strict=True)):
        milestone = run / "milestones" / name
        milestone.mkdir(parents=True)
        record = {"step": number + 1, "tokens": 1000 * (number + 1)}
        (milestone / "provenance.json").write_text(json.dumps(record))
        for seed in (1, 2, 3):
            losses = [10 * (loss + seed / 100), 30 * (loss + seed / 100)]
            tuned = {"losses": losses, "tokens": [10, 30], "cpu_seconds": 10.0 + 10 * number}
            (run / "tuning" / f"{name}_{seed}.json").write_text(json.dumps(tuned))
    text = bits_per_byte_scores(NAMES[:2], "data")
    text["models"].append(text["models"][0] | {"name": "step-3", "bits_per_byte": 9.0})
    (run / "scores.json").write_text(json.dumps(text))
    return run


def test_regret_and_cost(benchmark, tmp_path):
    run, random = tuned_series(tmp_path), np.random.default_rng(0)
    tuning = benchmark.Tuning(run, random)
    assert tuning.loss == pytest.approx([3.02, 2.02, 2.27]) and tuning.tokens == [1000, 2000, 3000]
    assert tuning.by_seed[0] == pytest.approx([3.01, 3.02, 3.03])
    for metric in ("bits_per_byte", "accuracy"):
        row = benchmark.choice(run, metric, tuning, random)
        assert (row["chosen"], row["ties"]) == ("step-3", [])
        assert row["regret"] == pytest.approx(0.25) and row["regret_interval"] == pytest.approx([0.25, 0.25])
        assert row["cost_saved"] == row["cost_saved_with_ties"] == pytest.approx(1 - 30 / 60)
        found = benchmark.correlations(run, random)["scores"][metric]["with_tokens"]
        assert found == pytest.approx(1 if metric == "bits_per_byte" else 0.866, abs=1e-3)
    assert benchmark.choice(run, "bits_per_byte", tuning, random)["with_tuned_loss"] == pytest.approx(0.5)
    last = benchmark.choice(run, "last", tuning, random)
    assert last["chosen"] == "step-3" and last["regret"] == pytest.approx(0.25) and last["scoring_seconds"] == 0
    text = benchmark.choice(run, "text", tuning, random)
    assert text["chosen"] == "step-2" and text["regret"] == 0 and text["cost_saved"] == pytest.approx(1 - 20 / 60)


def test_ties_are_fine_tuned_too(benchmark, tmp_path):
    run = tuned_series(tmp_path)
    random = np.random.default_rng(1)
    noise = random.normal(0, 1, (3, 50))
    write_series(run, {"piqa": 5 + noise - noise.mean(1, keepdims=True) + np.array([[9], [0.001], [0]])})
    (run / "commonsense.json").rename(run / "tasks-published.json")
    row = benchmark.choice(run, "bits_per_byte", benchmark.Tuning(run, random), random)
    assert (row["chosen"], row["ties"]) == ("step-3", ["step-2"])
    assert row["regret"] == pytest.approx(0.25) and row["regret_with_ties"] == 0
    assert row["cost_saved_with_ties"] == pytest.approx(1 - 50 / 60)
    low, high = row["regret_interval"]
    assert low == pytest.approx(0, abs=1e-9) and high == pytest.approx(0.25)


def test_forecasts_of_the_committed_run(benchmark):
    found = benchmark.forecasts(benchmark.NANO)
    assert [row["tokens"] for row in found["validation losses"]] == [4005888, 8003584, 8003584]
    assert abs(found["validation losses"][2]["miss"]) < 1.5 < abs(found["milestones alone"][2]["miss"])
