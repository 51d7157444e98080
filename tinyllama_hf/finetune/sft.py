"""Supervised fine-tuning with TRL's `SFTTrainer`, on our rendering of conversations. Writes a plain Llama folder."""

import itertools
import json
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers import AutoConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .. import provenance
from ..chat.templates import choose_template
from ..configuration_tinyllama import TinyLlamaConfig
from ..devices import choose_precision
from ..errors import InputError, require
from ..files import new_folder, read_json, write_json, write_text
from ..inference.load import load_stock, model_folder
from ..modeling_tinyllama import TinyLlamaForCausalLM
from ..pretrain.milestones import CONFIG_FILE
from ..progress import quiet_bitsandbytes
from ..text import decode_text
from ..tokenization_tinyllama import load_tokenizer, tokenizer_fingerprint
from .config import FinetuneConfig
from .conversations import (
    HELD_OUT_FILE,
    Conversation,
    TrainingExample,
    read_sources,
    render_all,
    split_conversations,
    write_rows,
)
from .replies import reply_loss


if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from trl import SFTConfig


METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class FinetuneRun:
    """A checked recipe, and what was loaded for it before the first step."""

    config: FinetuneConfig
    output: Path
    base: Path
    tokenizer: PreTrainedTokenizerFast
    template: str
    train: list[TrainingExample]
    held_out: list[TrainingExample]
    held_out_conversations: list[Conversation]
    num_dropped: int
    accumulation_steps: int


def finetune_run(run: FinetuneRun, overwrite: bool = False) -> None:
    """Fine-tunes, and writes a plain Llama folder with chat template and provenance.

    Args:
        run (`FinetuneRun`): from [`open_run`].
        overwrite (`bool`, *optional*, defaults to `False`): replace an earlier fine-tuned model in `output_dir`.

    Raises:
        InputError: if the training diverged; nothing is written then.
    """
    processes = _processes()
    is_main = processes.is_main_process
    before = math.nan
    if is_main:
        before = reply_loss(load_stock(run.base)[0], run.held_out)
        print(f"held-out replies: loss {before:.3f} nats per token before training", flush=True)
    model, history = _train(run)
    if is_main:
        with new_folder(run.output, overwrite) as temporary:
            _save(run, model, temporary)
            after = reply_loss(load_stock(temporary)[0], run.held_out)
            if not math.isfinite(after):
                raise InputError(
                    f"training.learning_rate: {run.config.training.learning_rate}: training diverged, the loss of "
                    "held-out replies is not finite. Nothing was written; lower the learning rate"
                )
            print(f"held-out replies: loss {after:.3f} nats per token after training")
            write_text(temporary / METRICS_FILE, "".join(json.dumps(row) + "\n" for row in history))
            record = provenance.collect(**_record(run), held_out_loss={"before": before, "after": after})
            write_json(temporary / "provenance.json", record)
        chat = f"tinyllama-hf chat {quote(str(run.output))}"
        print(f"wrote {run.output}. Next, for example: {chat}")
    processes.wait_for_everyone()


