"""Fine-tuning runs: they resume bit for bit, keep the best model, stop early, and leave nothing half-written."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.finetune.runs import finetune, tuned
from tests.pretrain.test_trackers import scalars
from tinyllama_hf.errors import InputError
from tinyllama_hf.finetune import run_checkpoints, sft
from tinyllama_hf.finetune.config import load_finetune_config
from tinyllama_hf.finetune.run_callback import DivergedError
from tinyllama_hf.inference.load import load_stock
from tinyllama_hf.pretrain.signals import Stopped


SHORT = ("training.epochs=3", "evaluation.every_steps=3", "logging.every_steps=2")  # 13 steps
TIMES = {"tokens_per_second", "seconds_left", "peak_memory_bytes"}


def metrics(folder):
    """The rows of the log without times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_equal(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def signal_at(monkeypatch):
    """Sends a signal to this process in its evaluation of this number, counted from 0."""

    def send(number, which=signal.SIGTERM):
        evaluate, calls = sft.FinetuneRun.evaluate, []

        def evaluate_and_send(self, model):
            if len(calls) == number:
                signal.raise_signal(which)
            calls.append(None)
            return evaluate(self, model)

        monkeypatch.setattr(sft.FinetuneRun, "evaluate", evaluate_and_send)

    return send


@pytest.mark.parametrize(
    "options",
    [
        ("training.packing=true",),
        pytest.param(("training.packing=false", "training.micro_batch_size=4"), marks=pytest.mark.slow),
        ("adapter.kind=lora", "adapter.dropout=0.1", "training.learning_rate=1e-2", "training.micro_batch_size=2"),
        pytest.param(("adapter.kind=dora", "training.learning_rate=1e-2"), marks=pytest.mark.slow),
    ],
    ids=["packed", "padded", "lora with dropout", "dora"],
)
def test_stopped_and_resumed_it_equals_the_uninterrupted_run(recipe, signal_at, options, monkeypatch, capsys):
    options = (*SHORT, *options)
    folder = tuned(recipe, *options)
    expected, rows = weights(folder), metrics(folder)
    assert len(rows) == 7 + 6, "the last step is in both logs"
    config = load_finetune_config(recipe, options)
    signal_at(2)
    with pytest.raises(Stopped, match=r"SIGTERM after step 6. The same command resumes from .*checkpoint-6"):
        finetune(config, overwrite=True)
    assert not (folder / "model.safetensors").exists()
    monkeypatch.undo()
    finetune(config)
    assert_equal(weights(folder), expected)
    assert metrics(folder) == rows
    assert not (folder / "checkpoints").exists(), "a finished run needs none"
    with pytest.raises(InputError, match="holds a finished model"):
        finetune(config)


def test_a_signal_after_the_last_step_does_not_stop_it(recipe, signal_at):
    signal_at(5, signal.SIGINT)
    folder = tuned(recipe, *SHORT)
    assert (folder / "provenance.json").is_file()


def test_it_resumes_only_with_the_same_settings_and_data(recipe, signal_at, monkeypatch):
    signal_at(2)
    with pytest.raises(Stopped):
        tuned(recipe, *SHORT)
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"(?s)other settings or data.*training.learning_rate: was 0.005, is 0.001"):
        tuned(recipe, *SHORT, "training.learning_rate=1e-3")
    talk = recipe.with_name("talk.jsonl")
    talk.write_text(talk.read_text().replace("blue", "pink"))
    with pytest.raises(InputError, match=r"(?s)other settings or data.*\n  data: was "):
        tuned(recipe, *SHORT)


def test_an_incomplete_checkpoint_is_not_used(recipe, signal_at, monkeypatch):
    folder = tuned(recipe, *SHORT)
    expected = weights(folder)
    config = load_finetune_config(recipe, SHORT)
    signal_at(3)
    with pytest.raises(Stopped):
        finetune(config, overwrite=True)
    monkeypatch.undo()
    assert list(run_checkpoints.checkpoint_folders(folder)) == [6, 9]
    with (folder / "checkpoints" / "checkpoint-9" / "optimizer.pt").open("ab") as file:
        file.truncate(1000)
    assert run_checkpoints.last_checkpoint(folder)[0] == 6
    finetune(config)
    assert_equal(weights(folder), expected)


