"""Bits per byte: time and memory of `eval text` against its first version, and that both give the same figure.

    tinyllama-hf prepare embedded:prose --tokenizer MODEL --output DATA --validation-fraction 0.1
    python benchmarks/text_scoring.py --model MODEL --data DATA [--max-bytes 12_000] [--rounds 2]

The first version read all documents, kept all their windows, and computed the logits of every position of 16 windows
at once. Each measurement is a separate process, and the variants take turns. Memory is the highest resident set
while scoring minus that after loading the model.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence


WINDOWS_AT_ONCE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--data", type=Path, required=True, help="prepared data set with held-out documents")
    parser.add_argument("--max-bytes", type=int, default=12_000, help="size of the sample")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--measure", choices=VARIANTS, help="one process of the measurement")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return
    from common import save

    found: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    for _ in range(arguments.rounds):
        for name in VARIANTS:
            command = [sys.executable, *sys.argv, "--measure", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    figures = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in found.items()
    }
    for name, row in figures.items():
        print(f"| {name} | {row['cpu_seconds']:.1f} | {row['megabytes']:,.0f} | {row['bits_per_byte']:.9f} |")
    print("wrote", save("text_scoring", {"max_bytes": arguments.max_bytes, "rounds": found, "medians": figures}))


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Scores the sample in this process, after one small forward pass."""
    from tinyllama_hf.evaluation.held_out.held_out_text import held_out_documents
    from tinyllama_hf.inference.load import load_stock

    model, tokenizer = load_stock(arguments.model, "cpu")
    source = held_out_documents(arguments.data, arguments.max_bytes)
    with torch.inference_mode():
        model(torch.arange(8)[None])
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again at the present size
    before, began, cpu = peak_megabytes(), time.perf_counter(), time.process_time()
    value = VARIANTS[arguments.measure](model, tokenizer, source)
    return {
        "bits_per_byte": value,
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
        "megabytes": peak_megabytes() - before,
    }


def peak_megabytes() -> float:
    """Returns the highest resident set of this process since its last reset, VmHWM."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024 / 1e6


def present(model: Any, tokenizer: Any, source: Any) -> float:
    """Scores as `tinyllama-hf eval text` does."""
    from tinyllama_hf.evaluation.held_out.bits_per_byte import score_documents

    return score_documents(model, tokenizer, [source])[0].bits_per_byte


@torch.inference_mode()
def first(model: Any, tokenizer: Any, source: Any) -> float:
    """Scores as the first version did."""
    from tinyllama_hf.evaluation.held_out.bits_per_byte import document_tokens
    from tinyllama_hf.evaluation.held_out.text_windows import windows

    context, nats, everything = model.config.max_position_embeddings, 0.0, []
    for text in source.texts:
        everything += windows(0, document_tokens(tokenizer, text), context, context // 2, 0)
    everything.sort(key=lambda window: window.num_inputs)
    for start in range(0, len(everything), WINDOWS_AT_ONCE):
        batch = everything[start : start + WINDOWS_AT_ONCE]
        tokens = pad_sequence([torch.from_numpy(window.tokens) for window in batch], batch_first=True)
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits.float()
        scores = logits.gather(2, tokens[:, 1:, None]).squeeze(2) - logits.logsumexp(2)
        for row, window in zip(scores.double(), batch, strict=True):
            nats -= row[window.num_inputs - window.num_scored : window.num_inputs].sum().item()
    return nats / math.log(2) / source.source.bytes


VARIANTS = {"first version": first, "now": present}


if __name__ == "__main__":
    main()
