"""Fine-tuning: what is trained and written, and that TRL gets exactly our tokens."""

import hashlib
import json
import os
import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.chat.test_masks import chatml_of
from tests.conftest import ROOT
from tests.finetune.runs import COLORS, finetune, tuned
from tinyllama_hf import load_tokenizer
from tinyllama_hf.devices import format_bytes
from tinyllama_hf.errors import InputError
from tinyllama_hf.evaluation.models import list_eval_models
from tinyllama_hf.finetune import opened_base, sft
from tinyllama_hf.finetune.config import load_finetune_config
from tinyllama_hf.finetune.conversations import HELD_OUT_FILE, read_conversations, render_all
from tinyllama_hf.finetune.replies import generate_replies, reply_loss, score_model_replies
from tinyllama_hf.finetune.run_callback import RunCallback
from tinyllama_hf.finetune.run_summary import summary_lines
from tinyllama_hf.inference.load import load, load_stock


def test_full_fine_tuning_leaves_a_plain_folder_that_replies_and_stops(recipe, base):
    folder = tuned(recipe)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    assert config["rope_theta"] == 10000.0 and config.get("pad_token_id") is None and config["use_cache"] is True
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["pad_token_id"], generation["eos_token_id"]) == (0, 2)
    assert not (folder / "adapter").exists()
    record = json.loads((folder / "provenance.json").read_text())
    losses = record["held_out_loss"]
    model, stock_tokenizer = load_stock(folder)
    conversations = read_conversations(str(folder / HELD_OUT_FILE))
    rendered = render_all(load_tokenizer(folder), conversations, 96).examples
    assert (
        losses["after"] == pytest.approx(reply_loss(model, rendered), abs=1e-6)
        and losses["after"] < losses["before"] / 2
    )
    assert losses["before"] == pytest.approx(reply_loss(load_stock(base)[0], rendered), abs=1e-6)
    scores = score_model_replies(model, load_tokenizer(folder), [c.messages for c in conversations], 24)
    assert scores.stop_rate == 1.0 and scores.median_length > 3
    (described,) = list_eval_models([str(folder)])
    assert (described.name, described.step, described.tokens) == ("chat", None, None), "is not a milestone"
    assert all(sample.reply.startswith("The ") for sample in scores.samples)
    asked = stock_tokenizer.apply_chat_template(
        conversations[0].messages[:1], return_tensors="pt", return_dict=True, add_generation_prompt=True
    )
    reply = model.generate(**asked, max_new_tokens=24, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert stock_tokenizer.decode(reply, skip_special_tokens=True).strip() == scores.samples[0].reply
    assert load_finetune_config(folder / "training.yaml").model_dump() == load_finetune_config(recipe).model_dump()


def test_the_reply_loss_is_that_of_a_plain_loop(recipe, base):
    run = sft.open_run(load_finetune_config(recipe))
    model, _ = load_stock(base)
    total = count = 0
    for rendering in run.held_out.examples:
        logits = model(torch.tensor([rendering.input_ids])).logits[0].log_softmax(-1)
        for i, mask in enumerate(rendering.assistant_masks):
            if mask:
                total -= logits[i - 1, rendering.input_ids[i]].item()
                count += 1
    assert reply_loss(model, run.held_out.examples, batch_size=3) == pytest.approx(total / count, abs=1e-5)


def test_trl_trains_on_exactly_our_tokens(recipe, base, monkeypatch):
    """The ids and labels of the first batch are our rendering, and one step equals a hand-written one."""
    import trl

    seen = []
    stock_step = trl.SFTTrainer.training_step

    def watch(self, model, inputs, *arguments, **options):
        seen.append({name: value.clone() for name, value in inputs.items() if torch.is_tensor(value)})
        return stock_step(self, model, inputs, *arguments, **options)

    monkeypatch.setattr(trl.SFTTrainer, "training_step", watch)
    once = ("training.epochs=0.2", "training.schedule=constant", "training.warmup_steps=0")
    folder = tuned(recipe, *once, "training.packing=false")
    assert len(seen) == 1, "32 conversations in steps of 8, a fifth of an epoch"
    run = sft.open_run(load_finetune_config(recipe), overwrite=True)
    ours = {tuple(r.input_ids): r.assistant_masks for r in run.train.examples}
    for ids, labels, attention in zip(*(seen[0][n] for n in ("input_ids", "labels", "attention_mask")), strict=True):
        length = int(attention.sum())
        masks = ours[tuple(ids[:length].tolist())]
        assert [int(label != -100) for label in labels[:length]] == masks
        assert torch.equal(labels[:length][torch.tensor(masks) == 1], ids[:length][torch.tensor(masks) == 1])
        assert (labels[length:] == -100).all()
    model = load_stock(base)[0].train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    logits = model(seen[0]["input_ids"], attention_mask=seen[0]["attention_mask"]).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, seen[0]["labels"][:, 1:].flatten(), ignore_index=-100).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    written = load_file(folder / "model.safetensors")
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(written[name], weight, atol=2e-4, rtol=0, msg=name)


