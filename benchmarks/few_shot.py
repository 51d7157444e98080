"""MMLU with few-shot examples before each question: time against lm-eval's `hf` model, and equal choices.

    python benchmarks/few_shot.py MODEL --data FOLDER [--subjects anatomy ...] [--limit 10] [--rounds 2]

Both answer the same requests of lm-eval in this process, in turns: fp32, five examples (protocol `olmes`), batches of
16 for lm-eval. The clock is the processor time; set one thread.
"""

import argparse
import time
from typing import Any

import numpy as np
import torch
from common import interleaved, medians, save
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from tinyllama_hf.evaluation.harness.local_harness import TinyLlamaHarness
from tinyllama_hf.evaluation.models import describe_model, load_eval_model, model_folder
from tinyllama_hf.evaluation.tasks.protocol_definitions import define_protocol
from tinyllama_hf.evaluation.tasks.suite import open_suite, quiet_harness


SUBJECTS = ("anatomy", "astronomy", "marketing", "nutrition", "sociology")


def questions(data: str, subjects: list[str], limit: int) -> list[Any]:
    """Returns lm-eval's requests: all choices of all questions."""
    found = []
    with open_suite(data, define_protocol("olmes", [f"mmlu_{name}" for name in subjects])) as suite, quiet_harness():
        for task in suite.tasks.values():
            task.build_all_requests(limit=limit)
            found += task.instances
    return found


def choices(answers: list[tuple[float, bool]]) -> np.ndarray:
    return np.array([likelihood for likelihood, _ in answers]).reshape(-1, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--subjects", nargs="+", default=[*SUBJECTS])
    parser.add_argument("--limit", type=int, default=10, help="questions per subject")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--name", default="few_shot", help="of the file in results/")
    arguments = parser.parse_args()
    requests = questions(arguments.data, arguments.subjects, arguments.limit)

    ours, tokenizer = load_eval_model(describe_model(model_folder(arguments.model)), "cpu", torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    theirs = HFLM(stock, tokenizer=AutoTokenizer.from_pretrained(arguments.model), batch_size=16)
    answers: dict[str, Any] = {}

    def score_ours() -> None:
        answers["ours"] = TinyLlamaHarness(ours, tokenizer).loglikelihood(requests)

    def score_theirs() -> None:
        answers["lm-eval"] = theirs.loglikelihood(requests, disable_tqdm=True)

    seconds = interleaved({"ours": score_ours, "lm-eval": score_theirs}, arguments.rounds, time.process_time)
    own, other = choices(answers["ours"]), choices(answers["lm-eval"])
    middle = medians(seconds)
    figures = {
        "subjects": arguments.subjects,
        "questions": len(own),
        "seconds": seconds,
        "ratio": middle["lm-eval"] / middle["ours"],
        "chosen_differently": int((own.argmax(1) != other.argmax(1)).sum()),
        "largest_difference": float(abs(own - other).max()),
    }
    print("\n".join(f"{key}: {value}" for key, value in figures.items()))
    print(f"wrote {save(arguments.name, figures)}")


if __name__ == "__main__":
    main()
