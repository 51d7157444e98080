"""Preference tuning: the loss equals a reference of 20 lines, whose log-probabilities are computed once."""

import gc
import json
import re
import shutil
import signal

import datasets
import pytest
import torch
import trl
import yaml
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaModel

from tests.conftest import ROOT
from tests.finetune.runs import COLORS, THINGS
from tests.finetune.test_sft_runs import assert_equal, metrics, weights
from tinyllama_hf.errors import InputError
from tinyllama_hf.finetune import dpo
from tinyllama_hf.finetune.config import ConversationSource, load_preference_config
from tinyllama_hf.finetune.pair_summary import preference_dry_run_lines, preference_lines
from tinyllama_hf.finetune.preference_scores import log_probabilities, preference_scores
from tinyllama_hf.finetune.preferences import read_preferences
from tinyllama_hf.finetune.rendered_pairs import render_pairs
from tinyllama_hf.finetune.replies import reply_loss, score_replies
from tinyllama_hf.finetune.run_callback import DivergedError
from tinyllama_hf.inference.load import load_stock
from tinyllama_hf.pretrain.signals import Stopped


def user(text):
    return {"role": "user", "content": text}


def reply(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path / "datasets"


@pytest.fixture
def pairs(base, tmp_path, cache):
    """A recipe that prefers the color to be said first."""
    rows = [
        {
            "prompt": [user(f"Which {thing} is number {i}?")],
            "chosen": [reply(f"The {color} one." + " Really." * (i % 3))],
            "rejected": [reply(f"One that is {color}")],
        }
        for thing in THINGS
        for i, color in enumerate(COLORS)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = yaml.safe_load((ROOT / "recipes" / "dpo" / "lora.yaml").read_text())
    values["output_dir"] = str(tmp_path / "chat")
    values["model"]["path"] = str(base)
    values["data"] |= {"preferences": str(tmp_path / "pairs.jsonl"), "max_length": 96, "validation_fraction": 0.2}
    values["adapter"]["kind"] = "full"
    values["training"] |= {"epochs": 3, "learning_rate": 1e-3, "sequences_per_step": 8, "micro_batch_size": 4}
    values["evaluation"]["every_steps"] = 3
    values["logging"]["every_steps"] = 2
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml"


def tune(recipe, *overrides, overwrite=False):
    """The stages of recipes/dpo.py; returns the folder and the summary."""
    run = dpo.open_preference_run(load_preference_config(recipe, overrides), overwrite)
    lines = preference_lines(run)
    dpo.tune_preferences(run, overwrite)
    return run.output, "\n".join(lines)


def opened(recipe, *overrides):
    return dpo.open_preference_run(load_preference_config(recipe, overrides), overwrite=True)


@pytest.fixture
def forward_passes(monkeypatch):
    """The number of sequences in each forward pass of any Llama."""
    passes, forward = [], LlamaModel.forward

    def counting(self, input_ids=None, **arguments):
        passes.append(len(input_ids))
        return forward(self, input_ids=input_ids, **arguments)

    monkeypatch.setattr(LlamaModel, "forward", counting)
    return passes


def log_probability(model, prompt, reply):
    ids = torch.tensor([prompt + reply])
    every = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return every[torch.arange(ids.shape[1] - 1), ids[0, 1:]][len(prompt) - 1 :].sum()


def reference_loss(model, base, pairs, beta, loss):
    """DPO as in the papers, one reply at a time, with two models."""
    losses = []
    for prompt, chosen, rejected in pairs:
        ratios = []
        for reply in (chosen, rejected):
            with torch.no_grad():
                known = log_probability(base, prompt, reply)
            ratios.append(log_probability(model, prompt, reply) - known)
        if loss == "ipo":
            difference = ratios[0] / len(chosen) - ratios[1] / len(rejected)
            losses.append((difference - 1 / (2 * beta)) ** 2)
        else:
            margin = beta * (ratios[0] - ratios[1])
            losses.append(-torch.log(torch.sigmoid(margin)) if loss == "sigmoid" else (1 - margin).clamp(min=0))
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("loss", "beta"), [("sigmoid", 0.1), ("sigmoid", 0.5), ("ipo", 0.5), ("hinge", 0.1)])
def test_loss_and_gradients_equal_the_reference(pairs, base, loss, beta, monkeypatch):
    options = (f"preference.loss={loss}", f"preference.beta={beta}", "training.micro_batch_size=8")
    run, seen = opened(pairs, *options, "training.epochs=1", "training.schedule=constant"), []
    training_step = trl.DPOTrainer.training_step
    untrained = load_stock(base)[0]

    def compare(self, model, inputs, *arguments):
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        found = training_step(self, model, inputs, *arguments)
        copy = LlamaForCausalLM(model.config)
        copy.load_state_dict(state)
        batch = [run.train[number] for number in run.order.steps[len(seen)]]
        expected = reference_loss(copy, untrained, batch, beta, loss)
        expected.backward()
        seen.append(abs(found.item() - expected.item()) / max(1, abs(expected.item())))
        for (name, ours), theirs in zip(model.named_parameters(), copy.parameters(), strict=True):
            scale = theirs.grad.abs().max()
            assert (ours.grad - theirs.grad).abs().max() <= 1e-5 * scale + 1e-7, name
        known, scored = log_probabilities(untrained, batch), log_probabilities(copy.eval(), batch)
        scores = preference_scores(batch, scored, known, run.config.preference)
        assert scores["validation_loss"] == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
        return found

    monkeypatch.setattr(trl.DPOTrainer, "training_step", compare)
    dpo.tune_preferences(run)
    assert len(seen) == 5 and max(seen) < 1e-6


@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_the_second_run_computes_no_reference(pairs, kind, forward_passes):
    options = (f"adapter.kind={kind}", "adapter.dropout=0.1")
    folder, lines = tune(pairs, *options)
    first, expected, rows = list(forward_passes), weights(folder), metrics(folder)
    assert "log-probabilities take 6 forward passes" in lines
    forward_passes.clear()
    _, lines = tune(pairs, *options, overwrite=True)
    assert "MB): 0 forward passes" in lines
    # Each has both replies: of at most 8 pairs for the reference, of 4 in training.
    assert forward_passes == first[6:] and first[:6] == [16, 16, 16, 16, 2, 14]
    assert sorted(forward_passes) == 26 * [8] + 6 * [14]  # with five evaluations in training and one of the result
    assert_equal(weights(folder), expected)
    assert metrics(folder) == rows
    # Another run finds it too, unless the reference is another one.
    forward_passes.clear()
    tune(pairs, *options, "preference.beta=0.3", "training.micro_batch_size=8", "training.epochs=1", overwrite=True)
    assert sorted(forward_passes) == 3 * [14] + 5 * [16]


@pytest.mark.parametrize(
    ("kind", "change", "is_found"),
    [
        ("full", "preference.beta=0.5", True),
        ("full", "training.seed=1", True),
        ("full", "training.micro_batch_size=2", True),
        ("lora", "training.learning_rate=1", True),
        ("lora", "training.seed=1", False),
        ("lora", "adapter.rank=4", False),
        ("full", "adapter.kind=lora", False),
        ("full", "training.precision=bf16", False),
        ("full", "data.validation_fraction=0.3", False),
        ("full", "template", False),
        ("full", "data", False),
        ("full", "model", False),
        ("full", "config", False),
    ],
)
def test_the_reference_is_found_only_for_the_same_one(pairs, base, tmp_path, kind, change, is_found):
    options = (f"adapter.kind={kind}", "training.epochs=0.1")
    tune(pairs, *options)
    if change == "template":
        template = (ROOT / "tinyllama_hf" / "chat" / "llama2.jinja").read_text()
        (tmp_path / "other.jinja").write_text(template.replace("[INST]", "[ASK]"))
        change = f"chat.template={tmp_path / 'other.jinja'}"
    elif change == "data":
        file = tmp_path / "pairs.jsonl"
        file.write_text(file.read_text().replace("Really", "Truly"))
        change = "data.validation_fraction=0.2"
    elif change in ("model", "config"):
        shutil.copytree(base, tmp_path / "model")
        if change == "model":
            model = load_stock(base)[0]
            model.lm_head.weight.data[7] += 0.1
            model.save_pretrained(tmp_path / "model")
        else:
            config = json.loads((base / "config.json").read_text())
            (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
        change = f"model.path={tmp_path / 'model'}"
    assert opened(pairs, *options, change).references.is_complete == is_found


@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_there_is_no_second_model(pairs, kind, monkeypatch):
    evaluate, counts = dpo.PreferenceTraining.evaluate, []

    def count(self, model):
        gc.collect()
        counts.append(sum(type(thing) is LlamaForCausalLM for thing in gc.get_objects()))
        return evaluate(self, model)

    gc.collect()
    before = sum(type(thing) is LlamaForCausalLM for thing in gc.get_objects())
    monkeypatch.setattr(dpo.PreferenceTraining, "evaluate", count)
    tune(pairs, f"adapter.kind={kind}")
    assert counts == 6 * [before + 1]


def test_the_scores(pairs, base):
    """Those before training are of the untrained model, and those of the finished model are in its record."""
    folder, _ = tune(pairs)
    run, rows = opened(pairs), [row for row in metrics(folder) if "validation_loss" in row]
    policy, reference = (log_probabilities(load_stock(path)[0], run.held_out) for path in (folder, base))
    first = preference_scores(run.held_out, reference, reference, run.config.preference)
    assert first["validation_accuracy"] == 0.5 and first["validation_loss"] == pytest.approx(0.6931472)
    assert rows[0] == {"step": 0, "tokens": 0, **first}
    last = preference_scores(run.held_out, policy, reference, run.config.preference)
    assert last["validation_accuracy"] == 1 and last["validation_likelier"] > first["validation_likelier"]
    record = json.loads((folder / "provenance.json").read_text())
    for name in ("loss", "accuracy", "margin", "likelier"):
        found = record[f"held_out_{name}"]
        assert found["before"] == pytest.approx(first[f"validation_{name}"])
        assert found["after"] == pytest.approx(last[f"validation_{name}"], rel=1e-4)
    assert rows[-1]["validation_loss"] == pytest.approx(last["validation_loss"], rel=1e-4)
    assert record["preferences"] == {
        "source": run.config.data.preferences[0].path,
        "train": 33,
        "held_out": 7,
        "dropped": 0,
    }


@pytest.fixture
def signal_at(monkeypatch):
    """Sends a signal to this process in its evaluation of this number, counted from 0."""

    def send(number):
        evaluate, calls = dpo.PreferenceTraining.evaluate, []

        def evaluate_and_send(self, model):
            if len(calls) == number:
                signal.raise_signal(signal.SIGTERM)
            calls.append(None)
            return evaluate(self, model)

        monkeypatch.setattr(dpo.PreferenceTraining, "evaluate", evaluate_and_send)

    return send


@pytest.mark.parametrize(
    "options",
    [
        ("adapter.kind=lora", "adapter.dropout=0.1", "training.learning_rate=1e-2"),
        pytest.param((), marks=pytest.mark.slow),
    ],
)
def test_stopped_and_resumed_it_equals_the_uninterrupted_run(pairs, signal_at, options, monkeypatch):
    folder, _ = tune(pairs, *options)
    expected, rows = weights(folder), metrics(folder)
    signal_at(2)
    with pytest.raises(Stopped, match=r"SIGTERM after step 6. The same command resumes from .*checkpoint-6"):
        tune(pairs, *options, overwrite=True)
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder.parent / "datasets")
    tune(pairs, *options)
    assert_equal(weights(folder), expected)
    assert metrics(folder) == rows
    with pytest.raises(InputError, match="holds a finished model"):
        tune(pairs, *options)


def test_it_resumes_only_with_the_same_loss(pairs, signal_at, monkeypatch):
    signal_at(2)
    with pytest.raises(Stopped):
        tune(pairs)
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"(?s)other settings or data.*preference.beta: was 0.1, is 0.2"):
        tune(pairs, "preference.beta=0.2")


