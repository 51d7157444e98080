"""What `recipes/pretrain.py` adds to a run: cards, scores, a picture."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from tests.conftest import ROOT, run_here, write_recipe
from tests.pretrain.runs import SCRIPT, pretrain, read_metrics, run_script
from tests.report.test_plots import assert_draws
from tinyllama_hf.data.prepare import prepare
from tinyllama_hf.errors import InputError
from tinyllama_hf.evaluation.held_out.held_out_text import held_out_documents
from tinyllama_hf.evaluation.series import score, watch
from tinyllama_hf.files import write_json
from tinyllama_hf.pretrain import loop
from tinyllama_hf.pretrain.config import SourceSection, load_pretrain_config
from tinyllama_hf.pretrain.loop import Hooks
from tinyllama_hf.pretrain.milestones import list_milestones


def launch(recipe: Path, *arguments: str) -> str:
    done = run_here(ROOT / "recipes" / "pretrain.py", recipe, *arguments, cwd=recipe.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def finished(prepared, tokenizer_folder, tmp_path_factory) -> tuple[Path, str]:
    recipe = write_recipe(tmp_path_factory.mktemp("hooks"), prepared, tokenizer_folder)
    printed = launch(recipe, "evaluate_at_milestones=inline", "--measure-peak")
    return recipe.parent / "run", printed


def test_next_commands_name_the_launched_folder(finished, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["my recipes/pretrain.py"])
    assert "'my recipes/sft.py' 'my recipes/sft/full.yaml' model.path=" in SCRIPT.next_commands(finished[0])[-1]
    assert f"{ROOT / 'recipes' / 'sft.py'} {ROOT / 'recipes' / 'sft' / 'full.yaml'} model.path=" in finished[1]


def test_picture(finished):
    from matplotlib import image

    run, _ = finished
    picture = image.imread(run / "training.png")
    assert picture.shape[1] > 1000 and picture[..., :3].std() > 0.05
    assert not list(run.glob(".training*"))


def test_the_picture_shows_what_was_logged(finished, recipe, drawn):
    run, _ = finished
    SCRIPT.TrainingPicture()(run)
    [figure] = drawn
    names = ("loss", "learning_rate", "gradient_norm", "tokens_per_second")
    for axes, name in zip(figure.axes, names, strict=True):
        assert_draws(axes, run, name, "training" if name == "loss" else None)
    assert_draws(figure.axes[0], run, "validation_loss", "validation, held-out text")
    marks = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_color() == "#cccccc"]
    assert marks == [json.loads((folder / "provenance.json").read_text())["tokens"] for folder in list_milestones(run)]


def test_every_milestone_has_a_card(finished):
    run, _ = finished
    for folder in list_milestones(run):
        card = ModelCard.load(folder / "README.md")
        assert card.data.library_name == "transformers"
        assert f"# {folder.name}\n" in card.text and f"`{folder.name}` was trained on" in card.text
        record = json.loads((folder / "provenance.json").read_text())
        assert f"{record['validation_loss']:.4f} nats per token" in card.text
        assert f"{record['tokens']:,} tokens in {record['step']:,} steps" in card.text
        assert str(run.parent) not in card.text, "no path of this machine"


def test_the_code_of_a_card_runs(finished, capsys, monkeypatch):
    """Unchanged, in the folder of the run."""
    run, _ = finished
    monkeypatch.chdir(run)
    exec((list_milestones(run)[0] / "README.md").read_text().split("```python\n")[1].split("```")[0], {})
    assert "Return a list of" in capsys.readouterr().out


def test_a_published_card_is_another(finished):
    """The card in the folder has no address and no scores; publishing replaces it."""
    from tinyllama_hf.hub.publish import plan_revisions

    run, _ = finished
    for revision in plan_revisions(run, "me/my-model"):
        text = revision.files["README.md"].decode()
        assert "# my-model\n" in text and "bits per byte" in text and "milestones/step" not in text


def test_scoring_does_not_move_training(finished, recipe):
    run, _ = finished
    config = load_pretrain_config(recipe)
    pretrain(config)
    keys = ("step", "loss", "gradient_norm", "block_ids", "validation_loss")
    rows = [
        [{key: row.get(key) for key in keys} for row in read_metrics(folder)]
        for folder in (run, Path(config.output_dir))
    ]
    assert rows[0] == rows[1]


def test_inline_scores_equal_those_of_the_command(finished, tmp_path):
    run, printed = finished
    inline = json.loads((run / "scores.json").read_text())
    assert [row["name"] for row in inline["models"]] == [folder.name for folder in list_milestones(run)]
    again = score([str(run)], output=tmp_path / "again.json")
    assert [row.bits_per_byte for row in again.models] == [row["bits_per_byte"] for row in inline["models"]]
    for row in inline["models"]:
        assert f"{row['bits_per_byte']:.4f} bits per byte  {row['name']}" in printed


def test_share_of_the_measured_matrix_rate(finished):
    run, _ = finished
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["matmul_share"] < 1 for row in rows if "loss" in row)


def test_scores_on_other_text_are_known_before_the_first_step(prepared, finished, recipe, capsys):
    run, _ = finished
    output = Path(load_pretrain_config(recipe).output_dir)
    output.mkdir()
    (output / "training.yaml").touch()  # which makes it the folder of a run
    scores = json.loads((run / "scores.json").read_text())
    scores["data"][0]["fingerprint"] = "0" * 64
    (output / "scores.json").write_text(json.dumps(scores))
    assert run_script(recipe, "evaluate_at_milestones=inline", "--dry-run") == 2
    assert "has scores on other text" in capsys.readouterr().err
    assert run_script(recipe, "evaluate_at_milestones=inline", "--dry-run", "--overwrite") == 0


def test_training_goes_on_where_a_score_or_a_picture_cannot_be_had(recipe, capsys, monkeypatch):
    """With held-out text that has disappeared by then, and a disk without space for a picture."""
    from tinyllama_hf.evaluation import series
    from tinyllama_hf.report import plots

    def no_room(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(plots, "training_panels", no_room)
    monkeypatch.setattr(series, "held_out_documents", lambda *_: held_out_documents("gone"))
    assert run_script(recipe, "evaluate_at_milestones=inline") == 0
    run, printed = Path(load_pretrain_config(recipe).output_dir), capsys.readouterr().out
    names = [folder.name for folder in list_milestones(run)]
    assert len(names) == 2 and not (run / "scores.json").exists()
    for name in names:
        assert f"{name}: not scored (" in printed
    assert f"`tinyllama-hf eval text {run}`" in printed
    assert re.search(r"training\.png: not drawn \(.*No space left on device\)", printed)


def test_training_goes_on_where_a_record_is_gone_or_a_card_cannot_be_written(recipe, capsys, monkeypatch):
    """With a milestone without provenance.json, which the picture needs, and a card that fails."""
    from tinyllama_hf.hub import card

    def fails(*_):
        raise KeyError("preset")

    monkeypatch.setattr(card, "milestone_card", fails)
    config = load_pretrain_config(recipe, ["milestones.tokens=[512]"])

    def archive(run: Path, milestone: Path) -> None:
        (milestone / "provenance.json").unlink()

    pretrain(config, hooks=Hooks(SCRIPT.write_card, archive, SCRIPT.TrainingPicture()))
    printed = capsys.readouterr().out
    assert re.search(
        r"training.png: not drawn \(milestone .*: provenance.json is missing[^\n]*\); training continues", printed
    )
    assert re.search(r"^step-2-token-[\d.]+M: no card \(.*'preset'\); training continues", printed, re.MULTILINE)
    assert read_metrics(Path(config.output_dir))[-1]["step"] == 12


def test_the_measured_rate_is_that_of_the_runs_precision(recipe, capsys, monkeypatch):
    dtypes = []
    monkeypatch.setattr(loop, "measure_matmul_flops", lambda device, dtype: dtypes.append(dtype) or 1e9)
    for precision in ("fp32", "bf16"):
        settings = [f"training.precision={precision}", f"output_dir={recipe.parent / precision}"]
        pretrain(
            load_pretrain_config(recipe, [*settings, "training.total_tokens=1024", "milestones.tokens=[]"]),
            measure_peak=True,
        )
        rows = [row for row in read_metrics(recipe.parent / precision) if "loss" in row]
        assert {row["matmul_precision"] for row in rows} == {precision}
        assert f"1.0 GFLOP/s, measured, of matrix products in {precision}" in capsys.readouterr().out
    assert dtypes == [torch.float32, torch.bfloat16]


class TestIncremental:
    def test_other_text_is_refused(self, finished, tmp_path, corpus, tokenizer_folder):
        """And the file stays unchanged without --rescore."""
        run, _ = finished
        prepare(
            [str(corpus)], tokenizer_folder, tmp_path / "other", validation_fraction=0.2, workers=1, progress=False
        )
        output = tmp_path / "scores.json"
        score([str(run)], output=output)
        before = output.read_text()
        with pytest.raises(InputError, match=r"has scores on other text(?s:.*)--rescore"):
            score([str(run)], [str(tmp_path / "other")], output=output)
        assert output.read_text() == before
        score([str(run)], [str(tmp_path / "other")], output=output, rescore=True)
        scores = json.loads(output.read_text())
        assert [data["path"] for data in scores["data"]] == [str(tmp_path / "other")] and len(scores["models"]) == 2

    def test_a_file_of_another_task_is_refused(self, finished, tmp_path):
        run, _ = finished
        (tmp_path / "commonsense.json").write_text('{"task": "commonsense"}')
        with pytest.raises(InputError, match="bits_per_byte scores"):
            score([str(run)], output=tmp_path / "commonsense.json")

    def test_another_protocol_is_refused(self, finished, tmp_path):
        run, _ = finished
        output = tmp_path / "scores.json"
        score([str(run)], output=output)
        scores = json.loads(output.read_text())
        scores["models"] = scores["models"][:1]
        scores["models"][0]["protocol"] |= {"dtype": "bfloat16"}
        write_json(output, scores)
        with pytest.raises(InputError, match=r"bfloat16.*float32.*--rescore"):
            score([str(run)], output=output)
        assert json.loads(output.read_text()) == scores

    def test_a_run_that_was_moved_is_not_scored_again(self, finished, tmp_path, monkeypatch):
        from tinyllama_hf.evaluation import series

        run, _ = finished
        first = score([str(run)], output=run / "scores.json")
        moved = Path(shutil.copytree(run, tmp_path / "elsewhere"))
        monkeypatch.setattr(series, "_score_folder", lambda *_: pytest.fail("scored again"))
        assert score([str(moved)], output=moved / "scores.json").models == first.models

    def test_counting_models_are_not_fitted_again(self, finished, tmp_path, monkeypatch):
        from tinyllama_hf.evaluation.held_out import baselines

        run, _ = finished
        output = tmp_path / "scores.json"
        first = score([str(run)], baselines=True, output=output)
        assert len(first.baselines) == 4
        monkeypatch.setattr(baselines, "NGramModel", lambda *_: pytest.fail("fitted again"))
        assert score([str(run)], baselines=True, output=output).baselines == first.baselines

    def test_what_is_scored_is_not_scored_again(self, finished, tmp_path, monkeypatch):
        from tinyllama_hf.evaluation import series

        run, _ = finished
        output = tmp_path / "scores.json"
        first = score([str(run)], output=output)
        monkeypatch.setattr(series, "_score_folder", lambda *_: pytest.fail("scored again"))
        assert score([str(run)], output=output).models == first.models

    def test_a_killed_call_keeps_what_it_had(self, finished, tmp_path, monkeypatch):
        from tinyllama_hf.evaluation import series

        run, _ = finished
        output, real, calls = tmp_path / "scores.json", series._score_folder, []

        def once(*arguments):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return real(*arguments)

        monkeypatch.setattr(series, "_score_folder", once)
        with pytest.raises(KeyboardInterrupt):
            score([str(run)], output=output)
        assert len(json.loads(output.read_text())["models"]) == 1
        assert len(score([str(run)], output=output).models) == 2 and len(calls) == 3

    def test_a_milestone_that_was_written_again_is_scored_again(self, finished, tmp_path):
        run, _ = finished
        output = tmp_path / "scores.json"
        score([str(run)], output=output)
        before = json.loads(output.read_text())
        before["models"][0] |= {"created": "2020-01-01T00:00:00+00:00", "bits_per_byte": 99.0}
        write_json(output, before)
        assert score([str(run)], output=output).models[0].bits_per_byte < 20


def test_watch_scores_as_they_appear(recipe):
    """Training in this thread and watching in another, which ends after the last milestone."""
    config = load_pretrain_config(recipe)
    run, lines = Path(config.output_dir), []
    watcher = threading.Thread(target=watch, args=(run, "cpu", run / "scores.json", 0.05, lines.append))

    def first_checkpoint(_: Path) -> None:
        if not watcher.is_alive() and not lines:
            watcher.start()

    pretrain(config, hooks=Hooks(after_checkpoint=first_checkpoint))
    watcher.join(60)
    assert [line.split()[-1] for line in lines] == [folder.name for folder in list_milestones(run)]
    assert len(json.loads((run / "scores.json").read_text())["models"]) == 2


def test_watch_refuses_at_once_what_it_could_not_score(recipe, tmp_path):
    config = load_pretrain_config(recipe)
    run = Path(config.output_dir)
    with pytest.raises(InputError, match=r"is not a run folder.*training\.yaml"):
        watch(run, "cpu", run / "scores.json", 1, print)
    (run / "milestones").mkdir(parents=True)
    values = config.model_copy(
        update={"data": config.data.model_copy(update={"sources": [SourceSection(path="gone", weight=1)]})}
    )
    (run / "training.yaml").write_text(values.to_yaml())
    with pytest.raises(InputError, match="data folder gone does not exist"):
        watch(run, "cpu", run / "scores.json", 1, print)


@pytest.mark.slow
def test_the_watching_command_ends_after_the_last_milestone_or_when_interrupted(finished, tmp_path):
    run, _ = finished
    command = [str(Path(sys.executable).parent / "tinyllama-hf"), "eval", str(run), "--watch", "--every", "0.1"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("bits per byte") == 2, done.stderr
    assert done.stdout.endswith(f"wrote {run / 'scores.json'}\n")
    unfinished = Path(shutil.copytree(run, tmp_path / "unfinished"))
    shutil.rmtree(list_milestones(unfinished)[-1])
    command[2] = str(unfinished)
    with subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert "bits per byte" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
