"""The runs behind `milestone_selection.py`: pretraining runs with eight milestones, and those of one run fine-tuned
with three seeds each.

    python benchmarks/milestone_runs.py CONVERSATIONS [--output runs/milestones] [--corpora FOLDER] [--tasks FOLDER]

`demo` is the recipe of the demo with a milestone every 150,000 tokens; `wsd` is the same model with another schedule,
seed and rate. `text` is the model of the demo on books and web pages, each read at most once, from JSON lines in
`CORPORA/books` and `CORPORA/web`. Every milestone of `demo` is fine-tuned on
CONVERSATIONS for one epoch, with all weights, and scored on the held-out conversations one by one. Task scores of
`demo` and `text` need a folder with the tasks' rows.

Every finished stage is a file or a folder in the output folder, so the same command resumes after an interruption.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tinyllama_hf.files import read_json, write_json
from tinyllama_hf.pretrain.milestones import list_milestones, read_record


RECIPES = Path(__file__).parents[1] / "recipes"
SEEDS = (1, 2, 3)
# Of the seven commonsense tasks without piqa: some of its choices are longer than the context of the demo's model.
TASKS = ("hellaswag", "openbookqa", "winogrande", "arc_challenge", "arc_easy", "boolq")
MILESTONES = "milestones.tokens=[150_000, 300_000, 450_000, 600_000, 750_000, 900_000, 1_050_000]"
_VALIDATION = "validation.every_tokens=50_000"
RUNS = {
    "demo": ("demo/pretrain.yaml", [MILESTONES, _VALIDATION]),
    "wsd": (
        "demo/pretrain.yaml",
        [
            *(MILESTONES, _VALIDATION, "training.seed=1", "schedule.name=wsd", "schedule.decay_tokens=240_000"),
            *("schedule.peak=1e-3", "schedule.floor=0"),
        ],
    ),
    "text": (
        "demo/pretrain.yaml",
        [
            "milestones.tokens=[100_000, 200_000, 300_000, 400_000, 500_000, 600_000, 800_000]",
            *("training.total_tokens=1_000_000", _VALIDATION, "training.seed=3"),
        ],
    ),
}
DEMO_DATA, TEXT_DATA = {"prose": 0.7, "code": 0.3}, {"books": 0.5, "web": 0.5}


def command(*words: object) -> None:
    """Runs `tinyllama-hf` or a script in a separate process, and prints the command."""
    texts = [str(word) for word in words]
    print("$", *texts, flush=True)
    subprocess.run([sys.executable, *texts], check=True)


def tinyllama(*words: object) -> None:
    """Runs a command of this package."""
    command("-c", "import sys; from tinyllama_hf_cli import main; sys.exit(main())", *words)


def prepare(output: Path, corpora: Path | None) -> None:
    """Trains the tokenizer and prepares the data as the demo does, and those of `text`."""
    if not (output / "tokenizer").is_dir():
        sources = ("embedded:prose", "embedded:code")
        tinyllama("tokenizer", "train", *sources, "--vocab-size", 2048, "--output", output / "tokenizer")
    for name, held_out, sample in (("prose", 0.05, 0.28), ("code", 0.01, 0.047)):
        if not (output / "data" / name).is_dir():
            tinyllama(
                *("prepare", f"embedded:{name}", "--tokenizer", output / "tokenizer"),
                *("--output", output / "data" / name),
                *("--validation-fraction", held_out, "--sample-fraction", sample),
            )
    for name, held_out, sample in (("books", 0.1, 0.15), ("web", 0.02, 1)):
        if corpora and not (output / "data" / name).is_dir():
            tinyllama(
                *("prepare", corpora / name / "train.jsonl.gz", "--tokenizer", output / "tokenizer"),
                *("--output", output / "data" / name),
                *("--validation-fraction", held_out, "--sample-fraction", sample),
            )


def pretrain(output: Path, name: str) -> Path:
    """Trains a run, or resumes it; returns its folder."""
    recipe, settings = RUNS[name]
    weights = (TEXT_DATA if name == "text" else DEMO_DATA).items()
    data = ", ".join(f"{{path: {output / 'data' / part}, weight: {weight}}}" for part, weight in weights)
    own = [f"output_dir={output / name}", f"data.tokenizer={output / 'tokenizer'}", f"data.sources=[{data}]"]
    command(RECIPES / "pretrain.py", RECIPES / recipe, *own, *settings)
    return output / name


def fine_tune(milestone: Path, conversations: Path, seed: int, folder: Path) -> None:
    """Fine-tunes a milestone, and writes the summed loss of each held-out reply in nats and its number of tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    from tinyllama_hf.finetune.config import load_finetune_config
    from tinyllama_hf.finetune.replies import reply_losses
    from tinyllama_hf.finetune.sft import finetune_run, open_run

    target = folder / f"{milestone.name}_{seed}.json"
    if target.is_file():
        return
    tuned = folder / "tuned"
    options = [
        *(f"model.path={milestone}", f"output_dir={tuned}", f"data.conversations={conversations}"),
        *("data.validation_fraction=0.2", "data.max_length=null", "data.too_long=drop"),
        *("training.epochs=1", f"training.seed={seed}", "training.micro_batch_size=8"),
        # The last model, as a fixed budget has it: a choice by the held-out loss would favor some milestones.
        *("evaluation.keep=last", "evaluation.every_steps=1_000_000", "logging.every_steps=1_000_000"),
    ]
    began, cpu = time.perf_counter(), time.process_time()
    run = open_run(load_finetune_config(RECIPES / "sft" / "full.yaml", options), overwrite=True)
    finetune_run(run, overwrite=True)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    model = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32)
    write_json(
        target,
        {
            "losses": reply_losses(model.eval(), run.held_out.examples),
            "tokens": [sum(example.assistant_masks[1:]) for example in run.held_out.examples],
            "trained_tokens": run.order.tokens_after()[-1],
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "held_out_loss": read_json(tuned / "provenance.json")["held_out_loss"],
        },
    )