def test_lora_writes_the_merged_model_and_the_adapter(recipe, base):
    from peft import PeftModel

    folder = tuned(recipe, "adapter.kind=lora", "training.learning_rate=2e-2")
    record = json.loads((folder / "provenance.json").read_text())
    assert record["held_out_loss"]["after"] < record["held_out_loss"]["before"]
    adapter = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert adapter["r"] == 8 and {name.split(".")[-1] for name in adapter["target_modules"]} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    before, after = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".self_attn." in name or ".mlp." in name}
    with_adapter = PeftModel.from_pretrained(load_stock(base)[0], folder / "adapter").eval()
    ids = torch.arange(3, 40)[None]
    merged = load_stock(folder)[0]
    torch.testing.assert_close(with_adapter(ids).logits, merged(ids).logits, atol=1e-4, rtol=1e-4)


def test_the_same_recipe_gives_the_same_weights(recipe):
    first = load_file(tuned(recipe, "training.epochs=1") / "model.safetensors")
    finetune(load_finetune_config(recipe, ["training.epochs=1"]), overwrite=True)
    second = load_file(recipe.parent / "chat" / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_replies_in_a_batch_equal_replies_alone(recipe):
    folder = tuned(recipe, "training.epochs=3")
    model, tokenizer = load_stock(folder)[0], load_tokenizer(folder)
    prompts = [c.messages[:1] for c in read_conversations(str(folder / HELD_OUT_FILE))]
    prompts[0] = [{"role": "user", "content": "A much longer question than the others, is it not?"}]
    together = generate_replies(model, tokenizer, prompts, 16)
    assert together == [generate_replies(model, tokenizer, [prompt], 16)[0] for prompt in prompts]


class Stopped(Exception):
    """Raised in place of training."""


@pytest.fixture
def trainer_of(monkeypatch):
    """Returns the trainer of a recipe, before its first step."""
    import trl

    def stop(self, resume_from_checkpoint):
        raise Stopped(self)

    monkeypatch.setattr(trl.SFTTrainer, "train", stop)

    def made(recipe, *overrides):
        with pytest.raises(Stopped) as caught:
            finetune(load_finetune_config(recipe, overrides))
        return caught.value.args[0]

    return made


def lora(trainer):
    return trainer.model.peft_config["default"]


def callback(trainer):
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, RunCallback))