def open_run(config: FinetuneConfig, overwrite: bool = False) -> FinetuneRun:
    """Checks a recipe and loads tokenizer and conversations. Writes nothing.

    Raises:
        InputError: if model, template, conversations or output cannot be used, or a package is not installed.
    """
    quiet_bitsandbytes()  # which peft imports
    require("trl", "finetune", "fine-tuning")
    require("peft", "finetune", "fine-tuning")
    output = Path(config.output_dir)
    if output.exists() and not output.is_dir():
        raise InputError(f"output_dir {output} is a file. Choose a folder")
    is_finetuned = (output / HELD_OUT_FILE).is_file()
    if output.exists() and any(output.iterdir()) and not (overwrite and is_finetuned):
        hint = "pass --overwrite to replace it" if is_finetuned else "it is not a fine-tuned model"
        raise InputError(f"output_dir {output} is not empty. Choose another folder ({hint})")
    base = model_folder(config.model.path)
    tokenizer = load_tokenizer(base)
    template = choose_template(tokenizer, config.chat.template, config.model.path)
    context = AutoConfig.from_pretrained(base, trust_remote_code=False).max_position_embeddings
    max_length = config.data.max_length or context
    if max_length > context:
        raise InputError(f"data.max_length: {max_length} is longer than the model's context of {context}. Lower it")
    tokenizer.model_max_length = context  # saved with the model
    if config.training.precision == "auto":
        training = config.training.model_copy(update={"precision": choose_precision()})
        config = config.model_copy(update={"training": training})
    conversations = read_sources(config.data.conversations, config.data.invalid).conversations
    parts = split_conversations(conversations, config.data.validation_fraction)
    train, held_out = (
        render_all(tokenizer, part, max_length, config.data.too_long, _processes().is_main_process) for part in parts
    )
    if not train.examples or not held_out.examples:
        raise InputError(f"data.max_length: {max_length} drops all conversations. Raise it")
    longest = config.data.max_length or max(train.max_length, held_out.max_length)
    config = config.model_copy(update={"data": config.data.model_copy(update={"max_length": longest})})
    return FinetuneRun(
        config=config,
        output=output,
        base=base,
        tokenizer=tokenizer,
        template=template,
        train=train.examples,
        held_out=held_out.examples,
        held_out_conversations=held_out.conversations,
        num_dropped=(train.dropped + held_out.dropped).total(),
        accumulation_steps=_accumulation_steps(config, _processes().num_processes),
    )


