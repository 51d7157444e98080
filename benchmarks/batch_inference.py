"""Many prompts: free places given to the next prompt, against sorted batches that wait.

    python benchmarks/batch_inference.py [--preset 120m] [--dtype fp32] [--prompts 64] [--batch-sizes 4,16] [--rounds 3]

Tokens a second; on a CPU, of the process's own CPU time, which a busy neighbour hardly changes: let it have one thread.

The same greedy requests by stock `generate` on batches sorted by length and padded (`padded`), and by
`tinyllama_hf.batch.generate_many.generate_many` (`batch`), interleaved, medians. The quality of replies is not measured, so
the weights are random, and each request ends after a number of tokens drawn beforehand, as end-of-sequence would end it. `idle` is the share of the row steps of the padded batches that go to rows which have ended.
"""

import argparse
import functools
import os
import random
import time

import torch
from common import interleaved, medians, save
from torch.nn.utils.rnn import pad_sequence

from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM
from tinyllama_hf.batch.generate_many import Request, generate_many
from tinyllama_hf.inference.generation import Sampling


VARIANTS = ("padded", "batch")


class NoTokenizer:
    """Random tokens have no text; nothing ends but by its number of tokens."""

    pad_token_id, eos_token_id = 0, None


# Name: (tokens of a prompt, new tokens), each from ... to.
SETTINGS = {
    "short, replies of 4 to 64": ((8, 40), (4, 64)),
    "short, replies of 34": ((8, 40), (34, 34)),
    "long, replies of 4 to 64": ((200, 400), (4, 64)),
}


def requests(setting: str, number: int) -> list[Request]:
    """The same requests in every call."""
    draw = random.Random(0)
    (shortest, longest), (fewest, most) = SETTINGS[setting]
    return [
        Request(
            i, [draw.randrange(3, 32000) for _ in range(draw.randint(shortest, longest))], draw.randint(fewest, most)
        )
        for i in range(number)
    ]


def batches(wanted: list[Request], size: int) -> list[list[Request]]:
    """Neighbours in length."""
    order = sorted(wanted, key=lambda request: len(request.ids), reverse=True)
    return [order[i : i + size] for i in range(0, len(order), size)]


def padded(model: TinyLlamaForCausalLM, wanted: list[Request], size: int) -> int:
    """Each batch until its longest row ends, with our attention on a CPU, which stock lacks; returns the tokens asked for."""
    for batch in batches(wanted, size):
        new = max(request.max_new_tokens for request in batch)
        ids = pad_sequence([torch.tensor(request.ids) for request in batch], batch_first=True, padding_side="left")
        ids = ids.to(model.device)  # padding is 0, which no prompt has
        model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=new, do_sample=False, pad_token_id=0)
    return sum(request.max_new_tokens for request in wanted)


def idle(batches: list[list[Request]]) -> float:
    """Share of the row steps that go to rows which have ended."""
    steps = sum(len(batch) * max(request.max_new_tokens for request in batch) for batch in batches)
    return 1 - sum(request.max_new_tokens for batch in batches for request in batch) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="120m")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--batch-sizes", default="4,16")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = TinyLlamaForCausalLM(TinyLlamaConfig.preset(arguments.preset)).to(device, dtype).eval()
    model.generation_config.eos_token_id = None
    clock = time.perf_counter if device == "cuda" else time.process_time

    def run(variant: str, batch_size: int, wanted: list[Request]) -> int:
        if variant == "padded":
            return padded(model, wanted, batch_size)
        completions = generate_many(model, NoTokenizer(), wanted, batch_size, Sampling(0, 1.0))
        return sum(len(completion.ids) for completion in completions)

    figures = []
    print(f"{'setting':<28} {'batch':>5} {'idle':>5}  " + "  ".join(f"{name:>18}" for name in VARIANTS))
    for setting in SETTINGS:
        wanted = requests(setting, arguments.prompts)
        tokens = sum(request.max_new_tokens for request in wanted)
        for batch_size in map(int, arguments.batch_sizes.split(",")):
            assert run("batch", batch_size, wanted) == tokens
            variants = {name: functools.partial(run, name, batch_size, wanted) for name in VARIANTS}
            rates = {
                name: tokens / seconds
                for name, seconds in medians(interleaved(variants, arguments.rounds, clock)).items()
            }
            waste = idle(batches(wanted, batch_size))
            row = {"setting": setting, "batch_size": batch_size, "idle": round(waste, 3), "tokens": tokens,
                   **{f"{name}_tokens_per_second": round(rate, 1) for name, rate in rates.items()}}  # fmt: skip
            figures.append(row)
            shown = "  ".join(f"{rate:>9.1f} tokens/s" for rate in rates.values())
            print(f"{setting:<28} {batch_size:>5} {waste:>5.0%}  {shown}", flush=True)
    options = {name: getattr(arguments, name) for name in ("preset", "dtype", "prompts", "rounds")} | {
        "device": device
    }
    print(f"wrote {os.path.relpath(save('batch_inference', {**options, 'rows': figures}))}")


if __name__ == "__main__":
    main()
