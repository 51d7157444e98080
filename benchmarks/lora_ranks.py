"""Is LoRA of rank 8 sufficient? Held-out loss by rank, against training all weights.

    python benchmarks/lora_ranks.py MODEL FILE [FILE ...] [--tokens 200_000] [--output FOLDER]

For each arm (ranks 2, 8, 64 and all weights) three learning rates with one seed, then the best of them with two more
seeds; all on the same number of tokens. A seed decides the order and the initial adapter; the held-out conversations
are the same. Prints the mean of the three seeds with its 95 % confidence interval (Student's t), and the paired
difference to `full`, since equal seeds see the same order.

Every finished run is a file in the output folder, so the same command resumes after an interruption.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

from common import save

from tinyllama_hf.files import read_json
from tinyllama_hf.finetune.config import load_finetune_config
from tinyllama_hf.finetune.sft import finetune_run, open_run
from tinyllama_hf.progress import quiet_library_bars


ADAPTER_RATES, FULL_RATES = ("1e-3", "3e-3", "1e-2"), ("1e-4", "3e-4", "1e-3")
ARMS = {
    "rank 2": ("adapter.kind=lora", "adapter.rank=2", "adapter.alpha=4"),
    "rank 8": ("adapter.kind=lora", "adapter.rank=8", "adapter.alpha=16"),
    "rank 64": ("adapter.kind=lora", "adapter.rank=64", "adapter.alpha=128"),
    "full": ("adapter.kind=full",),
}
SEEDS = (1, 2, 3)
T_QUANTILE = 4.303  # of Student's t with 2 degrees of freedom, 97.5 %


def run_once(recipe: Path, arm: str, rate: str, seed: int, tokens: int, output: Path) -> dict[str, float]:
    """Returns the held-out losses of a run, which is trained unless it is finished."""
    folder = output / f"{arm.replace(' ', '-')}_{rate}_{seed}"
    if not (folder / "provenance.json").is_file():
        options = [*ARMS[arm], f"training.learning_rate={rate}", f"training.seed={seed}", f"output_dir={folder}"]
        per_epoch = sum(open_run(load_finetune_config(recipe, options)).order.lengths)
        finetune_run(open_run(load_finetune_config(recipe, [*options, f"training.epochs={tokens / per_epoch}"])))
    for weights in folder.glob("*.safetensors"):
        weights.unlink()  # only the figures are needed
    return read_json(folder / "provenance.json")["held_out_loss"]


def interval(values: list[float]) -> str:
    """Formats the mean of three values with its 95 % confidence interval."""
    half = T_QUANTILE * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):.4f} ± {half:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--tokens", type=int, default=200_000, help="of each run")
    parser.add_argument("--sequences-per-step", type=int, default=16)
    parser.add_argument("--rates", default=",".join(ADAPTER_RATES), help="of the adapters")
    parser.add_argument("--full-rates", default=",".join(FULL_RATES), help="of all weights")
    parser.add_argument("--output", type=Path, default=Path("runs/lora_ranks"))
    parser.add_argument("--name", default="lora_ranks", help="of the file in results/")
    arguments = parser.parse_args()
    quiet_library_bars()
    arguments.output.mkdir(parents=True, exist_ok=True)
    recipe = arguments.output / "recipe.yaml"
    values = {
        "model": {"path": arguments.model},
        "data": {"conversations": arguments.files, "too_long": "drop"},
        "training": {"sequences_per_step": arguments.sequences_per_step, "warmup_steps": 5},
        "evaluation": {"keep": "last", "every_steps": 1_000_000},  # the last model, as a fixed budget has it
        "logging": {"every_steps": 1_000_000},
    }
    recipe.write_text(json.dumps(values))
    losses: dict[str, dict[int, float]] = {}
    tuned: dict[str, dict[str, float]] = {}
    before = math.nan
    for arm in ARMS:
        rates = (arguments.full_rates if arm == "full" else arguments.rates).split(",")
        found = {rate: run_once(recipe, arm, rate, SEEDS[0], arguments.tokens, arguments.output) for rate in rates}
        before = next(iter(found.values()))["before"]
        tuned[arm] = {rate: values["after"] for rate, values in found.items()}
        best = min(tuned[arm], key=tuned[arm].__getitem__)
        losses[arm] = {
            seed: run_once(recipe, arm, best, seed, arguments.tokens, arguments.output)["after"] for seed in SEEDS
        }
        print(f"{arm}: {tuned[arm]}, seeds at {best}: {losses[arm]}", flush=True)
    print(f"held-out loss before training {before:.4f}")
    print("| | best rate | held-out loss | minus full |\n|---|--:|--:|--:|")
    for arm, by_seed in losses.items():
        best = min(tuned[arm], key=tuned[arm].__getitem__)
        difference = [by_seed[seed] - losses["full"][seed] for seed in SEEDS]
        minus = "" if arm == "full" else interval(difference)
        print(f"| {arm} | {best} | {interval(list(by_seed.values()))} | {minus} |")
    figures = {"tokens": arguments.tokens, "before": before, "rates": tuned, "seeds": losses}
    print(f"wrote {save(arguments.name, figures)}")


if __name__ == "__main__":
    main()
