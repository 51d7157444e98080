"""Generation and fine-tuning on one GPU: exactness first, then speed; every row is written as it is measured.

    python benchmarks/gpu/run.py                           # on an H100 or H200
    python benchmarks/gpu/run.py --parts drafts peers      # some parts; rows of the others stay in the file
    python benchmarks/gpu/run.py --parts packed_rows full lora qlora --seconds 360
    python benchmarks/gpu/run.py --device cpu --tiny       # the same parts with a small model, to see that they run

Parts, in this order; each runs in a separate process for at most 90 seconds:
- `exactness`: fp32, recorded steps against the loop of transformers; the exit status is 1 if a row is wrong;
- `plain`: 1.1b in bf16 without a draft, with and without graphs, and the share of the limit by memory reads;
- `drafts`: a draft whose step takes a tenth of its target's time, with chosen agreements;
- `quantization`: every quantization that the device supports, next to bf16;
- `peers`: transformers' growing cache, compiled static cache and continuous batching;
- `samples` and `heads`, only if they are named: 100 prompts with 10 samples each; key/value heads at equal size;
- only if they are named: `packed_rows`, losses and gradients of packed conversations, with the same exit status; then
  `full`, `lora` and `qlora`, training steps on packed rows and on padded batches;
- `tasks`, only if it is named: log-likelihoods of all requests of the seven commonsense tasks (task_requests.py).

Weights are random and no row ends early. Rows go to rows.jsonl in $OUT, or to results/gpu_rows.jsonl.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


BEGAN = time.monotonic()
ROOT = Path(__file__).parents[2]
# Neither package nor benchmarks need be installed.
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "gpu")]

MODULES = {
    "exactness": ("exactness", "checks"),
    "plain": ("plain", "plain"),
    "drafts": ("drafts", "drafts"),
    "quantization": ("quantization", "quantizations"),
    "peers": ("peers", "peers"),
    "samples": ("shapes", "samples"),
    "heads": ("shapes", "heads"),
    "packed_rows": ("packed_attention", "packed_rows"),
    "full": ("packed_training", "full"),
    "lora": ("packed_training", "lora"),
    "qlora": ("packed_training", "qlora"),
    "tasks": ("task_requests", "tasks"),
}
DEFAULT = list(MODULES)[:5]
EXACT = ("exactness", "packed_rows")
LIMIT, LEAST, SPARE = 90, 10, 5  # seconds of a part: at most, at least, and between its last row and its end
Row = dict[str, Any]


def append(path: Path, row: Row) -> None:
    """Prints a row and adds it to the file."""
    print("  ".join(f"{key} {value}" for key, value in row.items() if key != "provenance"), flush=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def run_here(part: str, arguments: argparse.Namespace) -> None:
    """Measures the rows of a part until its time is up."""
    from measuring import Bench

    from tinyllama_hf import provenance
    from tinyllama_hf.portable import portable

    bench = Bench(arguments.device, arguments.tiny)
    start = {"device": arguments.device, "dtype": str(bench.dtype), "preset": bench.preset, "tiny": arguments.tiny}
    sizes = {"prompt_tokens": bench.prompt_tokens, "new_tokens": bench.new_tokens}
    append(arguments.output, {"part": part, **start, **sizes, "provenance": portable(provenance.collect())})
    module, function = MODULES[part]
    for row in getattr(importlib.import_module(module), function)(bench):
        append(arguments.output, {"part": part, **row, "at": round(time.monotonic() - BEGAN, 1)})
        if time.monotonic() - BEGAN > arguments.seconds - SPARE:
            append(arguments.output, {"part": part, "stopped": f"after {arguments.seconds:.0f} s, between rows"})
            return
    append(arguments.output, {"part": part, "finished": True, "at": round(time.monotonic() - BEGAN, 1)})


def run_apart(part: str, limit: float, arguments: argparse.Namespace) -> None:
    """Measures a part in a separate process, which an error of the device may end."""
    command = [sys.executable, __file__, "--parts", part, "--here", "--seconds", str(limit)]
    command += ["--device", arguments.device, "--output", str(arguments.output), *(["--tiny"] * arguments.tiny)]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        status = process.wait(limit)
        if status:
            append(arguments.output, {"part": part, "failed": f"ended with status {status}"})
    except subprocess.TimeoutExpired:
        append(arguments.output, {"part": part, "stopped": f"after {limit:.0f} s, within a row"})
    finally:
        with contextlib.suppress(ProcessLookupError):  # with the processes that compile
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def latest(path: Path) -> list[Row]:
    """Returns the rows of the last run of each part."""
    parts: dict[str, list[Row]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "provenance" in row:
            parts[row["part"]] = []
        else:
            parts.setdefault(row["part"], []).append(row)
    return [row for part in MODULES for row in parts.get(part, [])]


def table(rows: list[Row]) -> str:
    """Returns a table for each part, with the columns that its rows have."""
    lines = []
    for part in dict.fromkeys(row["part"] for row in rows):
        own = [{key: str(value) for key, value in row.items() if key not in ("part", "at")}
               for row in rows if row["part"] == part and "finished" not in row]  # fmt: skip
        columns = list(dict.fromkeys(key for row in own for key in row))
        lines += ["", f"**{part}**", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(row.get(key, '') for key in columns)} |" for row in own]
    return "\n".join(lines)


def is_bad(row: Row) -> bool:
    """Whether a row is wrong, its part failed, or was not checked to its end."""
    return bool(row.get("wrong")) or "failed" in row or (row["part"] in EXACT and "stopped" in row)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=MODULES, default=DEFAULT)
    parser.add_argument("--seconds", type=float, default=570, help="of all parts together")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models and few tokens, to see that it runs")
    folder = os.environ.get("OUT")
    default = Path(folder) / "rows.jsonl" if folder else ROOT / "benchmarks" / "results" / "gpu_rows.jsonl"
    parser.add_argument("--output", type=Path, default=default, help="rows are appended to this file")
    parser.add_argument("--here", action="store_true", help="in this process, without a limit within a row")
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    if arguments.here:
        for part in arguments.parts:
            run_here(part, arguments)
        return 0
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "--device cuda: this machine has no GPU that torch can use; --device cpu --tiny shows that all runs"
        )
    for part in arguments.parts:
        limit = min(LIMIT, arguments.seconds - (time.monotonic() - BEGAN))
        if limit < LEAST:
            append(arguments.output, {"part": part, "stopped": "before it began: no time left"})
        else:
            run_apart(part, limit, arguments)
    rows = latest(arguments.output)
    print(table(rows))
    bad = [row for row in rows if is_bad(row)]
    print(f"\n{time.monotonic() - BEGAN:.0f} s, {len(rows)} rows in {arguments.output}, {len(bad)} of them bad")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
