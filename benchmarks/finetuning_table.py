"""Fine-tuning in full, with LoRA and with QLoRA, on several data sets, against TRL with the same data.

    python benchmarks/finetuning_table.py MODEL FILE [FILE ...] [--tokens 100_000] [--set KEY=VALUE] [--output FOLDER]

Each run is a process of its own, and trains for the same number of steps on one file. `trl` is TRL's `SFTTrainer` with
its own batches (8 conversations, padded, random order), `packed` and `sorted` are this package with and without
packing. Prints for each run the loss of the held-out replies and the share of own replies that end, before and after,
the CPU time of the training, trained tokens per second of it, and the peak memory of the process.

Every finished run is a file in the output folder, so the same command resumes after an interruption.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import save
from finetuning import trainer_of

from tinyllama_hf.files import read_json, write_json
from tinyllama_hf.finetune.config import load_finetune_config
from tinyllama_hf.finetune.sft import open_run
from tinyllama_hf.finetune.trainer import load_base
from tinyllama_hf.finetune.training_order import training_steps
from tinyllama_hf.pretrain.throughput import peak_memory_bytes


KINDS, VARIANTS = ("full", "lora", "qlora"), ("trl", "sorted", "packed")


def run_once(recipe: Path, variant: str, tokens: int) -> dict[str, Any]:
    """Trains in this process, and returns what is printed; `before` only scores the untrained model."""
    run = open_run(load_finetune_config(recipe))
    if variant == "before":
        return run.score(load_base(run).eval())
    lengths, training = run.order.lengths, run.config.training
    epochs = tokens / sum(lengths)
    steps = training_steps([len(lengths)], [1.0], epochs, training.sequences_per_step, training.seed)
    run = replace(run, order=replace(run.order, steps=steps))
    trainer = trainer_of(variant, run, Path(f"{recipe}.scratch"))
    began = time.process_time()
    trainer.train()
    seconds = time.process_time() - began
    trained = run.order.tokens_after()[-1]
    return {
        "after": run.score(trainer.accelerator.unwrap_model(trainer.model).eval()),
        "seconds": seconds,
        "tokens_per_second": trained / seconds,
        "peak_bytes": peak_memory_bytes("cpu"),
    }


def child(recipe: Path, variant: str, tokens: int, output: Path) -> None:
    """Runs once in a new process, unless it is finished."""
    if not output.is_file():
        command = [sys.executable, __file__, "--child", str(recipe), variant, str(tokens), str(output)]
        subprocess.run(command, check=True)


def main() -> None:
    if "--child" in sys.argv:
        recipe, variant, tokens, output = sys.argv[2:]
        write_json(Path(output), run_once(Path(recipe), variant, int(tokens)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokens", type=int, default=100_000, help="of each run")
    parser.add_argument(
        "--rate", default="1e-3", help="learning rate of all weights; adapters take three times as much"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all recipes")
    parser.add_argument("--output", type=Path, default=Path("runs/finetuning_table"))
    parser.add_argument("--name", default="finetuning_table", help="of the file in results/")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    figures: dict[str, dict[str, Any]] = {}
    print("| data | trained | batches | loss before | after | replies end | after | CPU seconds | tokens/s | peak |")
    print("|---|---|---|--:|--:|--:|--:|--:|--:|--:|")
    for file in arguments.files:
        data = file.parent.name
        for kind in KINDS:
            rate = float(arguments.rate) * (1 if kind == "full" else 3)
            recipe = arguments.output / f"{data}_{kind}.yaml"
            values = {
                "output_dir": str(arguments.output / "none"),
                "model": {"path": arguments.model},
                "data": {"conversations": str(file), "too_long": "truncate"},
                "adapter": {"kind": kind},
                "training": {"learning_rate": rate, "micro_batch_size": 8, "warmup_steps": 5},
            }
            for setting in arguments.set:
                key, _, value = setting.partition("=")
                section, _, name = key.partition(".")
                values[section][name] = json.loads(value)
            recipe.write_text(json.dumps(values))
            # An adapter begins as the base, which is in 4 bit only for QLoRA.
            untrained = arguments.output / f"{data}_{'qlora' if kind == 'qlora' else 'full'}_before.json"
            child(recipe, "before", arguments.tokens, untrained)
            for variant in VARIANTS:
                output = arguments.output / f"{data}_{kind}_{variant}.json"
                child(recipe, variant, arguments.tokens, output)
                before = read_json(untrained)
                row = figures[f"{data}, {kind}, {variant}"] = {"before": before, **read_json(output)}
                after = row["after"]
                ends = [f"{scores['stop_rate']:.0%}" if "stop_rate" in scores else "" for scores in (before, after)]
                print(
                    f"| {data} | {kind} | {variant} | {before['held_out_loss']:.3f} | {after['held_out_loss']:.3f} | "
                    f"{ends[0]} | {ends[1]} | {row['seconds']:.0f} | {row['tokens_per_second']:,.0f} | "
                    f"{row['peak_bytes'] / 1e9:.2f} GB |",
                    flush=True,
                )
    print(f"wrote {save(arguments.name, {'tokens': arguments.tokens, 'threads': torch.get_num_threads(), **figures})}")


if __name__ == "__main__":
    main()
