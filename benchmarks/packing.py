"""Decoding and reading on a CPU in fp32: weights packed for oneDNN against torch's own product.

    python benchmarks/packing.py MODEL [--rounds 5]

One process and one thread; the two take turns. For 1, 8 and 16 rows: a step of the engine with 64 tokens in each row;
and one pass over 256 tokens. Prints milliseconds, the ratio, and the largest difference of a logit.
"""

import argparse
import copy
import statistics
import time

import torch
from common import save

from tinyllama_hf import load
from tinyllama_hf.inference.packed_weights import pack_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, _ = load(arguments.model, dtype=torch.float32, device="cpu")
    models = {"torch": model, "packed": copy.deepcopy(model)}
    figures: dict[str, object] = {"packed_layers": pack_weights(models["packed"])}
    shapes = {f"{rows} rows of one token": (rows, 1, 64) for rows in (1, 8, 16)} | {"256 tokens": (1, 256, 0)}
    with torch.no_grad():
        for name, (rows, tokens, past) in shapes.items():
            ids = torch.randint(0, model.config.vocab_size, (rows, past + tokens))
            seconds: dict[str, list[float]] = {kind: [] for kind in models}
            logits = {}
            for _ in range(arguments.rounds):
                for kind, each in models.items():
                    cache = each(ids[:, :past], use_cache=True).past_key_values if past else None
                    began = time.perf_counter()
                    logits[kind] = each(ids[:, past:], past_key_values=cache, logits_to_keep=1).logits
                    seconds[kind].append(time.perf_counter() - began)
            times = {kind: 1000 * statistics.median(found) for kind, found in seconds.items()}
            difference = float((logits["torch"] - logits["packed"]).abs().max())
            figures[name] = {**times, "ratio": times["torch"] / times["packed"], "largest_difference": difference}
            print(f"{name}: {times['torch']:.1f} ms, packed {times['packed']:.1f} ms", figures[name])
    print(f"wrote {save('packing', figures)}")


if __name__ == "__main__":
    main()
