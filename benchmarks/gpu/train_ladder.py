"""Trains a draft and a target with one tokenizer in a given number of minutes, on tokens copied with the command.

    python benchmarks/gpu/train_ladder.py --data DATA [DATA ...] --weights 0.35 ... --minutes 9 --output OUT  # one GPU
    python benchmarks/gpu/train_ladder.py --data DATA --minutes 1 --models micro --output OUT                 # a CPU

DATA are folders written by `tinyllama-hf prepare`. Needs torch, transformers and accelerate only. Each model gets a
share of the minutes by its size. Its speed is measured, then it is trained on as many tokens as fit in the rest of its
time, with a cosine schedule. Writes a plain Llama folder in bf16 per model, and `models.json` with tokens, speed and
validation loss.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "gpu")]

from workload import config_of  # noqa: E402

from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, provenance  # noqa: E402
from tinyllama_hf.data.mixture import Mixture  # noqa: E402
from tinyllama_hf.data.shards import read_metadata  # noqa: E402
from tinyllama_hf.files import write_json  # noqa: E402
from tinyllama_hf.pretrain import launch  # noqa: E402
from tinyllama_hf.pretrain.milestones import write_milestone  # noqa: E402
from tinyllama_hf.pretrain.schedule import Steps  # noqa: E402
from tinyllama_hf.pretrain.step import TrainStep  # noqa: E402
from tinyllama_hf.tokenization_tinyllama import load_tokenizer  # noqa: E402


PEAK_RATES = {"120m": 6e-4, "nano": 1.5e-3, "micro": 2e-3}
_TRIAL_STEPS = 12  # the first of them compile and set up


def settings_of(arguments: argparse.Namespace, preset: str) -> dict[str, Any]:
    """The settings of a model, as in benchmarks/gpu/workload.py."""
    return {
        "preset": preset,
        "sequence_length": arguments.sequence_length,
        "micro_batch_size": arguments.micro_batch_size,
        "accumulation": 1,
        "precision": "bf16",
        "compile": "auto",
        "attention": "sdpa",
        "kernels": "none",
        "activation_checkpointing": False,
    }


def use_cosine(config: SimpleNamespace, total_tokens: int, peak: float) -> None:
    """A cosine schedule over `tokens`, with 5 % of them for warm-up."""
    step = config.steps.tokens_of(1)
    config.training.total_tokens = total_tokens
    config.steps = Steps(total_tokens, step)
    config.schedule = SimpleNamespace(
        name="cosine", peak=peak, floor=peak / 10, warmup_tokens=max(total_tokens // 20, step), decay_tokens=None
    )


def seconds_of(train_step: TrainStep, numbers: range) -> float:
    """Seconds of some steps, the device's work included."""
    began = time.perf_counter()
    for number in numbers:
        loss = train_step(number).loss
    loss.item()
    return time.perf_counter() - began


@torch.no_grad()
def validation_loss(model: torch.nn.Module, mixture: Mixture, device: torch.device, micro: int) -> float:
    """Mean loss per token on held-out blocks, by the sources' weights."""
    losses = []
    for blocks in mixture.validation_blocks(131_072, mixture.weights)[0]:
        total = 0.0
        for start in range(0, len(blocks), micro):
            tokens = torch.from_numpy(blocks[start : start + micro]).to(device)
            labels = tokens[:, 1:].contiguous()
            with torch.autocast(device.type, dtype=torch.bfloat16):
                total += model(
                    input_ids=tokens[:, :-1], labels=labels, shift_labels=labels, num_items_in_batch=1
                ).loss.item()
        losses.append(total / (len(blocks) * mixture.block_size))
    return math.fsum(loss * weight for loss, weight in zip(losses, mixture.weights, strict=True))


def train(
    arguments: argparse.Namespace, preset: str, mixture: Mixture, tokenizer: Any, seconds: float
) -> dict[str, Any]:
    """Trains one model for `seconds` and writes its folder."""
    end = time.perf_counter() + seconds
    settings = settings_of(arguments, preset)
    config = config_of(settings)
    accelerator = launch.make_accelerator(config)
    compiled, _ = launch.resolve_compile("auto", accelerator.device)
    torch.manual_seed(0)
    shape = TinyLlamaConfig.preset(
        preset, vocab_size=len(tokenizer), max_position_embeddings=arguments.sequence_length,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    implementation = launch.attention_implementation(config.training, False)
    model = TinyLlamaForCausalLM._from_config(shape, attn_implementation=implementation)
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    launch.prepare_layers(model, config.training, compiled)
    wrapped, optimizer = launch.wrap(accelerator, model, config)
    train_step = TrainStep(config, mixture, accelerator, wrapped, optimizer)
    seconds_of(train_step, range(1, _TRIAL_STEPS // 2 + 1))
    trial = seconds_of(train_step, range(_TRIAL_STEPS // 2 + 1, _TRIAL_STEPS + 1)) / (_TRIAL_STEPS // 2)
    model.load_state_dict(initial)  # the trial is forgotten
    optimizer.state.clear()
    step_tokens = config.steps.tokens_of(1)
    total = max(int((end - time.perf_counter()) * 0.93 / trial), 2) * step_tokens
    use_cosine(config, total, PEAK_RATES[preset])
    took = seconds_of(train_step, range(1, config.steps.number + 1))
    if int(train_step.bad_step) >= 0:
        sys.exit(f"{preset}: step {int(train_step.bad_step)} was not finite")
    row = {
        "preset": preset,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": total,
        "tokens_per_second": round(total / took),
        "validation_loss": validation_loss(model, mixture, accelerator.device, 8),
        "epochs": [round(epoch, 2) for epoch in mixture.epochs(total // arguments.sequence_length)],
    }
    record = {
        "step": config.steps.number,
        "tokens": total,
        "validation_loss": row["validation_loss"],
        "settings": settings,
    }
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    write_milestone(arguments.output / preset, model.to(torch.bfloat16), tokenizer, json.dumps(record), record)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, help="prepared data sets of one tokenizer")
    parser.add_argument("--weights", nargs="+", type=float, help="share of each; default: equal")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--models", nargs="+", default=["nano", "120m"], choices=PEAK_RATES)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--micro-batch-size", type=int, default=32)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    weights = arguments.weights or [1 / len(arguments.data)] * len(arguments.data)
    fingerprint = read_metadata(arguments.data[0])["tokenizer"]["fingerprint"]
    mixture = Mixture(arguments.data, weights, arguments.sequence_length, 0, fingerprint)
    tokenizer = load_tokenizer(Path(arguments.data[0]) / "tokenizer")
    sizes = {name: 3 if name == "120m" else 1 for name in arguments.models}
    rows = []
    for preset in arguments.models:
        seconds = 60 * arguments.minutes * sizes[preset] / sum(sizes.values())
        rows.append(train(arguments, preset, mixture, tokenizer, seconds))
        print(json.dumps(rows[-1]), flush=True)
        write_json(arguments.output / "models.json", {"figures": rows, "provenance": provenance.collect()})


if __name__ == "__main__":
    main()