@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_the_best_model_is_kept(recipe, monkeypatch, kind):
    """The held-out losses are replaced, so that the second evaluation is the best one; its weights are written."""
    losses, seen, ids = iter([9.0, 5.0, 1.0, 3.0, 4.0, 6.0]), [], torch.arange(3, 40)[None]

    def evaluate(self, model):
        with torch.no_grad():
            seen.append(model.eval()(ids).logits)
        return {"validation_loss": next(losses)}

    monkeypatch.setattr(sft.FinetuneRun, "evaluate", evaluate)
    folder = tuned(recipe, *SHORT, f"adapter.kind={kind}", "training.learning_rate=1e-2")
    found = load_stock(folder)[0](ids).logits
    torch.testing.assert_close(found, seen[2], atol=1e-4, rtol=1e-4)
    assert min((found - other).abs().max() for i, other in enumerate(seen) if i != 2) > 0.01
    record = json.loads((folder / "provenance.json").read_text())
    assert (record["steps"], record["kept_step"]) == (13, 6)


def test_it_stops_early(recipe, monkeypatch):
    losses = iter([9.0, 5.0, 1.0, 3.0, 4.0, 6.0])
    monkeypatch.setattr(sft.FinetuneRun, "evaluate", lambda self, model: {"validation_loss": next(losses)})
    folder = tuned(recipe, *SHORT, "evaluation.patience=2", "evaluation.keep=last")
    record = json.loads((folder / "provenance.json").read_text())
    assert (record["steps"], record["kept_step"]) == (12, 12)
    assert [row["validation_loss"] for row in metrics(folder) if "validation_loss" in row] == [9, 5, 1, 3, 4]