def test_accumulation_1_x_8_equals_8_x_1(pairs):
    options = ("training.epochs=1",)
    folder, _ = tune(pairs, *options, "training.micro_batch_size=8")
    whole = weights(folder)
    tune(pairs, *options, "training.micro_batch_size=1", overwrite=True)
    for name, weight in weights(folder).items():
        torch.testing.assert_close(weight, whole[name], atol=2e-6, rtol=0, msg=name)


def test_training_that_diverged(pairs):
    with pytest.raises(DivergedError, match=r"step \d+: the loss or the gradient is not finite"):
        tune(pairs, "training.learning_rate=1e30", "training.schedule=constant", "training.warmup_steps=0")


@pytest.mark.slow
def test_two_processes_equal_one(pairs, run_command, tmp_path):
    one, _ = tune(pairs)
    expected, rows = weights(one), metrics(one)
    command = ("torchrun", "--nproc_per_node", "2", ROOT / "recipes" / "dpo.py", pairs, "--overwrite")
    cache = {"HF_DATASETS_CACHE": str(tmp_path / "other")}
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **cache}
    done = run_command(*command, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "2 processes x 1 x 4" in done.stdout and done.stdout.count("wrote ") == 1
    two = weights(one)
    for name in expected:
        torch.testing.assert_close(two[name], expected[name], atol=1e-6, rtol=0, msg=name)
    for row, other in zip(metrics(one), rows, strict=True):
        assert row == pytest.approx(other, rel=1e-4)
    done = run_command(*command, cwd=tmp_path, env=environment)
    assert "MB): 0 forward passes" in done.stdout, done.stderr
    assert_equal(weights(one), two)


@pytest.mark.slow
def test_qlora(pairs, forward_passes):
    options = ("adapter.kind=qlora", "training.learning_rate=1e-2", "training.epochs=1")
    folder, _ = tune(pairs, *options)
    first, expected = list(forward_passes), weights(folder)
    forward_passes.clear()
    tune(pairs, *options, overwrite=True)
    assert len(first) - len(forward_passes) == 6
    assert_equal(weights(folder), expected)


def test_the_finished_folder_chats_and_its_held_out_replies_can_be_scored(pairs):
    folder, _ = tune(pairs)
    run = opened(pairs)
    examples = [pair.examples()[0] for pair in run.held_out]
    row = score_replies([str(folder)], device="cpu", max_new_tokens=8)[0]
    assert row.replies == 7
    assert row.loss == pytest.approx(reply_loss(load_stock(folder)[0], examples), rel=1e-4)
    assert {sample.true for sample in row.samples} <= {
        f"The {color} one." + " Really." * i for color in COLORS for i in range(3)
    }
    held_out = read_preferences([ConversationSource(path=str(folder / "validation.jsonl"))]).pairs
    assert render_pairs(run.tokenizer, held_out, 96)[0] == run.held_out


def test_dry_run(pairs, tmp_path):
    run = opened(pairs)
    text = "\n".join([*preference_lines(run), *preference_dry_run_lines(run)])
    assert "33 for training, 7 held out" in text
    assert "sigmoid with beta 0.1" in text
    assert re.search(r"prompt    <s> \[INST\] Which \w+ is number \d\? \[/INST\]\nchosen    ⟦The \w+ one", text)
    assert re.search(r"rejected  ⟦One that is \w+ </s>⟧", text)
    assert not (tmp_path / "chat").exists() and not (tmp_path / "datasets").exists()
