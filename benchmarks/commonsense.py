"""Scoring checkpoints on the seven tasks: time against lm-eval's `hf` model, and equal choices.

    python benchmarks/commonsense.py MODEL [MODEL ...] --data FOLDER [--tasks arc_easy piqa ...] [--limit 500]
        [--rounds 1] [--output FOLDER]

Each run is a process from start to finish: `ours` is one `eval/commonsense.py` for all models, `lm-eval` one
`lm_eval run --model hf` per model (fp32, no begin-of-sequence, batches of 16, the same rows). Runs take turns. The
clock is the processor time of the processes, which other load affects little; set one thread.

Prints the seconds, the ratio, and for which items the two choose differently, with the difference of the two best
choices. Finished runs are files in the output folder, so the same command resumes.
"""

import argparse
import gzip
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from common import save

from tinyllama_hf.evaluation.protocol import TASKS
from tinyllama_hf.evaluation.tasks.suite import task_files
from tinyllama_hf.evaluation.tasks.task_data import COMMONSENSE_SPLITS
from tinyllama_hf.evaluation.tasks.task_index import choose_tasks, index_tasks
from tinyllama_hf.files import read_json, write_json


BY_CHARACTER = {"hellaswag", "openbookqa", "arc_challenge", "arc_easy", "piqa"}
CLOSE = 1e-4


def measured(command: Sequence[str]) -> dict[str, float]:
    """Runs a command, and returns the processor seconds of it and its children, and the seconds that passed."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"processor_seconds": used, "seconds": time.perf_counter() - began}


def write_tasks(tasks: Sequence[str], data: str, folder: Path) -> None:
    """Writes definitions that read local rows, for lm-eval's own command line. They include the stock ones."""
    chosen = choose_tasks(tasks, index_tasks(None))
    for name, file in task_files(data).items():
        if name not in tasks:
            continue
        scored = COMMONSENSE_SPLITS[name]
        rows = {scored: str(file.resolve())}
        own: dict[str, Any] = {"task": f"local_{name}", "include": str(chosen.files[name].path)}
        own |= {f"{split}_split": split if split == scored else None for split in ("validation", "test")}
        own |= {"training_split": None, "fewshot_split": None}  # lm-eval opens the splits that are named
        own |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": rows}}
        (folder / f"local_{name}.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")


