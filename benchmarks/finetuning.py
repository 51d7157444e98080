"""Fine-tuning all weights: conversations in packed rows against TRL's own ways of putting them into batches.

    python benchmarks/finetuning.py MODEL FILE [FILE ...] [--conversations 32] [--rounds 3]

Prints trained tokens/s, without padding, of TRL's `SFTTrainer` on the same rendered conversations, for one epoch:

- `trl`: plain TRL, batches of 8 in random order, padded;
- `trl packing`: its best-fit packing into rows as long as the longest conversation;
- `sorted`: this package with `training.packing: false`: batches of 8, similar lengths together, padded;
- `packed`: this package by default: rows without padding, 8 conversations on average.

32 conversations per step (`trl packing`: 4 rows). On a CPU the clock is the CPU time of the process, which other load
hardly affects; set one thread. Rounds are interleaved; figures are medians.
"""

import argparse
import random
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from common import medians, save
from datasets import Dataset, disable_progress_bars
from trl import SFTConfig, SFTTrainer

from tinyllama_hf.finetune.config import load_finetune_config
from tinyllama_hf.finetune.sft import FinetuneRun, open_run
from tinyllama_hf.finetune.trainer import common_arguments, load_base, lora_config
from tinyllama_hf.finetune.training_order import TrainingOrder


MICRO_BATCH, PER_STEP = 8, 32
VARIANTS = ("trl", "trl packing", "sorted", "packed")


def open_conversations(
    model: str, files: list[str], number: int, scratch: Path, max_length: int | None = None
) -> FinetuneRun:
    """Returns a run of one epoch over a number of conversations, equally many of each file, in random order."""
    recipe = scratch / "recipe.yaml"
    training = {"epochs": 1, "sequences_per_step": PER_STEP, "micro_batch_size": MICRO_BATCH, "warmup_steps": 0}
    data = {"conversations": files, "too_long": "drop", "max_length": max_length}
    recipe.write_text(yaml.safe_dump({"model": {"path": model}, "data": data, "training": training}))
    run = open_run(load_finetune_config(recipe, [f"output_dir={scratch / 'run'}"]))
    chosen = []
    for source in range(len(files)):
        pairs = zip(run.train.examples, run.train.conversations, strict=True)
        examples = [example for example, conversation in pairs if conversation.source == source]
        share = number // len(files)
        chosen += examples[:: max(1, len(examples) // share)][:share]
    random.Random(0).shuffle(chosen)
    run.train.examples = chosen
    lengths = [len(example.input_ids) for example in run.train.examples]
    steps = [list(range(start, start + PER_STEP)) for start in range(0, number, PER_STEP)]
    return replace(run, order=TrainingOrder(steps, lengths, PER_STEP // MICRO_BATCH, packing=True))


def trainer_of(variant: str, run: FinetuneRun, scratch: Path) -> Any:
    """Returns the trainer of a variant, before its first step; `trl packing` trains for one epoch."""
    model = load_base(run)
    adapter = lora_config(run.config.adapter, model.config.tie_word_embeddings)
    if variant in ("sorted", "packed"):
        run = replace(run, order=replace(run.order, packing=variant == "packed"))
        return run.make_trainer({**common_arguments(run), "output_dir": str(scratch)}, model, adapter, [])
    rows = [{"input_ids": ids, "assistant_masks": masks} for ids, masks in run.train.examples]
    is_packed, per_step = variant == "trl packing", run.config.training.sequences_per_step
    arguments = SFTConfig(
        output_dir=str(scratch),
        num_train_epochs=1,
        max_steps=-1 if is_packed else len(run.order.steps),
        learning_rate=run.config.training.learning_rate,
        per_device_train_batch_size=1 if is_packed else MICRO_BATCH,
        gradient_accumulation_steps=per_step // MICRO_BATCH,
        lr_scheduler_type=run.config.training.schedule,
        warmup_steps=run.config.training.warmup_steps,
        packing=is_packed,
        max_length=max(run.order.lengths),
        bf16=False,  # on by default in TRL; slow on a CPU, and ours is fp32
        activation_checkpointing=False,  # on by default in TRL, for memory
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        save_strategy="no",
        report_to="none",
    )
    return SFTTrainer(
        model=model.train(),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=run.tokenizer,
        peft_config=adapter,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--conversations", type=int, default=32)
    parser.add_argument("--max-length", type=int, help="leaves longer conversations out; padded ones take much memory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="finetuning", help="of the file in results/")
    arguments = parser.parse_args()
    disable_progress_bars()
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        run = open_conversations(
            arguments.model, arguments.files, arguments.conversations, Path(folder), arguments.max_length
        )
        for _ in range(arguments.rounds):
            for variant in VARIANTS:
                trainer = trainer_of(variant, run, Path(folder) / "scratch")
                began = clock()
                trainer.train()
                seconds[variant].append(clock() - began)
    lengths = sorted(run.order.lengths)
    tokens = sum(lengths)
    rates = {variant: tokens / median for variant, median in medians(seconds).items()}
    print(
        f"{len(lengths)} conversations, {tokens:,} tokens: median {statistics.median(lengths):g}, 95th percentile "
        f"{lengths[-(-95 * len(lengths) // 100) - 1]}, longest {lengths[-1]}"
    )
    print("| | trained tokens/s | times TRL |\n|---|--:|--:|")
    for variant, rate in rates.items():
        print(f"| {variant} | {rate:,.0f} | {rate / rates['trl']:.2f} |")
    figures = {"lengths": lengths, "seconds": seconds, "tokens_per_second": rates}
    print(f"wrote {save(arguments.name, figures)}")


if __name__ == "__main__":
    main()
