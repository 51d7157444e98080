"""llama.cpp (llama-cpp-python, `logits_all`) scores items of ARC in process, compared with our scores of the folder.

python score_gguf.py MODEL.gguf [MODEL.gguf ...] --rows ROWS.jsonl.gz --items ITEMS.jsonl.gz --output RESULT.json

ROWS is the data file of arc_easy or arc_challenge; ITEMS is the file of items that `tinyllama-hf eval tasks FOLDER
--task arc_easy --output FILE` writes next to its scores. Prompts, choices and the metric acc_norm are those of
lm-eval's definition, written here once more; the text is tokenized by llama.cpp.
"""

import argparse
import gzip
import json
import statistics
import time
from pathlib import Path

from peer_common import megabytes, save


CLOSE = 1e-2  # of a choice's log-likelihood per character; two choices that are closer may be exchanged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("gguf", type=Path, nargs="+")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--items", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--f16-cache", action="store_true", help="keys and values in f16, the default there")
    arguments = parser.parse_args()

    items = read(arguments.items)
    rows = read(arguments.rows)[: len(items)]
    questions = [(f"Question: {row['question']}\nAnswer:", row["choices"]["text"]) for row in rows]
    figures = {}
    for path in arguments.gguf:
        figures[path.name] = scored(path, questions, items, arguments.threads, arguments.f16_cache)
    save(arguments.output, figures, "llama_cpp_python")


def read(path: Path) -> list[dict]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def scored(path: Path, questions: list, items: list[dict], threads: int, f16_cache: bool) -> dict:
    """Scores all choices of all questions, and compares them with our items."""
    import llama_cpp

    cache = llama_cpp.GGML_TYPE_F16 if f16_cache else llama_cpp.GGML_TYPE_F32
    model = llama_cpp.Llama(
        str(path),
        n_ctx=512,
        logits_all=True,
        n_threads=threads,
        n_threads_batch=threads,
        type_k=cache,
        type_v=cache,
        verbose=False,
    )
    began = time.perf_counter()
    theirs = [[log_likelihood(model, context, choice) for choice in choices] for context, choices in questions]
    seconds = time.perf_counter() - began
    differences, exchanged = [], []
    right = {"llama.cpp": 0, "ours": 0}
    for (_, choices), values, item in zip(questions, theirs, items, strict=True):
        differences += [abs(a - b) for a, b in zip(values, item["log_likelihoods"], strict=True)]
        ratios = [value / len(choice) for value, choice in zip(values, choices, strict=True)]
        chosen = ratios.index(max(ratios))
        right["llama.cpp"] += chosen == item["gold"]
        right["ours"] += item["chosen"] == item["gold"]
        if chosen != item["chosen"]:
            exchanged.append({"item": item["index"], "lead": ratios[chosen] - ratios[item["chosen"]]})
    return {
        "megabytes": megabytes(path),
        "cache": "f16" if f16_cache else "f32",
        "items": len(items),
        "choices": len(differences),
        "acc_norm": {name: round(100 * count / len(items), 2) for name, count in right.items()},
        "largest_difference": max(differences),
        "median_difference": statistics.median(differences),
        "other_choices": exchanged,
        "other_choices_that_are_not_close": sum(row["lead"] > CLOSE for row in exchanged),
        "seconds": round(seconds, 1),
    }


def log_likelihood(model, context: str, choice: str) -> float:
    """Sum of the log-probabilities of the tokens of `" choice"` after the context, in nats."""
    import numpy as np

    start = model.tokenize(context.encode(), add_bos=False, special=False)
    tokens = model.tokenize(f"{context} {choice}".encode(), add_bos=False, special=False)
    model.reset()
    model.eval(tokens)
    logits = np.asarray(model.scores[len(start) - 1 : len(tokens) - 1], dtype=np.float64)
    top = logits.max(-1, keepdims=True)
    normalized = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return float(normalized[np.arange(len(logits)), tokens[len(start) :]].sum())


if __name__ == "__main__":
    main()