def score_ours(models: Sequence[str], arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    limit = ["--limit", str(arguments.limit)] if arguments.limit else []
    chosen = [word for name in arguments.tasks for word in ("--task", name)]
    files = ["--output", str(folder / "scores.json"), "--samples", str(folder / "ours.jsonl")]
    script = Path(__file__).parents[1] / "eval" / "commonsense.py"
    return measured([sys.executable, str(script), *models, "--data", arguments.data, *files, *limit, *chosen])


def score_theirs(models: Sequence[str], arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    total = {"processor_seconds": 0.0, "seconds": 0.0}
    limit = ["--limit", str(arguments.limit)] if arguments.limit else []
    with tempfile.TemporaryDirectory() as definitions:
        write_tasks(arguments.tasks, arguments.data, Path(definitions))
        for number, model in enumerate(models):
            about = f"pretrained={model},dtype=float32,add_bos_token=False"
            command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", about]
            command += [
                "--tasks",
                *(f"local_{name}" for name in arguments.tasks),
                "--batch_size",
                "16",
                "--device",
                "cpu",
            ]
            command += ["--include_path", definitions, "--log_samples", "--output_path", str(folder / str(number))]
            for name, seconds in measured([*command, *limit]).items():
                total[name] += seconds
    return total


def read_theirs(folder: Path, models: Sequence[str], tasks: Sequence[str]) -> dict[tuple[str, str, int], list[float]]:
    """Returns lm-eval's log-likelihoods by model, task and number of the item."""
    found = {}
    for number, model in enumerate(models):
        for name in tasks:
            (file,) = (folder / str(number)).rglob(f"samples_local_{name}_*.jsonl")
            for line in file.open(encoding="utf-8"):
                sample = json.loads(line)
                found[model, name, sample["doc_id"]] = [float(answer[0][0]) for answer in sample["resps"]]
    return found


def differences(folder: Path, data: str, models: Sequence[str], tasks: Sequence[str]) -> dict[str, Any]:
    """Compares the two item by item."""
    theirs, leads, largest, items, correct = read_theirs(folder / "lm-eval", models, tasks), {}, 0.0, 0, {}
    lengths = {name: [_lengths(name, row) for row in _rows(data, name)] for name in tasks}
    for line in (folder / "ours" / "ours.jsonl").open(encoding="utf-8"):
        item = json.loads(line)
        key = item["model"], item["task"], item["index"]
        own, other = np.array(item["log_likelihoods"]), np.array(theirs[key])
        largest, items = max(largest, float(abs(own - other).max())), items + 1
        per = np.array(lengths[item["task"]][item["index"]] if item["task"] in BY_CHARACTER else [1] * len(own))
        best = np.sort(other / per)[::-1]
        chosen = [int(np.argmax(values / per)) for values in (own, other)]
        right = correct.setdefault(f"{Path(key[0]).name}, {key[1]}", [0, 0, 0])
        right[0] += chosen[0] == item["gold"]
        right[1] += chosen[1] == item["gold"]
        right[2] += 1
        if chosen[0] != chosen[1]:
            leads[" ".join(map(str, (Path(key[0]).name, *key[1:])))] = float(best[0] - best[1])
    return {
        "items": items,
        "largest_difference": largest,
        "chosen_differently": leads,
        "wrong": [key for key, lead in leads.items() if lead >= CLOSE],
        "right": {
            key: dict(zip(("ours", "lm-eval", "items"), values, strict=True)) for key, values in correct.items()
        },
    }


def _rows(data: str, name: str) -> list[dict[str, Any]]:
    file = task_files(data)[name]
    opened = gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8")
    with opened as lines:
        return [json.loads(line) for line in lines]


def _lengths(name: str, row: dict[str, Any]) -> list[int]:
    """Returns the characters of each choice, from the independent scorer of the tests."""
    from tests.evaluation.commonsense_scorer import question

    return question(name, row)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--data", required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    parser.add_argument("--limit", type=int, default=500, help="items per task; 0 for all")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/commonsense_benchmark"))
    parser.add_argument("--name", default="commonsense", help="of the file in results/")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path.insert(0, str(Path(__file__).parents[1]))
    seconds: dict[str, list[float]] = {"ours": [], "lm-eval": []}
    for number in range(arguments.rounds):
        for name, score in (("ours", score_ours), ("lm-eval", score_theirs)):
            folder = arguments.output / str(number) / name
            done = folder / "seconds.json"
            if not done.is_file():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                write_json(done, score(arguments.models, arguments, folder))
            seconds[name].append(read_json(done)["processor_seconds"])
            print(f"round {number}, {name}: {seconds[name][-1]:.0f} processor seconds", flush=True)
    found = differences(arguments.output / "0", arguments.data, arguments.models, arguments.tasks)
    ratio = statistics.median(seconds["lm-eval"]) / statistics.median(seconds["ours"])
    print(f"{len(arguments.models)} models, {found['items']} items: {ratio:.2f} times as fast as lm-eval")
    print(f"largest difference of a log-likelihood {found['largest_difference']:.1e}")
    print(
        f"{len(found['chosen_differently'])} chosen differently, {len(found['wrong'])} of them with a lead above 1e-4"
    )
    figures = {
        "models": len(arguments.models),
        "tasks": arguments.tasks,
        "limit": arguments.limit,
        "seconds": seconds,
        "ratio": ratio,
        **found,
    }
    print(f"wrote {save(arguments.name, figures)}")


if __name__ == "__main__":
    main()
