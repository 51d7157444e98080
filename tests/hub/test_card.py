"""The text and metadata of a card match the files of the run, and contain nothing about this machine."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from tests.hub.conftest import commonsense_scores, metrics
from tests.report.test_plots import assert_draws, series
from tinyllama_hf.hub.publish import plan_revisions


def cards(run: Path, license: str | None = None) -> dict[str, ModelCard]:
    """The card of each revision, read as the Hub reads it."""
    return {r.name: ModelCard(r.files["README.md"].decode()) for r in plan_revisions(run, "me/my-model", license)}


@pytest.fixture
def names(run) -> list[str]:
    return sorted((path.name for path in (run / "milestones").iterdir()), key=lambda name: int(name.split("-")[1]))


def test_what_it_says(run, names):
    plain = cards(run, license="apache-2.0")
    main = plain["main"]
    assert main.data.license == "apache-2.0" and main.data.to_dict()["model-index"][0]["name"] == "my-model"
    record = json.loads((run / "milestones" / names[1] / "provenance.json").read_text())
    for fact in (
        "A Llama of 139,584 parameters, pretrained from scratch; `step-12-token-0.003M` was trained on 3,072 tokens "
        "in 12 steps, of 3,072 planned tokens.",
        "| prepared | 100.00% |",
        "The learning rate rises to 0.005 over 512 tokens, then follows a cosine to 0.0002 at the last token.",
        "steps of 256 tokens in sequences of 32; fp32.",
        "| 2 | 64 | 4 | 2 | 128 | 512 | 32 |",
        'AutoModelForCausalLM.from_pretrained("me/my-model")',
        f"| `{names[0]}` | 6 | 1,536 | ",
        f"| `{names[1]}` | 12 | 3,072 | {record['validation_loss']:.3f} | 2.250 |",
        f"`main` holds `{names[1]}`",
        "![loss](loss.png)",
        "![trajectory](trajectory.png)",
        "**2.2500** over all documents, none",
        "Scored with stock transformers 5.23.0.",
        "| prepared | 2.2500 | 6 | 31,415 | `ffffffffffff` |",
        record["created"],
        f"torch {record['libraries']['torch']}",
        next(iter(record["data"].values())),
    ):
        assert fact in main.text, fact
    settings = yaml.safe_load(main.text.split("```yaml\n")[1].split("```")[0])
    assert settings["training"]["total_tokens"] == 3072 and settings["data"]["sources"] == [
        {"path": "prepared", "weight": 1.0}
    ]
    older = plain[names[0]]
    assert f'from_pretrained("me/my-model", revision="{names[0]}")' in older.text and "png" not in older.text
    assert older.data.eval_results[0].metric_value == 2.5 and "**2.5000**" in older.text


def test_it_says_that_a_sample_was_scored(run):
    scores = json.loads((run / "scores.json").read_text())
    scores["data"][0] |= {"total_documents": 60, "total_bytes": 314_159, "max_bytes": 31_416}
    (run / "scores.json").write_text(json.dumps(scores))
    card = cards(run)["main"]
    assert "**2.2500** over all documents of a fixed sample, chosen by the hash of their text, none" in card.text
    assert card.data.eval_results[0].dataset_name == "prepared, held-out documents, sample of 31,415 bytes"


def test_its_pictures_show_the_run(run, names, drawn):
    plan_revisions(run, "me/my-model")
    [[loss], [trajectory]] = [figure.axes for figure in drawn]
    assert_draws(loss, run, "loss", "training")
    assert_draws(loss, run, "validation_loss", "validation, held-out text")
    assert [line.get_xdata()[0] for line in loss.lines if line.get_color() == "#cccccc"] == [1536, 3072]
    assert series(trajectory, "model") == ([1536, 3072], [2.5, 2.25])
    assert series(trajectory, "5-gram, same text") == ([1536, 3072], [3.0, 3.0])


def test_nothing_of_the_machine_or_the_hour(run):
    """No absolute path, and the same bytes for every call. Otherwise a second call would upload again."""
    once, again = plan_revisions(run, "me/my-model"), plan_revisions(run, "me/my-model")
    assert once == again
    for revision in once:
        text = revision.files["README.md"].decode()
        assert str(run.parent) not in text and "/tmp" not in text and str(Path.home()) not in text


def test_without_scores_and_license(run, names):
    (run / "scores.json").unlink()
    [revision] = [r for r in plan_revisions(run, "me/my-model") if r.name == "main"]
    assert "loss.png" in revision.files and "trajectory.png" not in revision.files
    card = ModelCard(revision.files["README.md"].decode())
    assert card.data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}
    assert "bits per byte |" not in card.text and "commonsense" not in card.text.lower()


def test_commonsense_on_every_item(run, names):
    """Scores appear in text and `model-index`."""
    scores = commonsense_scores(names, limit=None)
    scores["models"][-1]["results"]["boolq"]["standard_error"] = None  # all or no items are right
    (run / "commonsense.json").write_text(json.dumps(scores))
    plain = cards(run)
    results = {r.dataset_type: r for r in plain["main"].data.eval_results if r.metric_type != "bits_per_byte"}
    assert {task: r.metric_type for task, r in results.items()} == metrics()
    assert [results[task].metric_value for task in metrics()] == [32.0 + i for i in range(7)]
    assert {r.dataset_args["num_few_shot"] for r in results.values()} == {0}
    assert "| **average** |  | **35.00 ± 0.26** |  |" in plain["main"].text
    assert "| hellaswag | acc_norm | 32.00 ± 0.70 | 10,042 |" in plain["main"].text
    assert "| boolq | acc | 37.00 | 3,270 |" in plain["main"].text
    assert "lm_eval 0.4.13, float32, 0 examples, without begin-of-sequence token, context 512" in plain["main"].text
    assert "| 2.500 | 33.00 |" in plain["main"].text and "| 2.250 | 35.00 |" in plain["main"].text
    assert "not a benchmark" not in plain["main"].text
    older = {r.dataset_type: r.metric_value for r in plain[names[0]].data.eval_results}
    assert older["piqa"] == 36.0


def test_commonsense_on_less_than_that(run, names):
    """Marked in the text, and left out of `model-index`, which leaderboards read."""
    (run / "commonsense.json").write_text(json.dumps(commonsense_scores(names, limit=100)))
    for name, card in cards(run).items():
        assert "; not comparable with scores on all items" in card.text
        assert "33.00 \\*" in card.text and "35.00 \\*" in card.text
        assert [r.metric_type for r in card.data.eval_results] == ["bits_per_byte"], name


def test_commonsense_on_made_up_items(run, names):
    """They appear nowhere, including the table of revisions."""
    (run / "commonsense.json").write_text(json.dumps(commonsense_scores(names, limit=None, sample=True)))
    for card in cards(run).values():
        assert "ommonsense" not in card.text and "35.00" not in card.text and "\\*" not in card.text
        assert [r.metric_type for r in card.data.eval_results] == ["bits_per_byte"]


def test_the_base_of_a_fine_tuned_model(run, names, tmp_path):
    """A Hub id or a released name becomes `base_model`; a local folder does not."""
    from tinyllama_hf.released import released

    folder, record = run / "milestones" / names[1], None
    record = json.loads((folder / "provenance.json").read_text())
    for key in ("step", "tokens", "validation_loss", "data"):
        del record[key]
    record |= {
        "conversations": {"source": str(tmp_path / "mine.jsonl"), "train": 10, "held_out": 2, "dropped": 0},
        "held_out_loss": {"before": 3.0, "after": 2.0},
        "stop_rate": {"before": 0.1, "after": 0.9},
    }
    chat = next(model for model in released() if model.kind != "peer" and model.hub)
    for given, base in (
        ("you/your-model@step-3", "you/your-model"),
        (chat.name, chat.hub),
        (str(folder), None),
        ("./x/y", None),
    ):
        (folder / "provenance.json").write_text(json.dumps({**record, "base_model": {"path": given, "sha256": {}}}))
        [revision] = plan_revisions(folder, "me/my-model")
        card = ModelCard(revision.files["README.md"].decode())
        assert card.data.base_model == base and str(tmp_path) not in card.text
        assert "| conversations | mine.jsonl: 10 trained, 2 held out |" in card.text
        assert "replies of 2 held-out conversations went from 3.000 to **2.000** nats per token. Of" in card.text
        assert "own replies, 10% ended in time before training, and 90% after." in card.text
    del record["conversations"], record["stop_rate"]
    record |= {
        "preferences": {"source": f"{tmp_path}/a.jsonl, {tmp_path}/b.csv", "train": 20, "held_out": 4, "dropped": 0},
        "held_out_accuracy": {"before": 0.5, "after": 0.75},
        "held_out_likelier": {"before": 0.25, "after": 0.5},
        "base_model": {"path": "you/your-model", "sha256": {}},
    }
    (folder / "provenance.json").write_text(json.dumps(record))
    [revision] = plan_revisions(folder, "me/my-model")
    text = revision.files["README.md"].decode()
    assert "tuned by DPO from you/your-model on 20 preferences" in text and str(tmp_path) not in text
    assert "| preferences | a.jsonl, b.csv: 20 trained, 4 held out |" in text
    assert "higher in **75.0%** of them" in text and "one in 50.0% (25.0% before)" in text


def test_commonsense_before_and_after_fine_tuning(chat, names):
    """A column for the base model, if its scores are in the same file."""
    record = json.loads((chat / "provenance.json").read_text())
    record["base_model"] = {"path": "my/base", "sha256": {}}
    (chat / "provenance.json").write_text(json.dumps(record))
    scores = commonsense_scores(["base", "chat"], limit=None)
    scores["models"][0]["path"] = "my/base"
    (chat / "commonsense.json").write_text(json.dumps(scores))
    [revision] = plan_revisions(chat, "me/my-model")
    text = revision.files["README.md"].decode()
    assert "| task | metric | before fine-tuning | percent ± standard error |" in text
    assert "| hellaswag | acc_norm | 30.00 | 32.00 ± 0.70 | 10,042 |" in text
    assert "| **average** |  | 33.00 | **35.00 ± 0.26** |" in text
    scores["models"] = scores["models"][1:]
    (chat / "commonsense.json").write_text(json.dumps(scores))
    [revision] = plan_revisions(chat, "me/my-model")
    assert "before fine-tuning" not in revision.files["README.md"].decode()
