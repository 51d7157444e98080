"""What importing the package and asking for help cost.

    python benchmarks/start_up.py [--rounds 9]

Fresh processes, interleaved, medians: `import torch, transformers.models.llama` alone, the same with `tinyllama_hf`, and
`tinyllama-hf --help`.
"""

import argparse
import os
import subprocess
import sys
from functools import partial
from pathlib import Path


BASE = "import torch, transformers.models.llama"
COMMANDS = {
    "libraries": [sys.executable, "-c", BASE],
    "libraries and tinyllama_hf": [sys.executable, "-c", f"{BASE}, tinyllama_hf"],
    "--help": [str(Path(sys.executable).parent / "tinyllama-hf"), "--help"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds")
    arguments = parser.parse_args()
    from common import interleaved, medians, save

    run = partial(subprocess.run, check=True, capture_output=True)
    figures = medians(
        interleaved({name: partial(run, command) for name, command in COMMANDS.items()}, arguments.rounds)
    )
    figures["import of tinyllama_hf"] = figures["libraries and tinyllama_hf"] - figures["libraries"]
    figures = {name: round(seconds, 3) for name, seconds in figures.items()}
    for name, seconds in figures.items():
        print(f"{name:<28} {seconds:>7} s")
    print(f"wrote {os.path.relpath(save('start_up', figures))}")


if __name__ == "__main__":
    main()
