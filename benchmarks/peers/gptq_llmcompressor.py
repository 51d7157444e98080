"""GPTQ and AWQ by llm-compressor on a CPU without the Hub: from a plain Llama folder to compressed-tensors folders.

    python gptq_llmcompressor.py MODEL_FOLDER --calibration TEXT.jsonl[.gz] --evaluation TEXT.jsonl[.gz]
                                 --folder OUT --output RESULT.json [--group-size 128] [--zero-points]
                                 [--methods rounding gptq awq]

A group size of 128 is llm-compressor's preset `W4A16`, with zero points `W4A16_ASYM`. Sizes that 128 does not divide
need a smaller one. Plain rounding to the same layout shows the gain from calibration.
"""

import argparse
import gzip
import json
import math
import os
import resource
import time
from pathlib import Path

from peer_common import megabytes, save


os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--zero-points", action="store_true", help="asymmetric, as AWQ is usually published")
    parser.add_argument("--methods", nargs="+", default=("rounding", "gptq"), choices=("rounding", "gptq", "awq"))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sample-tokens", type=int, default=512)
    parser.add_argument("--evaluation-tokens", type=int, default=8192)
    arguments = parser.parse_args()

    figures: dict = {
        "model": arguments.model.name,
        "group_size": arguments.group_size,
        "zero_points": arguments.zero_points,
        "calibration": {"samples": arguments.samples, "tokens_each": arguments.sample_tokens},
        "megabytes": {"before": megabytes(arguments.model)},
        "evaluation_tokens": arguments.evaluation_tokens,
        "perplexity": {"before": perplexity(arguments.model, arguments)},
    }
    for method in arguments.methods:
        target = arguments.folder / method
        began = time.perf_counter()
        quantize(method, target, arguments)
        figures.setdefault("seconds", {})[method] = round(time.perf_counter() - began, 1)
        figures["megabytes"][method] = megabytes(target)
        figures["perplexity"][method] = perplexity(target, arguments)
    figures["peak_resident_megabytes"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
    figures["quantization_config"] = json.loads((target / "config.json").read_text())["quantization_config"]
    save(
        arguments.output,
        figures,
        "llmcompressor",
        "compressed-tensors",
        "torch",
        "transformers",
        "datasets",
        "accelerate",
    )


def quantize(method: str, target: Path, arguments: argparse.Namespace) -> None:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": not arguments.zero_points,
        "strategy": "group",
        "group_size": arguments.group_size,
    }
    modifier = GPTQModifier if method == "gptq" else QuantizationModifier
    recipe = [modifier(config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])]
    if method == "awq":
        # Version 0.14 pins memory for transfers to a GPU, which fails where there is no GPU.
        IntermediatesCache.pin_memory = lambda *_: None
        recipe.insert(0, AWQModifier(duo_scaling="both"))  # as in llm-compressor's example
    oneshot(
        model=str(arguments.model),
        recipe=recipe,
        dataset=None if method == "rounding" else calibration(arguments),
        num_calibration_samples=arguments.samples,
        max_seq_length=arguments.sample_tokens,
        output_dir=str(target),
    )


def calibration(arguments: argparse.Namespace):
    """Windows of equal length over the joined text, since llm-compressor only uses the first window of each text."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    ids, length = tokenizer("\n\n".join(texts(arguments.calibration)))["input_ids"], arguments.sample_tokens
    windows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    return Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * length] * len(windows)})


def texts(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def perplexity(folder: Path, arguments: argparse.Namespace) -> float:
    """Perplexity on the start of the evaluation text, in float32 and windows of the calibration length."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer("\n\n".join(texts(arguments.evaluation)), return_tensors="pt")["input_ids"][0]
    windows = ids[: arguments.evaluation_tokens].split(arguments.sample_tokens)
    total = count = 0
    with torch.no_grad():
        for window in windows:
            if len(window) > 1:
                logits = model(window[None]).logits[0, :-1].float()
                total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
                count += len(window) - 1
    return round(math.exp(total / count), 4)


if __name__ == "__main__":
    main()
