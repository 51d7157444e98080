"""The type of the matrix that gives the logits in a GGUF of q4_0: perplexity, agreement with fp32, and bytes.

    python benchmarks/gguf_head.py FOLDER [--data FOLDER] [--windows 8] [--window 256]

FOLDER is a Llama with a tokenizer, tied or not. Every other matrix is q4_0 by the reference of the package `gguf`; the
head is q4_0 or q8_0 (the package writes no K-quants; llama.cpp's quantizer uses q6_K). The head of a tied model is its
embedding, so a tied model is measured a second time with the two untied: the head is then a copy of the embedding, and
the embedding is q4_0 like the other matrices. Everything is computed in fp32 on the dequantized weights. Agreement is
the share of positions with the same most likely token as fp32.
"""

import argparse
import copy
import gzip
import json
import math
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from transformers import LlamaForCausalLM

from tinyllama_hf import load_tokenizer
from tinyllama_hf.tokenization_tinyllama import encode_text


DATA = Path(__file__).parents[2] / "shared" / "data" / "corpora" / "wikitext2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with WikiText-2's validation.jsonl.gz")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=256, help="tokens")
    arguments = parser.parse_args()
    from common import save

    model = LlamaForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    ids = windows(arguments.model, arguments.data, arguments.windows, arguments.window)
    reference = predictions(model, ids)
    print(f"fp32: perplexity {reference[0]}", flush=True)
    variants = {}
    if model.config.tie_word_embeddings:
        variants["tied"] = measure(copy.deepcopy(model), ids, reference[1])
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    variants["untied"] = measure(model, ids, reference[1])
    figures = {"tokens": ids.numel(), "window": arguments.window, "fp32_perplexity": reference[0]}
    print(f"wrote {save('gguf_head', figures | {'variants': variants})}")


def measure(model: LlamaForCausalLM, ids: torch.Tensor, expected: torch.Tensor) -> dict[str, dict[str, float]]:
    """The figures for each type of the head, every other matrix in q4_0; changes the model."""
    head = model.lm_head.weight
    plain = head.data.clone()
    for parameter in model.parameters():
        if parameter.dim() == 2 and parameter is not head:
            parameter.data = rounded(parameter.data, "Q4_0")
    table = {}
    for name, kind in (("fp32", None), ("q8_0", "Q8_0"), ("q4_0", "Q4_0")):
        head.data.copy_(plain if kind is None else rounded(plain, kind))
        perplexity, best = predictions(model, ids)
        agreement = (best == expected).float().mean().item()
        size = plain.nbytes if kind is None else num_bytes(plain, kind)
        table[name] = {"perplexity": perplexity, "agreement": round(agreement, 4), "head_bytes": size}
        print("tied" if model.config.tie_word_embeddings else "untied", f"q4_0, head {name}", table[name], flush=True)
    return table


def windows(folder: Path, data: Path, number: int, width: int) -> torch.Tensor:
    """The first tokens of WikiText-2's validation part, `[number, width]`."""
    with gzip.open(data / "validation.jsonl.gz", "rt", encoding="utf-8") as file:
        text = "\n\n".join(json.loads(line)["text"] for _, line in zip(range(400), file, strict=False))
    ids = encode_text(load_tokenizer(folder), text)[: number * width]
    return torch.tensor(ids).view(number, width)


@torch.inference_mode()
def predictions(model: LlamaForCausalLM, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Perplexity, and the most likely token at each position."""
    losses, best = [], []
    for row in ids:
        logits = model(row[None]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], row[1:]).item())
        best.append(logits.argmax(dim=-1))
    return round(math.exp(sum(losses) / len(losses)), 4), torch.stack(best)


def rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    number = GGMLQuantizationType[kind]
    return torch.from_numpy(dequantize(quantize(weight.numpy(), number), number).astype(np.float32))


def num_bytes(weight: torch.Tensor, kind: str) -> int:
    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return weight.numel() // values * size


if __name__ == "__main__":
    main()
