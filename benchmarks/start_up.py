"""The time to import the package, to print help, and to report a mistake in a path or an option.

    python benchmarks/start_up.py [--rounds 5] [--other CHECKOUT]

Medians of new processes in interleaved rounds, the start of Python included. With `--other`, a checkout of another
commit takes turns with this one. `import torch, transformers.models.llama` is there for comparison.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path


ROOT = Path(__file__).parents[1]
LIBRARIES = "import torch, transformers.models.llama"
PACKAGE = "import tinyllama_hf"
RECIPE = "recipes/pretrain/micro.yaml"
# Of tinyllama-hf, or of a script in recipes/.
COMMANDS = (
    "--help",
    "list",
    "generate /nope text",
    "generate /nope text --temperature -1",
    "chat /nope",
    "serve /nope",
    "eval text /nope",
    "eval tasks /nope",
    "eval replies /nope",
    "memory /nope",
    f"plan {RECIPE} training.sed=1",
    "convert /nope --to llama --output out",
    "verify /nope /nope",
    "prepare /nope --tokenizer /nope --output out",
    "tokenizer train /nope --output out",
    "tokenizer verify /nope",
    "report /nope --output out",
    "publish /nope --repo me/model",
    f"pretrain.py {RECIPE} training.sed=1",
    "sft.py /nope",
)


def seconds_of(case: str, root: Path) -> float:
    """Runs an import, a command or a script of a checkout in a new process."""
    words = case.split()
    if case.startswith("import "):
        arguments = ["-c", case]
    elif words[0].endswith(".py"):
        arguments = [str(root / "recipes" / words[0]), *words[1:]]
    else:
        arguments = ["-c", "from tinyllama_hf_cli import main; main()", *words]
    environment = os.environ | {"PYTHONPATH": str(root)}
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=root, env=environment, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--other", type=Path, help="checkout of another commit, to compare with")
    arguments = parser.parse_args()
    from common import save

    roots = {"here": ROOT} | ({"other": arguments.other.resolve()} if arguments.other else {})
    figures = {}
    for case in (LIBRARIES, PACKAGE, *COMMANDS):
        for root in roots.values():  # fills the disk cache
            seconds_of(case, root)
        rounds = [{name: seconds_of(case, root) for name, root in roots.items()} for _ in range(arguments.rounds)]
        figures[case] = {name: round(statistics.median(row[name] for row in rounds), 2) for name in roots}
        print(
            f"{case:<44}" + "".join(f"  {name} {seconds:.2f} s" for name, seconds in figures[case].items()), flush=True
        )
    print(f"wrote {os.path.relpath(save('start_up', figures))}")


if __name__ == "__main__":
    main()
