"""What `recipes/pretrain.py` adds to a run: cards, scores, a picture. Through the script, in a process of its own."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.conftest import ROOT, write_recipe
from tinyllama_hf import provenance
from tinyllama_hf.evaluation.ladder import score, watch
from tinyllama_hf.pretrain.config import load_config
from tinyllama_hf.pretrain.loop import pretrain
from tinyllama_hf.pretrain.milestones import list_milestones
from tinyllama_hf_cli.hooks import hooks_of


def launch(recipe: Path, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "recipes" / "pretrain.py"), str(recipe), *arguments]
    done = subprocess.run(
        command, cwd=recipe.parent, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def finished(prepared, tokenizer_folder, tmp_path_factory) -> tuple[Path, str]:
    recipe = write_recipe(tmp_path_factory.mktemp("hooks"), prepared, tokenizer_folder)
    printed = launch(recipe, "evaluate_at_milestones=inline", "--measure-peak")
    return recipe.parent / "run", printed


def test_picture(finished):
    from matplotlib import image

    run, _ = finished
    picture = image.imread(run / "training.png")
    assert picture.shape[1] > 1000 and picture[..., :3].std() > 0.05
    assert not list(run.glob(".training*"))


def test_every_milestone_has_a_card(finished):
    run, _ = finished
    for folder in list_milestones(run):
        card = ModelCard.load(folder / "README.md")
        assert card.data.library_name == "transformers"
        assert f"# {folder.name}\n" in card.text and f"`{folder.name}` has read" in card.text
        record = json.loads((folder / "provenance.json").read_text())
        assert f"{record['validation_loss']:.4f} nats a token" in card.text
        assert f"{record['tokens']:,} tokens in {record['step']:,} steps" in card.text
        assert str(run.parent) not in card.text, "no path of this machine"


def test_inline_scores_equal_those_of_the_command(finished, tmp_path):
    run, printed = finished
    inline = json.loads((run / "scores.json").read_text())
    assert [row["name"] for row in inline["models"]] == [folder.name for folder in list_milestones(run)]
    again = score([str(run)], output=tmp_path / "again.json")
    assert [row["bits_per_byte"] for row in again["models"]] == [row["bits_per_byte"] for row in inline["models"]]
    for row in inline["models"]:
        assert f"{row['bits_per_byte']:.4f} bits per byte  {row['name']}" in printed


def test_share_of_the_measured_matrix_rate(finished):
    run, _ = finished
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["matmul_share"] < 1 for row in rows if "loss" in row)


class TestIncremental:
    def test_what_is_scored_is_not_scored_again(self, finished, tmp_path, monkeypatch):
        from tinyllama_hf.evaluation import ladder

        run, _ = finished
        output = tmp_path / "scores.json"
        first = score([str(run)], output=output)
        monkeypatch.setattr(ladder, "_score_folder", lambda *_: pytest.fail("scored again"))
        assert score([str(run)], output=output)["models"] == first["models"]

    def test_a_killed_call_keeps_what_it_had(self, finished, tmp_path, monkeypatch):
        from tinyllama_hf.evaluation import ladder

        run, _ = finished
        output, real, calls = tmp_path / "scores.json", ladder._score_folder, []

        def once(*arguments):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return real(*arguments)

        monkeypatch.setattr(ladder, "_score_folder", once)
        with pytest.raises(KeyboardInterrupt):
            score([str(run)], output=output)
        assert len(json.loads(output.read_text())["models"]) == 1
        assert len(score([str(run)], output=output)["models"]) == 2 and len(calls) == 3

    def test_a_milestone_that_was_written_again_is_scored_again(self, finished, tmp_path):
        run, _ = finished
        output = tmp_path / "scores.json"
        before = score([str(run)], output=output)
        before["models"][0] |= {"created": "2020-01-01T00:00:00+00:00", "bits_per_byte": 99.0}
        provenance.write_json(output, before)
        assert score([str(run)], output=output)["models"][0]["bits_per_byte"] < 20


def test_watch_scores_as_they_appear(recipe):
    """Training in this thread, watching in another, which ends by itself after the last milestone."""
    config = load_config(recipe, ["evaluate_at_milestones=watch"])
    run, lines = Path(config.output_dir), []
    hooks = hooks_of(config)
    assert any(f"tinyllama-hf eval {run} --watch" in line for line in hooks.before_training)
    watcher = threading.Thread(target=watch, args=(run, "cpu", run / "scores.json", 0.05, lines.append))

    def first_checkpoint(_: Path) -> None:
        if not watcher.is_alive() and not lines:
            watcher.start()

    pretrain(config, hooks=type(hooks)(after_checkpoint=first_checkpoint))
    watcher.join(60)
    assert [line.split()[-1] for line in lines] == [folder.name for folder in list_milestones(run)]
    assert len(json.loads((run / "scores.json").read_text())["models"]) == 2