def tuned_losses(run: Path) -> Iterator[tuple[Path, int, dict[int, dict]]]:
    """Yields the milestones of a run, their tokens, and what [`fine_tune`] wrote for each seed."""
    for milestone in list_milestones(run):
        files = {seed: run / "tuning" / f"{milestone.name}_{seed}.json" for seed in SEEDS}
        yield milestone, read_record(milestone)["tokens"], {seed: read_json(file) for seed, file in files.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("conversations", type=Path, help="JSON lines, as for recipes/sft.py")
    parser.add_argument("--output", type=Path, default=Path("runs/milestones"))
    parser.add_argument("--runs", default="demo,wsd", help="to train; text needs --corpora")
    parser.add_argument("--corpora", type=Path, help="folder with books/train.jsonl.gz and web/train.jsonl.gz")
    parser.add_argument("--tasks", type=Path, help="folder with the tasks' rows, to score every milestone")
    parser.add_argument("--limit", type=int, default=500, help="items per task; 200 for `text`")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    prepare(arguments.output, arguments.corpora)
    for name in arguments.runs.split(","):
        run = pretrain(arguments.output, name)
        if name != "text":  # its held-out books would take half an hour
            tinyllama("eval", "text", run)
    if arguments.tasks:
        chosen = [word for task in TASKS for word in ("--task", task)]
        for name in {"demo", "text"} & set(arguments.runs.split(",")):
            run = arguments.output / name
            tinyllama("eval", "tasks", run, "--data", arguments.tasks, "--limit", arguments.limit, *chosen)
    demo = arguments.output / "demo"
    (demo / "tuning").mkdir(exist_ok=True)
    for seed in SEEDS:
        for milestone in list_milestones(demo):
            fine_tune(milestone, arguments.conversations, seed, demo / "tuning")
            print(f"fine-tuned {milestone.name} with seed {seed}", flush=True)


if __name__ == "__main__":
    main()
