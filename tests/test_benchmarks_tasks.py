"""The benchmarks of the seven tasks: the part of benchmarks/gpu/run.py on a CPU, and the comparison with lm-eval."""

import json
import sys

import pytest

from tests.conftest import ROOT
from tests.evaluation.commonsense_scorer import Scorer
from tests.evaluation.test_commonsense import SAMPLE, save


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "gpu")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def test_the_requests_of_the_tasks_on_a_cpu(tokenizer_folder, tmp_path, monkeypatch):
    import measuring
    import task_requests

    file = tmp_path / "requests.npz"
    task_requests.write_requests(str(tokenizer_folder), str(SAMPLE), file)
    requests = task_requests.read_requests(file)
    encoded = Scorer(save(tmp_path / "model", tokenizer_folder, 1)).encode
    texts = json.loads((SAMPLE / "piqa" / "validation.jsonl").read_text().splitlines()[0])
    tokens, scored = encoded(f"Question: {texts['goal']}\nAnswer:", f" {texts['sol1']}")
    assert len(requests) == 218 and any(
        (*context, *continuation) == tokens and len(continuation) == scored for context, continuation in requests
    )
    monkeypatch.setattr(task_requests, "FILE", file)
    monkeypatch.setattr(task_requests.read_requests, "__defaults__", (file,))
    monkeypatch.setattr(measuring, "use_stand_in", lambda: None)
    whole, part = task_requests.tasks(measuring.Bench("cpu", tiny=True))
    assert whole["requests"] == 64 and whole["tokens_read"] < whole["tokens_one_by_one"]
    assert part["largest_difference"] < 1e-4 and part["ratio"] > 0


@pytest.mark.slow
def test_the_comparison_with_lm_eval(tokenizer_folder, tmp_path, monkeypatch, capsys):
    import commonsense

    monkeypatch.setattr(
        commonsense, "save", lambda name, figures: tmp_path.joinpath(name).write_text(json.dumps(figures))
    )
    folder = save(tmp_path / "model", tokenizer_folder, 1, context=1024)
    arguments = [str(folder), "--data", str(SAMPLE), "--limit", "5", "--output", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", ["commonsense.py", *arguments])
    commonsense.main()
    figures = json.loads((tmp_path / "commonsense").read_text())
    assert figures["items"] == 35 and not figures["wrong"] and 0 < figures["largest_difference"] < 1e-3
    assert all(own["ours"] == own["lm-eval"] and own["items"] == 5 for own in figures["right"].values())
    assert "1 models, 35 items" in capsys.readouterr().out
    samples = tmp_path / "runs" / "0" / "ours" / "ours.jsonl"
    items = [json.loads(line) for line in samples.read_text().splitlines()]
    items[0]["log_likelihoods"] = items[0]["log_likelihoods"][::-1]
    samples.write_text("".join(json.dumps(item) + "\n" for item in items))
    commonsense.main()  # resumes: nothing is scored again, and the changed item is found
    assert len(json.loads((tmp_path / "commonsense").read_text())["wrong"]) == 1