def print_summary(run: FinetuneRun, dry_run: bool = False) -> None:
    """Prints model, template, conversations, tokens and steps, for a dry run also the first conversation.

    Prints on the main process only.
    """
    processes = _processes()
    if not processes.is_main_process:
        return
    config, training = run.config, run.config.training
    with_loss = sum(sum(example.assistant_masks) for example in run.train)
    tokens = sum(len(example.input_ids) for example in run.train)
    steps = -(-len(run.train) // training.sequences_per_step) * training.epochs
    adapter = "all weights" if config.adapter.kind == "none" else f"LoRA of rank {config.adapter.rank}"
    dropped = f", {run.num_dropped:,} longer than {config.data.max_length} tokens dropped" if run.num_dropped else ""
    print(f"model         {run.base}, {adapter}")
    print(f"template      {run.template}")
    print(f"conversations {len(run.train):,} for training, {len(run.held_out):,} held out{dropped}")
    print(
        f"tokens        {tokens:,} per epoch, {with_loss:,} with loss ({with_loss / tokens:.0%}: replies and stop "
        "tokens)"
    )
    print(
        f"steps         {steps:.0f} of {training.sequences_per_step} conversations, {training.epochs:g} epochs; "
        f"{processes.num_processes} process{'es' * (processes.num_processes > 1)} x {training.micro_batch_size} x "
        f"{run.accumulation_steps}",
        flush=True,
    )
    if training.warmup_steps > steps:
        highest = training.learning_rate * steps / training.warmup_steps
        print(
            f"warning       training.warmup_steps {training.warmup_steps} is more than the run has: the highest "
            f"learning rate is {highest:.3g}, not training.learning_rate {training.learning_rate:g}"
        )
    if defaults := config.describe_defaults():
        print("\n".join(defaults), flush=True)
    if dry_run:
        print(f"first conversation, tokens with loss between ⟦ and ⟧:\n{_first_conversation(run)}")
        print(f"would write {run.output}/ (dry run: nothing was written)")


def _first_conversation(run: FinetuneRun) -> str:
    """Returns the first conversation as text, with the tokens that have loss in brackets."""
    example, parts = run.train[0], []
    for has_loss, tokens in itertools.groupby(zip(*example, strict=True), key=lambda token: token[1]):
        text = decode_text(run.tokenizer, [i for i, _ in tokens], skip_special_tokens=False)
        parts.append(f"⟦{text}⟧" if has_loss else text)
    return " ".join(parts)


def _processes() -> PartialState:
    """Returns the launched processes. `PartialState` (accelerate 1.15) needs `cpu` on a CPU, as Trainer passes it."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def _accumulation_steps(config: FinetuneConfig, num_processes: int) -> int:
    sequences, micro = config.training.sequences_per_step, config.training.micro_batch_size
    if sequences % (micro * num_processes):
        raise InputError(
            f"training.micro_batch_size: {micro} x {num_processes} processes does not divide the {sequences} "
            "sequences of a step. Change one of them"
        )
    return sequences // (micro * num_processes)


def _train(run: FinetuneRun) -> "tuple[LlamaForCausalLM | PeftModel, list[dict[str, float]]]":
    """Trains stock Llama with TRL. Returns the model (with an adapter, a `PeftModel`) and the logged rows."""
    from datasets import Dataset, disable_progress_bars
    from trl import SFTTrainer

    model, _ = load_stock(run.base, "cpu")
    model.config.pad_token_id = run.tokenizer.pad_token_id  # required by TRL and Trainer; `_save` removes it
    if not sys.stderr.isatty():
        disable_progress_bars()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=model.train(),
            args=_arguments(run, scratch),
            train_dataset=Dataset.from_list([rendering._asdict() for rendering in run.train]),
            processing_class=run.tokenizer,
            peft_config=_lora(run.config) if run.config.adapter.kind == "lora" else None,
        )
        trainer.train()
    return trainer.accelerator.unwrap_model(trainer.model), trainer.state.log_history


def _arguments(run: FinetuneRun, scratch: str) -> "SFTConfig":
    from trl import SFTConfig

    training = run.config.training
    return SFTConfig(
        output_dir=scratch,
        num_train_epochs=training.epochs,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.schedule,
        warmup_steps=training.warmup_steps,
        per_device_train_batch_size=training.micro_batch_size,
        gradient_accumulation_steps=run.accumulation_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.gradient_clip,
        bf16=training.precision == "bf16",
        use_cpu=_processes().device.type == "cpu",  # Trainer refuses bf16 on a CPU without it
        seed=training.seed,
        logging_steps=run.config.logging.every_steps,
        logging_nan_inf_filter=False,
        max_length=None,  # no truncation: longer conversations were refused or dropped
        activation_checkpointing=False,  # on by default in TRL
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=not sys.stderr.isatty(),
        save_strategy="no",
        report_to="none",
    )


def _lora(config: FinetuneConfig) -> "LoraConfig":
    from peft import LoraConfig

    adapter = config.adapter
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # peft divides it by the rank, so fractions work
        lora_dropout=adapter.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def _save(run: FinetuneRun, trained: "LlamaForCausalLM | PeftModel", folder: Path) -> None:
    """Writes the plain Llama folder: weights, configs, tokenizer, recipe and held-out conversations.

    An adapter is saved to `adapter/` and merged into the weights.
    """
    from peft import LoraModel, PeftModel

    if isinstance(trained, PeftModel):
        assert isinstance(trained.base_model, LoraModel)
        trained.save_pretrained(str(folder / "adapter"))
        (folder / "adapter" / "README.md").unlink()  # an empty template
        merged = trained.base_model.merge_and_unload()
        assert isinstance(merged, LlamaForCausalLM)
        trained = merged
    trained.config.pad_token_id = None  # or the next load would zero and freeze that row of the embedding
    plain = TinyLlamaForCausalLM(TinyLlamaConfig.from_llama(trained.config))
    plain.load_state_dict(trained.state_dict())
    plain.config.use_cache = True
    plain.generation_config.eos_token_id = run.tokenizer.eos_token_id
    plain.generation_config.pad_token_id = run.tokenizer.pad_token_id
    plain.save_pretrained(folder)
    run.tokenizer.save_pretrained(folder)
    write_text(folder / CONFIG_FILE, yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False))
    write_text(folder / HELD_OUT_FILE, write_rows(run.held_out_conversations))


def _record(run: FinetuneRun) -> dict[str, Any]:
    """Returns the entries of `provenance.json` in addition to code, libraries and machine."""
    base_record = run.base / "provenance.json"
    return {
        "base_model": {
            "path": run.config.model.path,
            "sha256": {file.name: provenance.file_sha256(file) for file in sorted(run.base.glob("*.safetensors"))},
            **({"provenance": read_json(base_record)} if base_record.is_file() else {}),
        },
        "conversations": {
            "source": ", ".join(source.path for source in run.config.data.conversations),
            "train": len(run.train),
            "held_out": len(run.held_out),
            "dropped": run.num_dropped,
        },
        "tokenizer": tokenizer_fingerprint(run.tokenizer),
    }
