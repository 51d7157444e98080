"""The time to import the package and to print help.

    python benchmarks/start_up.py [--rounds 9]

Medians of new processes in interleaved rounds: `import torch, transformers.models.llama`; `import tinyllama_hf` after
it, timed inside the process; and all of `tinyllama-hf --help`.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path


IMPORTS = """
import time
began = time.perf_counter()
import torch, transformers.models.llama
libraries = time.perf_counter()
import tinyllama_hf
print(libraries - began, time.perf_counter() - libraries)
"""


def imports() -> tuple[float, float]:
    """Seconds of the libraries' import, and of the package's after it."""
    done = subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True)
    libraries, package = map(float, done.stdout.split())
    return libraries, package


def help_page() -> float:
    """Seconds of `tinyllama-hf --help`, the start of Python included."""
    began = time.perf_counter()
    subprocess.run([Path(sys.executable).parent / "tinyllama-hf", "--help"], check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds")
    arguments = parser.parse_args()
    from common import save

    imports(), help_page()  # fills the disk cache
    rounds = [(*imports(), help_page()) for _ in range(arguments.rounds)]
    names = ("import torch, transformers.models.llama", "import tinyllama_hf after it", "tinyllama-hf --help")
    figures = {
        name: round(statistics.median(column), 3)
        for name, column in zip(names, zip(*rounds, strict=True), strict=True)
    }
    for name, seconds in figures.items():
        print(f"{name:<40} {seconds:>7} s")
    print(f"wrote {os.path.relpath(save('start_up', figures))}")


if __name__ == "__main__":
    main()
