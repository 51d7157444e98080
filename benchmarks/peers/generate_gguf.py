"""llama.cpp (wheel `xllamacpp`) loads GGUF files and continues prompts greedily.

python generate_gguf.py MODEL.gguf [MODEL.gguf ...] --output RESULT.json [--tokens 64]
"""

import argparse
import time
from pathlib import Path

from peer_common import megabytes, save


PROMPTS = (
    "Once upon a time, there was a little",
    "The capital of France is",
    "Lily and Tom went to the park. They saw",
    "The dog was very happy because",
    "In 1969, the first man",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("gguf", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    figures = {path.name: continued(path, arguments.tokens, arguments.threads) for path in arguments.gguf}
    first = figures[arguments.gguf[0].name]["texts"]
    for path in arguments.gguf[1:]:
        texts = figures[path.name]["texts"]
        figures[path.name]["same_characters_as_the_first"] = [same(a, b) for a, b in zip(first, texts, strict=True)]
    save(arguments.output, figures, "xllamacpp")


def continued(path: Path, tokens: int, threads: int) -> dict:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx = 512
    parameters.n_parallel = 1
    parameters.warmup = False
    parameters.cpuparams.n_threads = threads
    parameters.cpuparams_batch.n_threads = threads
    began = time.perf_counter()
    server = xllamacpp.Server(parameters)
    loaded = time.perf_counter()
    texts, speed = [], []
    for prompt in PROMPTS:
        answer = server.handle_completions(
            {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "top_k": 1, "cache_prompt": False}
        )
        texts.append(answer["choices"][0]["text"])
        speed.append(answer.get("timings", {}).get("predicted_per_second"))
    return {
        "megabytes": megabytes(path),
        "seconds_to_load": round(loaded - began, 2),
        "tokens_per_second": [None if rate is None else round(rate, 1) for rate in speed],
        "texts": texts,
    }


def same(a: str, b: str) -> int:
    """The number of characters in the common prefix of two texts."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


if __name__ == "__main__":
    main()
