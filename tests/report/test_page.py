"""The page and the pictures of a run match its files."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.hub.conftest import commonsense_scores
from tests.pretrain.runs import pretrain
from tests.report.test_plots import assert_draws, series
from tests.report.test_training import training_row
from tinyllama_hf.errors import InputError
from tinyllama_hf.pretrain.config import load_pretrain_config
from tinyllama_hf.pretrain.milestones import list_milestones
from tinyllama_hf.report.page import write_report


@pytest.fixture
def run(recipe) -> Path:
    config = load_pretrain_config(recipe)
    pretrain(config)
    return Path(config.output_dir)


def score_file(run: Path, tokens: tuple[int, ...]) -> dict:
    """Scores as `tinyllama-hf eval text RUN --baselines` writes them, with recognizable values."""
    path = "data/a & b"
    rows = [
        {
            "name": f"step-{i}",
            "path": f"run/milestones/step-{i}",
            "step": i,
            "tokens": t,
            "bits_per_byte": 3 - i / 8,
            "by_source": {path: 3 - i / 8},
            "protocol": {"context": 32, "stride": 16, "bos": True, "dtype": "float32"},
            "seconds": 1.0,
        }
        for i, t in enumerate(tokens)
    ]
    baselines = [
        {"name": n, "step": 1, "tokens": t, "distinct_tokens": t, "bits_per_byte": b, "by_source": {path: b}}
        for t in tokens
        for n, b in (("unigram", 4.125), ("5-gram", 2.9375))
    ]
    data = [{"path": path, "fingerprint": "f" * 64, "documents": 7, "bytes": 31_415}]
    return {"task": "bits_per_byte", "data": data, "models": rows, "baselines": baselines}


def test_page_of_a_scored_run(run, tmp_path, drawn):
    scores = score_file(run, (1536, 3072))
    (run / "scores.json").write_text(json.dumps(scores))
    stages = tmp_path / "stages.tsv"
    stages.write_text("first\t12\nsecond\t3\n")
    lines: list[str] = []
    page = write_report(run, tmp_path / "report", ["def <b>"], stages, log=lines.append).read_text()
    assert lines == [f"continuing the prompts with {folder.name}" for folder in list_milestones(run)]
    assert page.count('src="data:image/png;base64,') == 4
    assert "http" not in re.sub(r'data:image/png;base64,[^"]*|http-equiv', "", page)
    for fact in (
        "The n-gram models (",
        "<b>2.875 bits per byte</b>",
        "a unigram model needs 4.125",
        "a 5-gram model needs 2.938",
        "7 documents of data/a &amp; b",
        '<td>second</td><td class="n">3</td>',
        "def &lt;b&gt;",
    ):
        assert fact in page, fact
    assert "def <b>" not in page
    for name in ("loss", "learning_rate", "trajectory"):
        with Image.open(tmp_path / "report" / f"{name}.png") as picture:
            assert picture.size == (1080, 630)
    loss, rates, trajectory, scaling = (figure.axes for figure in drawn)
    assert_draws(loss[0], run, "loss", "training")
    assert_draws(loss[0], run, "validation_loss", "validation, held-out text")
    assert_draws(rates[0], run, "learning_rate")
    assert_draws(rates[1], run, "gradient_norm")
    assert series(trajectory[0], "model") == ([1536, 3072], [3.0, 2.875])
    assert_draws(scaling[0], run, "validation_loss", "measured")
    assert "Held-out text: No curve is fitted: 2 points are too few" in page


def test_n_gram_models_are_mentioned_only_if_they_were_fitted(run, tmp_path):
    (run / "scores.json").write_text(json.dumps(score_file(run, (1536, 3072)) | {"baselines": []}))
    page = write_report(run, tmp_path / "report").read_text()
    assert "<b>2.875 bits per byte</b>" in page and "n-gram" not in page and "5-gram" not in page


def test_page_of_a_run_without_scores(run, tmp_path):
    page = write_report(run, tmp_path / "report").read_text()
    assert page.count('src="data:image/png;base64,') == 3 and "Bits per byte" not in page
    assert "has 2 milestones" in page
    again = write_report(run, tmp_path / "report").read_text()
    assert again == page


def test_what_became_of_the_last_milestone(run, tmp_path):
    """The replies of the chat model and the commonsense table match their score files."""
    chat = tmp_path / "chat"
    chat.mkdir()
    with pytest.raises(InputError, match=r"chat: no scores of the replies.*tinyllama-hf eval replies .*chat"):
        write_report(run, tmp_path / "report", chat=chat)
    assert not (tmp_path / "report").exists()
    samples = [
        {"question": f"What is <{i}>?", "reply": f"It is {i}.", "stopped": True, "true": "No & yes."}
        for i in range(40)
    ]
    replies = {
        "name": "chat",
        "path": "chat",
        "data_sha256": "0" * 64,
        "loss": 2.5,
        "replies": 40,
        "stop_rate": 0.975,
        "median_length": 12.5,
        "max_new_tokens": 64,
        "samples": samples,
    }
    other = replies | {"name": "another", "stop_rate": 0.125}
    (chat / "replies.json").write_text(json.dumps({"task": "replies", "models": [other, replies]}))
    record = {
        "held_out_loss": {"before": 5.83, "after": 2.74},
        "conversations": {"train": 1728, "source": "embedded:questions"},
    }
    (chat / "provenance.json").write_text(json.dumps(record))
    scores = commonsense_scores(["step-12"], limit=100)
    for result in scores["models"][0]["results"].values():
        result |= {"score": 25.04, "standard_error": 4.26}
    scores["models"][0] |= {"average": 25.04, "average_standard_error": 3.01}
    scores["models"][0]["results"]["piqa"] |= {"score": 0.0, "standard_error": None}
    (run / "commonsense.json").write_text(json.dumps(scores))
    page = write_report(run, tmp_path / "report", chat=chat).read_text()
    assert '<td class="n">0.0</td>' in page
    for fact in (
        "1,728 conversations (embedded:questions)",
        "from 5.83 to <b>2.74 nats per token</b>",
        "to 40 held-out questions, <b>98%</b>",
        "What is &lt;5&gt;?",
        "It is 35.",
        "No &amp; yes.",
        "25.0 ± 4.3",
        "<b>25.0 ± 3.0</b>",
        "over 700 questions",
        "Scored on 100 of 10042 items of hellaswag, ",
        "100 of 1838 items of piqa; not comparable",
    ):
        assert fact in page, fact
    assert "What is &lt;36&gt;?" not in page, "some of the replies are shown, not all"


def test_refusals(tmp_path):
    with pytest.raises(InputError, match=r"metrics\.jsonl is missing"):
        write_report(tmp_path, tmp_path / "report")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="no training step is logged yet"):
        write_report(tmp_path, tmp_path / "report")
    (tmp_path / "metrics.jsonl").write_text(json.dumps(training_row(1)) + "\n")
    with pytest.raises(InputError, match="nowhere"):
        write_report(tmp_path, tmp_path / "report", stages=tmp_path / "nowhere.tsv")
    assert not (tmp_path / "report").exists()