def test_a_run_that_ended_early_does_not_train_on_when_its_model_could_not_be_written(recipe, monkeypatch):
    options = (*SHORT, "evaluation.patience=2", "evaluation.keep=last")
    losses, write = iter([9.0, 5.0, 1.0, 3.0, 4.0]), sft.write_tuned_folder
    monkeypatch.setattr(sft.FinetuneRun, "evaluate", lambda self, model: {"validation_loss": next(losses)})

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(sft, "write_tuned_folder", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tuned(recipe, *options)
    expected = load_file(recipe.parent / "chat" / "checkpoints" / "checkpoint-12" / "model.safetensors")
    monkeypatch.setattr(sft, "write_tuned_folder", write)
    folder = tuned(recipe, *options)
    assert_equal(weights(folder), expected)
    assert json.loads((folder / "provenance.json").read_text())["steps"] == 12


def test_trackers_have_the_rows_of_the_log(recipe):
    folder = tuned(recipe, *SHORT, "logging.trackers=tensorboard")
    rows = metrics(folder)
    for name in ("loss", "validation_loss"):
        assert dict(scalars(folder, name)) == pytest.approx({row["step"]: row[name] for row in rows if name in row})


def test_training_that_diverged(recipe):
    diverging = ["training.learning_rate=1e30", "training.schedule=constant", "training.warmup_steps=0"]
    with pytest.raises(DivergedError, match=r"step \d+: the loss or the gradient is not finite.*1e\+30"):
        finetune(load_finetune_config(recipe, diverging))
    assert not (recipe.parent / "chat" / "model.safetensors").exists()


def test_an_output_that_is_something_else(recipe):
    (recipe.parent / "chat").mkdir()
    (recipe.parent / "chat" / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(InputError, match=r"output_dir .* is not empty.*not a fine-tuned model"):
            finetune(load_finetune_config(recipe), overwrite)
    assert (recipe.parent / "chat" / "thesis.txt").exists()


# Kills its own process at the n-th call of a function of a module, before or after the call.
_KILLED = """
import importlib, os, runpy, signal, sys
module, name, number = importlib.import_module(sys.argv[1]), sys.argv[2], int(sys.argv[3])
called, calls = getattr(module, name), []
def killing(*arguments, **options):
    calls.append(None)
    if len(calls) == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return called(*arguments, **options)
setattr(module, name, killing)
sys.argv = sys.argv[4:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_killed_five_times_it_has_the_same_weights(recipe):
    """By SIGKILL: between steps, inside a checkpoint, and while the finished model is written."""
    options = (*SHORT, "evaluation.every_steps=2", "adapter.kind=lora", "adapter.dropout=0.1")
    folder = tuned(recipe, *options)
    expected, rows = weights(folder), metrics(folder)
    finetune_again = [str(ROOT / "recipes" / "sft.py"), str(recipe), *options]
    places = [
        ("tinyllama_hf.finetune.sft", "summed_reply_loss", 3),
        ("tinyllama_hf.finetune.run_callback", "complete_checkpoint", 2),
        ("tinyllama_hf.finetune.sft", "summed_reply_loss", 3),
        ("tinyllama_hf.finetune.run_callback", "remove_checkpoints", 1),
        ("tinyllama_hf.finetune.tuned_folder", "load_stock", 2),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for number, (module, name, call) in enumerate(places):
        command = [sys.executable, "-c", _KILLED, module, name, str(call), *finetune_again]
        command += [] if number else ["--overwrite"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (folder / "provenance.json").exists()
    tuned(recipe, *options)
    assert_equal(weights(folder), expected)
    assert metrics(folder) == rows


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["true", "false"])
def test_two_processes_equal_one(recipe, run_command, packing):
    options = (*SHORT, "training.learning_rate=1e-3", f"training.packing={packing}")
    one = tuned(recipe, *options)
    expected, rows = weights(one), metrics(one)
    script = ROOT / "recipes" / "sft.py"
    changed = ("training.micro_batch_size=2", "--overwrite")
    command = ("torchrun", "--nproc_per_node", "2", script, recipe, *options, *changed)
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = run_command(*command, cwd=recipe.parent, env=environment)
    assert done.returncode == 0, done.stderr
    assert "2 processes x 2 x 2" in done.stdout and done.stdout.count("wrote ") == 1
    two = weights(recipe.parent / "chat")
    for name in expected:
        torch.testing.assert_close(two[name], expected[name], atol=1e-6, rtol=0, msg=name)
    for row, other in zip(metrics(one), rows, strict=True):
        assert row == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("packing", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_accumulation_1_x_8_equals_8_x_1(recipe, packing):
    """The loss is summed over the tokens with loss of the whole step."""
    options = ("training.epochs=1", "training.learning_rate=1e-3", f"training.packing={packing}")
    whole = weights(tuned(recipe, *options, "training.micro_batch_size=8"))
    finetune(load_finetune_config(recipe, [*options, "training.micro_batch_size=1"]), overwrite=True)
    parts = weights(recipe.parent / "chat")
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=2e-6, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("full", "training.packing=false"),
        ("lora", "training.activation_checkpointing=true"),
        pytest.param("lora", "training.packing=false", marks=pytest.mark.slow),
        pytest.param("full", "training.activation_checkpointing=true", marks=pytest.mark.slow),
    ],
)
def test_memory_and_speed_options_do_not_change_the_run(recipe, kind, change):
    options = ("training.epochs=2", "training.learning_rate=1e-3", f"adapter.kind={kind}")
    folder = tuned(recipe, *options)
    expected, rows = weights(folder), metrics(folder)
    finetune(load_finetune_config(recipe, [*options, change]), overwrite=True)
    for row, other in zip(metrics(folder), rows, strict=True):
        assert row == pytest.approx(other, rel=1e-4)
    for name, weight in weights(folder).items():
        torch.testing.assert_close(weight, expected[name], atol=2e-5, rtol=0, msg=name)
