"""K-quants from an f16 GGUF file by llama.cpp: its program `llama-quantize`, or its library in a wheel.

    python quantise_gguf.py MODEL-f16.gguf --folder OUT --output RESULT.json [--types Q4_K_M Q5_K_M Q6_K]
                            [--llama-quantize PATH]

Without `--llama-quantize` it calls `llama_model_quantize` of `llama-cpp-python`. Records seconds, size, llama.cpp's
messages about rows that do not divide into blocks, and the types in the file.
"""

import argparse
import collections
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

from peer_common import megabytes, save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--types", nargs="+", default=["Q4_K_M", "Q5_K_M", "Q6_K"])
    parser.add_argument("--llama-quantize", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    arguments.folder.mkdir(parents=True, exist_ok=True)
    figures: dict = {"source": arguments.gguf.name, "megabytes": megabytes(arguments.gguf), "types": {}}
    for name in arguments.types:
        target = arguments.folder / f"{arguments.gguf.stem.removesuffix('-f16')}-{name.lower()}.gguf"
        target.unlink(missing_ok=True)
        began = time.perf_counter()
        if arguments.llama_quantize:
            command, status, log = by_program(
                arguments.llama_quantize, arguments.gguf, target, name, arguments.threads
            )
        else:
            command, status, log = by_library(arguments.gguf, target, name, arguments.threads)
        seconds = round(time.perf_counter() - began, 2)
        (arguments.folder / f"{target.stem}.log").write_text(log)
        figures["types"][name] = {
            "command": command,
            "status": status,
            "seconds": seconds,
            "megabytes": megabytes(target) if target.exists() else None,
            **said(log),
        }
    save(arguments.output, figures, "llama-cpp-python")


def by_program(program: Path, source: Path, target: Path, name: str, threads: int) -> tuple[str, int, str]:
    done = subprocess.run(
        [program, source, target, name, str(threads)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return f"{program.name} {source.name} {target.name} {name} {threads}", done.returncode, done.stdout


def by_library(source: Path, target: Path, name: str, threads: int) -> tuple[str, int, str]:
    """Calls the library with its standard error, where llama.cpp logs, redirected to a file."""
    import ctypes

    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    parameters.nthread = threads
    with tempfile.TemporaryFile() as log:
        kept = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            status = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(parameters))
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        log.seek(0)
        return "llama_cpp.llama_model_quantize", status, log.read().decode(errors="replace")


def said(log: str) -> dict:
    """Parses llama.cpp's log: types of the matrices, rows that do not divide into blocks, sizes."""
    fallbacks = collections.Counter(
        f"{width} values a row: {wanted} -> {taken}"
        for width, wanted, taken in re.findall(
            r"ncols +(\d+) not divisible.*type +(\w+)\) -> falling back to +(\w+)", log
        )
    )
    return {
        "matrices": dict(collections.Counter(re.findall(r"converting to (\w+)", log))),
        "fallbacks": dict(fallbacks),
        "said": [
            line.strip() for line in log.splitlines() if re.search(r"(model|quant) size|WARNING|error|^version", line)
        ],
    }


if __name__ == "__main__":
    main()
