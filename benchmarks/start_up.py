"""The time to import the package, to print help, to report a mistake in a path or an option, and to the first output.

    python benchmarks/start_up.py [--rounds 5] [--other CHECKOUT]

The first output is measured for correct commands on a pseudo-terminal, for example a line about what is loading.
Medians of new processes in interleaved rounds, the start of Python included. With `--other`, a checkout of another
commit takes turns with this one. `import torch, transformers.models.llama` is there for comparison.
"""

import argparse
import os
import pty
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


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
# Correct ones. MODEL is a folder with a small random model.
FIRST_OUTPUTS = (
    "generate MODEL text",
    "chat MODEL",
    "serve MODEL --port 0",
    "memory MODEL",
    f"plan {RECIPE}",
    "eval tasks MODEL --data embedded:sample",
    "convert MODEL --to llama --output OUT",
    "verify MODEL MODEL",
    "tokenizer verify MODEL",
    "prepare embedded:prose --tokenizer MODEL --output OUT",
    f"pretrain.py {RECIPE} data.tokenizer=MODEL",
)


def start(case: str, root: Path, **streams: Any) -> subprocess.Popen:
    """Starts an import, a command or a script of a checkout in a new process."""
    words = case.split()
    if case.startswith("import "):
        arguments = ["-c", case]
    elif words[0].endswith(".py"):
        arguments = [str(root / "recipes" / words[0]), *words[1:]]
    else:
        arguments = ["-c", "from tinyllama_hf_cli import main; main()", *words]
    environment = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.Popen([sys.executable, *arguments], cwd=root, env=environment, **streams)


def seconds_of(case: str, root: Path) -> float:
    """The time that an import, a command or a script takes."""
    began = time.perf_counter()
    with start(case, root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        process.wait()
    return time.perf_counter() - began


def seconds_to_first_output(case: str, root: Path) -> float:
    """The time until a command or a script writes to the terminal; it is killed then."""
    ours, its = pty.openpty()
    began = time.perf_counter()
    with start(case, root, stdin=its, stdout=its, stderr=its) as process:
        os.read(ours, 1)
        seconds = time.perf_counter() - began
        process.kill()
    os.close(ours)
    os.close(its)
    return seconds


def make_model(folder: Path) -> None:
    """Writes a small random model with a tokenizer."""
    import torch

    from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM
    from tinyllama_hf.data.train_tokenizer import train_tokenizer

    torch.manual_seed(0)
    train_tokenizer([Path(__file__).read_text()], 400, folder)
    TinyLlamaForCausalLM(TinyLlamaConfig.preset("micro", vocab_size=400)).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--other", type=Path, help="checkout of another commit, to compare with")
    arguments = parser.parse_args()
    from common import save

    roots = {"here": ROOT} | ({"other": arguments.other.resolve()} if arguments.other else {})
    figures = {}

    def measure(seconds: Callable[[str, Path], float], case: str, name: str) -> None:
        for root in roots.values():  # fills the disk cache
            seconds(case, root)
        rounds = [{key: seconds(case, root) for key, root in roots.items()} for _ in range(arguments.rounds)]
        figures[name] = {key: round(statistics.median(row[key] for row in rounds), 2) for key in roots}
        print(f"{name:<70}" + "".join(f"  {key} {value:.2f} s" for key, value in figures[name].items()), flush=True)

    for case in (LIBRARIES, PACKAGE, *COMMANDS):
        measure(seconds_of, case, case)
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder, "model"))
        for case in FIRST_OUTPUTS:
            words = case.replace("MODEL", f"{folder}/model").replace("OUT", f"{folder}/out")
            measure(seconds_to_first_output, words, f"first output of {case}")
    print(f"wrote {os.path.relpath(save('start_up', figures))}")


if __name__ == "__main__":
    main()