# Every key of these sections: a value that differs from the recipe, and where the trainer has it.
REACHES = {
    "adapter.kind": ("dora", lambda t: "dora" if lora(t).use_dora else "lora"),
    "adapter.rank": (3, lambda t: lora(t).r),
    "adapter.alpha": (5.0, lambda t: lora(t).lora_alpha),
    "adapter.dropout": (0.25, lambda t: lora(t).lora_dropout),
    "adapter.targets": (["q_proj", "v_proj"], lambda t: sorted(lora(t).target_modules)),
    "adapter.modules_to_save": (["lm_head"], lambda t: lora(t).modules_to_save),
    "training.epochs": (2.5, lambda t: t.args.max_steps * 12 / 34 // 0.5 / 2),
    "training.learning_rate": (0.003, lambda t: t.args.learning_rate),
    "training.schedule": ("linear", lambda t: t.args.lr_scheduler_type.value),
    "training.warmup_steps": (7, lambda t: t.args.warmup_steps),
    "training.sequences_per_step": (
        12, lambda t: t.args.per_device_train_batch_size * t.args.gradient_accumulation_steps),
    "training.micro_batch_size": (6, lambda t: t.args.per_device_train_batch_size),
    "training.packing": (False, lambda t: t.args.padding_free),
    "training.optimizer": ("adamw_8bit", lambda t: t.args.optim.replace("_bnb", "")),
    "training.weight_decay": (0.13, lambda t: t.args.weight_decay),
    "training.gradient_clip": (0.7, lambda t: t.args.max_grad_norm),
    "training.precision": ("bf16", lambda t: "bf16" if t.args.bf16 else "fp32"),
    "training.activation_checkpointing": (True, lambda t: t.args.activation_checkpointing),
    "training.kernels": ("liger", lambda t: "liger" if t.args.use_liger_kernel else "none"),
    "training.neftune_alpha": (4.0, lambda t: t.args.neftune_noise_alpha),
    "training.seed": (91, lambda t: t.args.seed),
    "evaluation.every_steps": (6, lambda t: callback(t).intervals["evaluation"]),
    "evaluation.keep": ("last", lambda t: "last"),  # tested by what is kept
    "evaluation.patience": (4, lambda t: callback(t).patience),
    "checkpoints.every_steps": (5, lambda t: callback(t).intervals["checkpoints"]),
    "checkpoints.keep": (3, lambda t: callback(t).keep),
    "logging.every_steps": (3, lambda t: callback(t).intervals["logging"]),
    "logging.trackers": (["tensorboard"], lambda t: ["tensorboard"] * len(t.accelerator.trackers)),
}  # fmt: skip


def test_every_key_reaches_the_trainer(recipe, trainer_of, monkeypatch):
    monkeypatch.setattr(opened_base, "check_machine", lambda config: None)  # no GPU here
    names = ("adapter", "training", "evaluation", "checkpoints", "logging")
    sections = {name: load_finetune_config(recipe).model_dump()[name] for name in names}
    assert REACHES.keys() == {f"{section}.{key}" for section, keys in sections.items() for key in keys}
    for key, (value, _) in REACHES.items():
        section, name = key.split(".")
        assert sections[section][name] != value, f"{key} would not be seen to be dropped"
    trainer = trainer_of(recipe, *(f"{key}={json.dumps(value)}" for key, (value, _) in REACHES.items()))
    assert {key: read(trainer) for key, (_, read) in REACHES.items()} == {
        k: value for k, (value, _) in REACHES.items()
    }


def test_three_keys_are_enough(recipe, base, capsys):
    """The rest has defaults, which depend on model and machine, and are printed."""
    short = recipe.with_name("short.yaml")
    values = {"model": {"path": str(base)}, "data": {"conversations": str(recipe.with_name("talk.jsonl"))}}
    short.write_text(yaml.safe_dump(values))
    config = load_finetune_config(short)
    assert (config.output_dir, config.training.learning_rate) == ("runs/short", 2e-5)
    assert load_finetune_config(short, ["adapter.kind=lora"]).training.learning_rate == 2e-4
    run = sft.open_run(config)
    longest = max(len(rendering.input_ids) for rendering in (*run.train.examples, *run.held_out.examples))
    assert (run.config.data.max_length, run.config.training.precision) == (longest, "fp32")
    print(*summary_lines(run), sep="\n")
    printed = " ".join(capsys.readouterr().out.split())
    assert f"data.max_length {longest}" in printed and "data.conversations" not in printed


def test_a_warmup_longer_than_the_run_is_a_warning(recipe, capsys):
    finetune(load_finetune_config(recipe, ["training.epochs=1", "training.warmup_steps=20"]), dry_run=True)
    printed = " ".join(capsys.readouterr().out.split())
    assert "warmup_steps 20 is more than the run has: the highest learning rate is 0.001" in printed


def test_the_data_section_reaches_the_run(recipe):
    """The held-out conversations by the hash of their messages, and the number of those that are too long."""
    talks = [json.loads(line)["messages"] for line in (recipe.parent / "talk.jsonl").read_text().splitlines()]
    digests = [hashlib.sha256(json.dumps(talk, sort_keys=True).encode()).hexdigest() for talk in talks]
    run = sft.open_run(load_finetune_config(recipe, ["data.validation_fraction=0.5"]))
    held_out = [talk for talk, digest in zip(talks, digests, strict=True) if int(digest, 16) < 0.5 * 16**64]
    assert [conversation.messages for conversation in run.held_out.conversations] == held_out
    lengths = sorted(len(rendering.input_ids) for rendering in (*run.train.examples, *run.held_out.examples))
    overrides = ["data.validation_fraction=0.5", f"data.max_length={lengths[20]}"]
    dropped = sft.open_run(load_finetune_config(recipe, [*overrides, "data.too_long=drop"]))
    dropped = (dropped.train.dropped + dropped.held_out.dropped).total()
    assert dropped == sum(length > lengths[20] for length in lengths) > 0
    with pytest.raises(InputError, match=f"longer than data.max_length {lengths[20]}"):
        sft.open_run(load_finetune_config(recipe, overrides))


def test_the_optimizer_follows_the_recipe(recipe):
    """Decay 0.5 at rate 0.01 shrinks a weight without gradient by 0.005. The rate rises for 2 of 5 steps."""
    overrides = (
        "training.epochs=1",
        "training.warmup_steps=2",
        "training.schedule=linear",
        "training.learning_rate=0.01",
        "training.weight_decay=0.5",
        "logging.every_steps=1",
        "data.validation_fraction=0.2",
    )
    folder = tuned(recipe, *overrides)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = [row["learning_rate"] for row in rows if "learning_rate" in row]
    assert rates == pytest.approx([0.0, 0.005, 0.01, 0.02 / 3, 0.01 / 3]), "34 conversations in steps of 8"
    before = load_file(load_finetune_config(recipe).model.path + "/model.safetensors")["model.embed_tokens.weight"]
    after = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    unused = 511  # a token of none of the conversations
    shrunk = before[unused]
    for rate in rates:
        shrunk = shrunk * (1 - rate * 0.5)
    torch.testing.assert_close(after[unused], shrunk, atol=1e-7, rtol=1e-5)


def test_no_held_out_conversation_is_trained_on(recipe, monkeypatch):
    """One epoch trains on each other conversation once, and on none of those in validation.jsonl."""
    import trl

    seen, stock_step = [], trl.SFTTrainer.training_step

    def watch(self, model, inputs, *arguments, **options):
        for ids, attention in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            seen.append(tuple(ids[attention.bool()].tolist()))
        return stock_step(self, model, inputs, *arguments, **options)

    monkeypatch.setattr(trl.SFTTrainer, "training_step", watch)
    folder = tuned(
        recipe,
        "training.epochs=1",
        "training.packing=false",
        "training.sequences_per_step=17",
        "training.micro_batch_size=17",
    )
    tokenizer = load_tokenizer(folder)

    def ids(file):
        rows = [json.loads(line)["messages"] for line in open(file, encoding="utf-8")]
        return [tuple(tokenizer.apply_chat_template(messages, return_dict=False)) for messages in rows]

    held_out = ids(folder / HELD_OUT_FILE)
    rest = [conversation for conversation in ids(recipe.parent / "talk.jsonl") if conversation not in held_out]
    assert len(held_out) >= 3 and len(held_out) + len(rest) == 40
    assert sorted(seen) == sorted(rest)


@pytest.fixture(scope="module")
def chatml_base(base, tokenizer_folder, tmp_path_factory):
    """The base model with its own template, ChatML."""
    folder = tmp_path_factory.mktemp("chatml") / "model"
    tokenizer = chatml_of(tokenizer_folder)
    model, _ = load_stock(base)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_with_a_template_is_trained_in_it(recipe, chatml_base, trainer_of, capsys):
    """ChatML without generation markers: the labels of the first batch are reply and `<|im_end|>` only."""
    trainer = trainer_of(recipe, f"model.path={chatml_base}", "training.packing=false")
    printed = capsys.readouterr().out
    assert [line.split(maxsplit=1)[1] for line in printed.splitlines() if line.startswith("template")] == [
        "the model's own"
    ]
    batch, tokenizer = next(iter(trainer.get_train_dataloader())), load_tokenizer(chatml_base)
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        text = tokenizer.decode(ids)
        assert text.startswith("<|im_start|> user") and "[INST]" not in text
        assert tokenizer.decode(labels[labels != -100]) in [f"The {color} one.<|im_end|>" for color in COLORS]


def test_its_template_is_replaced_only_if_the_recipe_says_so(recipe, chatml_base, capsys):
    finetune(load_finetune_config(recipe, [f"model.path={chatml_base}"]), dry_run=True)
    assert "⟦The red one.<|im_end|>⟧" in capsys.readouterr().out
    finetune(load_finetune_config(recipe, [f"model.path={chatml_base}", "chat.template=llama2"]), dry_run=True)
    printed = capsys.readouterr().out
    assert "llama2, which replaces the model's own" in printed and "⟦The red one. <|im_end|>⟧" in printed


def test_a_model_tuned_in_chatml_stops_at_the_token_that_ends_its_replies(recipe, chatml_base, tmp_path, capsys):
    """The base has the tokens of ChatML, but no template, and would stop at </s>."""
    folder = shutil.copytree(chatml_base, tmp_path / "without")
    (folder / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(folder)
    tokenizer.eos_token = "</s>"
    tokenizer.save_pretrained(folder)
    saved = tuned(recipe, f"model.path={folder}", "chat.template=chatml")
    assert "chatml; <|im_end|> ends a reply and replaces </s> as end-of-sequence token" in capsys.readouterr().out
    model, stock = load_stock(saved)
    assert (stock.eos_token, model.generation_config.eos_token_id) == ("<|im_end|>", stock.eos_token_id)
    messages = [c.messages for c in read_conversations(str(saved / HELD_OUT_FILE))]
    assert score_model_replies(model, load_tokenizer(saved), messages, 24).stop_rate == 1.0


BAD = {
    "longer than the context": (
        ["data.max_length=97"],
        "data.max_length: 97 is longer than the model's context of 96",
    ),
    "conversations that do not fit": (["data.max_length=8"], "conversations are longer than data.max_length 8"),
    "no template of its own": (["chat.template=own"], "chat.template: own, but .* has no chat template"),
    "no such template": (["chat.template=lama2"], "chat template 'lama2'; did you mean 'llama2'"),
    "no such conversations": (["data.conversations=nowhere.jsonl"], "nowhere.jsonl: no such file"),
    "no such model": (["model.path=nowhere"], "model 'nowhere': no such folder"),
}


@pytest.mark.parametrize(("overrides", "message"), BAD.values(), ids=BAD)
def test_bad_input_before_anything_is_written(recipe, overrides, message):
    before = sorted(recipe.parent.rglob("*"))
    with pytest.raises(InputError, match=message):
        finetune(load_finetune_config(recipe, overrides))
    assert sorted(recipe.parent.rglob("*")) == before


def test_a_template_without_markers(recipe, base, tmp_path):
    (tmp_path / "plain.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(InputError, match=r"chat template.*end-of-sequence.*'</s>'"):
        finetune(load_finetune_config(recipe, [f"chat.template={tmp_path / 'plain.jinja'}"]))


@pytest.mark.slow
def test_the_script(recipe, run_command):
    """Through accelerate: a dry run, a short training, then a refusal to overwrite it."""
    env = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    launch = (
        "accelerate",
        "launch",
        "--quiet",
        "--config_file",
        ROOT / "recipes" / "accelerate" / "cpu.yaml",
        ROOT / "recipes" / "sft.py",
        recipe,
    )
    dry = run_command(*launch, "--dry-run", cwd=recipe.parent, env=env)
    assert dry.returncode == 0, dry.stderr
    assert "⟦The red one. </s>⟧" in dry.stdout and "dry run: nothing was written" in dry.stdout
    assert not (recipe.parent / "chat").exists()
    done = run_command(*launch, "training.epochs=1", cwd=recipe.parent, env=env)
    assert done.returncode == 0 and "wrote " in done.stdout, done.stderr
    again = run_command(*launch, cwd=recipe.parent, env=env)
    assert (
        again.returncode != 0 and "pass --overwrite to replace it" in again.stderr and "Traceback" not in again.stderr
    )


def test_the_dry_run_measures_time_and_memory_and_writes_nothing(recipe, capsys):
    before = sorted(recipe.parent.rglob("*"))
    finetune(load_finetune_config(recipe), dry_run=True)
    printed = capsys.readouterr().out
    tokens = int(re.search(r"a pass of ([\d,]+) tokens takes", printed)[1].replace(",", ""))
    run = sft.open_run(load_finetune_config(recipe))
    assert tokens == max(sum(run.order.lengths[number] for number in row) for row in run.order.rows())
    parameters = sum(p.numel() for p in load_stock(run.base)[0].parameters())
    assert f"the optimizer takes {format_bytes(8 * parameters)}" in " ".join(printed.split())
    assert "median " in printed and "█" in printed and "⟦The " in printed
    assert sorted(recipe.parent.rglob("*")) == before


def test_a_base_with_quantized_weights(recipe, base, tmp_path):
    pytest.importorskip("bitsandbytes")
    load(base, quantization="nf4")[0].save_pretrained(tmp_path / "nf4")
    load_tokenizer(base).save_pretrained(tmp_path / "nf4")
    with pytest.raises(InputError, match="already quantized; give the unquantized model"):
        sft.open_run(load_finetune_config(recipe, [f"model.path={tmp_path / 'nf4'}"]))
