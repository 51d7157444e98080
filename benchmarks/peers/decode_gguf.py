"""llama.cpp (wheel `xllamacpp`) as an engine of benchmarks/decode.py, which starts this script.

    python decode_gguf.py MODEL.gguf

Each line on standard input requests a measurement: `{"prompt": [ids], "new_tokens": 32, "threads": 2}`. The answer is
a line with tokens, seconds and CPU seconds of the process. The prompt is processed before the measurement.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path


CONTEXT = 2048  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("gguf", type=Path)
    gguf = parser.parse_args().gguf
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the server's threads write to standard output
    server, threads = None, 0
    for line in sys.stdin:
        request = json.loads(line)
        if request["threads"] != threads:
            server = None  # frees its memory before the next one is created
            threads = request["threads"]
            server = started(gguf, threads)
        print(
            json.dumps(measured(server, gguf.stat().st_size, request["prompt"], request["new_tokens"])),
            file=answers,
            flush=True,
        )


def started(gguf: Path, threads: int):
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(gguf)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup, parameters.verbosity = CONTEXT, 1, False, -1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    return xllamacpp.Server(parameters)


def measured(server, weight_bytes: int, prompt: list[int], new_tokens: int) -> dict[str, float]:
    """One forward pass per token: the first processes the last prompt token, the others are in the server's cache."""
    greedy = {"prompt": prompt, "temperature": 0, "top_k": 1, "ignore_eos": True, "cache_prompt": True}
    server.handle_completions(greedy | {"max_tokens": 1})
    began, cpu = time.perf_counter(), time.process_time()
    answer = server.handle_completions(greedy | {"max_tokens": new_tokens})
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    timings = answer["timings"]
    if (timings["prompt_n"], timings["predicted_n"]) != (1, new_tokens):
        sys.exit(
            f"llama.cpp read {timings['prompt_n']} tokens and wrote {timings['predicted_n']}, not 1 and {new_tokens}"
        )
    return {"tokens": new_tokens, "seconds": seconds, "cpu_seconds": cpu_seconds, "weight_bytes": weight_bytes}


if __name__ == "__main__":
    main()
