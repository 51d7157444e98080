"""The training loss: ours in chunks, the stock loss on whole logits, and torch's linear_cross_entropy.

    python benchmarks/loss.py [--rounds 9]

Forward and backward of the output projection and the loss, by themselves. Time: interleaved in one process, medians.
Memory: growth of the peak resident set in a separate process. Decides which one `tinyllama_hf/losses.py` uses.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.nn import LinearCrossEntropyOptions
from torch.nn import functional as F

from tinyllama_hf.losses import linear_cross_entropy_sum


# (tokens of a micro-batch, hidden size, vocabulary): the demo's nano, 120m, and a long batch of 120m.
SHAPES = {"nano": (2048, 256, 2048), "120m": (1024, 768, 32000), "120m, 4096 tokens": (4096, 768, 32000)}


def stock(hidden, weight, labels):
    """As `LlamaForCausalLM`: all logits, in fp32."""
    return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")


def torch_default(hidden, weight, labels):
    """`linear_cross_entropy` without options: the reference path."""
    return F.linear_cross_entropy(hidden, weight, labels, reduction="sum")


def torch_chunked(hidden, weight, labels):
    """`linear_cross_entropy` in chunks."""
    return F.linear_cross_entropy(hidden, weight, labels, reduction="sum", options=LinearCrossEntropyOptions())


VARIANTS = {
    "tinyllama_hf": linear_cross_entropy_sum,
    "stock": stock,
    "torch, options=None": torch_default,
    "torch, LinearCrossEntropyOptions()": torch_chunked,
}


def tensors(shape: str):
    """Inputs of a shape, the same in every process."""
    torch.manual_seed(0)
    tokens, hidden_size, vocab_size = SHAPES[shape]
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = (torch.randn(vocab_size, hidden_size) * 0.02).requires_grad_()
    return hidden, weight, torch.randint(0, vocab_size, (tokens,))


def step(variant: str, inputs) -> None:
    """Forward and backward."""
    hidden, weight, _ = inputs
    hidden.grad = weight.grad = None
    VARIANTS[variant](*inputs).backward()


def peak_resident_kilobytes() -> int:
    """High-water mark of this process alone; getrusage's would begin at that of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def peak_megabytes(shape: str, variant: str) -> float:
    """Growth of the peak resident set over one step, in a fresh process."""
    command = [sys.executable, __file__, "--measure-memory", shape, variant]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds")
    parser.add_argument(
        "--measure-memory", nargs=2, metavar=("SHAPE", "VARIANT"), help="one process of the memory figure"
    )
    arguments = parser.parse_args()
    if arguments.measure_memory:
        shape, variant = arguments.measure_memory
        inputs = tensors(shape)
        before = peak_resident_kilobytes()
        step(variant, inputs)
        print((peak_resident_kilobytes() - before) / 1024)
        return
    from common import interleaved, medians, save

    figures = {}
    for shape in SHAPES:
        inputs = tensors(shape)
        seconds = medians(interleaved({v: lambda v=v, i=inputs: step(v, i) for v in VARIANTS}, arguments.rounds))
        figures[shape] = {
            variant: {
                "milliseconds": round(1000 * seconds[variant], 2),
                "time_of_stock": round(seconds[variant] / seconds["stock"], 3),
                "peak_megabytes": round(peak_megabytes(shape, variant), 1),
            }
            for variant in VARIANTS
        }
        print(f"{shape}: tokens, hidden size, vocabulary = {SHAPES[shape]}")
        for variant, row in figures[shape].items():
            time = f"{row['milliseconds']:>9} ms  {row['time_of_stock']:>6} x stock"
            print(f"  {variant:<36} {time}  {row['peak_megabytes']:>8} MB")
    print(f"wrote {os.path.relpath(save('loss', figures))}")


if __name__ == "__main__":
    main()
