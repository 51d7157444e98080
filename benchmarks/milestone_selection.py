"""Which milestone to fine-tune: the regret of a choice by scores, the cost saved, and forecasts of the last milestone.

    python benchmarks/milestone_selection.py [--output runs/milestones]

Reads what `milestone_runs.py` has written. Prints three tables:

- forecasts of the last two milestones from those up to the fifth, and of the last from all earlier ones, of every run
  and of the committed run in `results/nano`: from validation losses, and from the milestones alone;
- Spearman's rank correlation of task scores with tokens, and of every score with the loss after fine-tuning;
- the milestone that each score chooses, and its regret: loss on held-out replies after fine-tuning, minus that of the
  milestone with the lowest one. The cost saved compares fine-tuning the choice (with and without its ties) with
  fine-tuning all milestones, in processor time and without the time of scoring, which is printed. `last` is the last
  milestone, which needs no score.

Intervals are percentiles of 2,000 resamples of the held-out conversations and, for scores, of the items of each task;
each resample has one table of losses for all milestones, so the intervals are paired. The three seeds of fine-tuning
are averaged; their spread is printed. Intervals of the cost are of resampled seeds too.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import save
from milestone_runs import RUNS, SEEDS, TASKS, tuned_losses
from scipy.stats import spearmanr

from tinyllama_hf.evaluation.milestone_selection import item_tables, rank_milestones
from tinyllama_hf.evaluation.score_files import TaskScoreFile, TextScoreFile, read_scores
from tinyllama_hf.evaluation.scored_items import read_scored_items
from tinyllama_hf.evaluation.series_forecast import fit_series
from tinyllama_hf.files import read_json
from tinyllama_hf.pretrain.config import load_pretrain_config
from tinyllama_hf.pretrain.milestones import list_milestones, read_record


NANO = Path(__file__).parent / "results" / "nano"
TASK_SCORES = "tasks-published.json"
RESAMPLES, NUM_MILESTONES = 2000, 8
LAST = "last"  # the last milestone, without a score
# Also without BoolQ, whose choices are " yes" and " no": how likely a model is to answer at all hides the rest.
SCORES = {
    LAST: (LAST, ()),
    "text": ("text", ()),
    "bits_per_byte": ("bits_per_byte", ()),
    "bits_per_byte without boolq": ("bits_per_byte", tuple(task for task in TASKS if task != "boolq")),
    "accuracy": ("accuracy", ()),
}


def validations(run: Path) -> list[tuple[int, float]]:
    """Returns tokens and loss of each validation of a run."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["tokens"], row["validation_loss"]) for row in rows if "validation_loss" in row]


def forecasts(run: Path) -> dict[str, list[dict[str, float]]]:
    """Returns the back-tests of a run, from its validation losses and from the losses of its milestones alone."""
    config = load_pretrain_config(run / "training.yaml")
    if run == NANO:
        places = [row["tokens"] for row in read_json(NANO / "milestones.json")["figures"]]
    else:
        places = [read_record(milestone)["tokens"] for milestone in list_milestones(run)]
    losses = dict(validations(run))
    kinds = {
        "validation losses": sorted(losses.items()),
        "milestones alone": [(place, losses[place]) for place in places],
    }
    found = {}
    for kind, points in kinds.items():
        fitted = fit_series(kind, "nats", points, places, config.schedule.warmup_tokens, config.training.total_tokens)
        found[kind] = [
            {
                "known": known,
                "tokens": test.forecast.tokens,
                "forecast": test.forecast.value,
                "low": test.forecast.low,
                "high": test.forecast.high,
                "measured": test.measured,
                "miss": test.miss,
            }
            for known, test in zip(fitted.known, fitted.back_tests, strict=True)
        ]
    return found


def resampled(table: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Returns means over resampled columns of a table `[num_rows, num_columns]`: `[RESAMPLES, num_rows]`."""
    drawn = random.integers(table.shape[1], size=(RESAMPLES, table.shape[1]))
    return np.stack([table[:, columns].mean(1) for columns in drawn])


def interval(values: np.ndarray) -> list[float]:
    """Returns the 95 % interval of resampled values."""
    return np.percentile(values, [2.5, 97.5]).tolist()


class Tuning:
    """The fine-tunings of a series.

    Attributes:
        names (`list[str]`), tokens (`list[int]`): of the milestones.
        by_seed (`np.ndarray`): `[num_milestones, num_seeds]`, loss of the held-out replies in nats per token.
        loss (`np.ndarray`): `[num_milestones]`, mean of the seeds.
        draws (`np.ndarray`): `[RESAMPLES, num_milestones]`, the same for resampled conversations.
        seconds (`np.ndarray`): `[num_milestones, num_seeds]`, processor time of each fine-tuning.
    """

    def __init__(self, run: Path, random: np.random.Generator):
        found = list(tuned_losses(run))
        self.names = [milestone.name for milestone, _, _ in found]
        self.tokens = [tokens for _, tokens, _ in found]
        losses = np.array([[files[seed]["losses"] for seed in SEEDS] for _, _, files in found])
        counts = np.array(found[0][2][SEEDS[0]]["tokens"])
        self.by_seed = losses.sum(2) / counts.sum()
        self.loss = self.by_seed.mean(1)
        drawn = random.integers(len(counts), size=(RESAMPLES, len(counts)))
        self.draws = np.stack([losses.mean(1)[:, d].sum(1) / counts[d].sum() for d in drawn])
        self.seconds = np.array([[files[seed]["cpu_seconds"] for seed in SEEDS] for _, _, files in found])


def scores_of(run: Path, score: str, names: list[str], random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns a score of each milestone, lower is better, and its resamples: `[num_milestones]`, `[RESAMPLES, ...]`.

    Text scores have no values per document, so their resamples are equal.
    """
    metric, tasks = SCORES[score]
    if metric in ("text", LAST):
        file = read_scores(run / "scores.json", TextScoreFile)
        assert file is not None, "milestone_runs.py writes it"
        bits = {row.name: row.bits_per_byte for row in file.models}
        values = np.array([bits[name] if metric == "text" else -float(place) for place, name in enumerate(names)])
        return values, np.tile(values, (RESAMPLES, 1))
    path = run / TASK_SCORES
    file = read_scores(path, TaskScoreFile)
    assert file is not None, "milestone_runs.py --tasks writes it"
    rows = sorted(file.models, key=lambda row: names.index(row.name))
    tables, _ = item_tables(path, rows, [read_scored_items(path, row) for row in rows], metric, tasks)
    sign = -1 if metric == "accuracy" else 1
    values = sign * np.mean([table.mean(1) for table in tables.values()], axis=0)
    return values, sign * np.mean([resampled(table, random) for table in tables.values()], axis=0)


def correlation(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Returns Spearman's rank correlation; 0 if all values of one are equal, which orders nothing."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(spearmanr(a, b).statistic) + 0.0  # no minus zero


def choice(run: Path, score: str, tuning: Tuning, random: np.random.Generator) -> dict[str, Any]:
    """Returns what a score chooses, its regret, the cost saved, and the rank correlations of the score."""
    metric, tasks = SCORES[score]
    values, draws = scores_of(run, score, tuning.names, random)
    chosen = int(np.argmin(values))
    ties = [] if metric == LAST else [milestone.name for milestone in rank_milestones(run, metric, tasks).ties]
    tuned = [chosen, *(tuning.names.index(name) for name in ties)]
    # With ties, all of them are fine-tuned and the best one is kept.
    regret = tuning.draws[np.arange(RESAMPLES), np.argmin(draws, 1)] - tuning.draws.min(1)
    with_ties = tuning.draws[:, tuned].min(1) - tuning.draws.min(1)
    cost = tuning.seconds.mean(1)
    # [RESAMPLES, num_milestones], of resampled seeds
    costs = tuning.seconds.T[random.integers(len(SEEDS), size=(RESAMPLES, len(SEEDS)))].mean(1)
    return {
        "chosen": tuning.names[chosen],
        "ties": ties,
        "regret": float(tuning.loss[chosen] - tuning.loss.min()),
        "regret_interval": interval(regret),
        "regret_with_ties": float(tuning.loss[tuned].min() - tuning.loss.min()),
        "regret_with_ties_interval": interval(with_ties),
        "cost_saved": float(1 - cost[chosen] / cost.sum()),
        "cost_saved_interval": interval(1 - costs[np.arange(RESAMPLES), np.argmin(draws, 1)] / costs.sum(1)),
        "cost_saved_with_ties": float(1 - cost[tuned].sum() / cost.sum()),
        "with_tuned_loss": correlation(values, tuning.loss),
        "with_tuned_loss_interval": interval(
            np.array([correlation(a, b) for a, b in zip(draws, tuning.draws, strict=True)])
        ),
        "values": np.abs(values).tolist(),
        "scoring_seconds": 0 if metric == LAST else scoring_seconds(run, metric),
    }


def correlations(run: Path, random: np.random.Generator) -> dict[str, Any]:
    """Returns the rank correlations of task scores with tokens: 1 if every later milestone is better."""
    milestones = list_milestones(run)
    names, tokens = [m.name for m in milestones], [read_record(m)["tokens"] for m in milestones]
    rows = {row["name"]: row["results"] for row in read_json(run / TASK_SCORES)["models"]}
    scores = {}
    for score, (metric, tasks) in SCORES.items():
        if metric in ("text", LAST) or not set(tasks) <= set(rows[names[0]]):
            continue
        values, draws = scores_of(run, score, names, random)
        scores[score] = {
            "with_tokens": -correlation(values, tokens),
            "with_tokens_interval": interval(np.array([-correlation(draw, tokens) for draw in draws])),
        }
    items = sum(result["items"] for result in rows[names[0]].values())
    return {"items": items, "scores": scores, "tasks": task_correlations(rows, names, tokens)}


def scoring_seconds(run: Path, metric: str) -> float:
    """Returns the time in which all milestones were scored."""
    name = "scores.json" if metric == "text" else TASK_SCORES
    return sum(row["seconds"] for row in read_json(run / name)["models"])


def task_correlations(rows: dict[str, Any], names: list[str], tokens: list[int]) -> dict[str, dict[str, float]]:
    """Returns the same for each task alone."""
    found: dict[str, dict[str, float]] = {}
    for task in rows[names[0]]:
        bits = [rows[name][task]["metrics"]["bits_per_byte"]["score"] for name in names]
        shares = [rows[name][task]["score"] for name in names]
        found[task] = {"bits_per_byte": -correlation(bits, tokens), "accuracy": correlation(shares, tokens)}
    return found


def print_forecasts(found: dict[str, dict[str, list[dict[str, float]]]]) -> None:
    print("| run | fitted to | known until | forecast for | forecast | 95 % interval | measured | miss, % |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for name, kinds in found.items():
        for kind, rows in kinds.items():
            for row in rows:
                print(
                    f"| {name} | {kind} | {row['known']:,} | {row['tokens']:,} | {row['forecast']:.3f} | "
                    f"{row['low']:.3f} to {row['high']:.3f} | {row['measured']:.3f} | {row['miss']:+.2f} |"
                )


def cell(row: dict[str, Any], key: str, digits: int) -> str:
    """Returns a value with its interval as text."""
    low, high = row[f"{key}_interval"]
    return f"{row[key]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def print_correlations(found: dict[str, dict[str, Any]]) -> None:
    print("\n| run | score | rank correlation with tokens | by task |\n|---|---|--:|---|")
    for name, run in found.items():
        for metric, row in run["scores"].items():
            tasks = ", ".join(f"{t} {values[metric]:.2f}" for t, values in run["tasks"].items() if metric in values)
            print(f"| {name} | {metric} | {cell(row, 'with_tokens', 3)} | {tasks} |")


def print_choices(tuning: Tuning, choices: dict[str, dict[str, Any]]) -> None:
    print("\n| milestone | tokens | loss after fine-tuning | seeds | minus the lowest |")
    print("|---|--:|--:|---|--:|")
    best = int(np.argmin(tuning.loss))
    for number, name in enumerate(tuning.names):
        low, high = interval(tuning.draws[:, number] - tuning.draws[:, best])
        seeds = ", ".join(f"{value:.3f}" for value in tuning.by_seed[number])
        print(
            f"| {name} | {tuning.tokens[number]:,} | {tuning.loss[number]:.4f} | {seeds} | "
            f"{tuning.loss[number] - tuning.loss[best]:.4f} ({low:.4f} to {high:.4f}) |"
        )
    print("\n| score | rank correlation with the loss after fine-tuning |\n|---|--:|")
    for metric, row in choices.items():
        print(f"| {metric} | {cell(row, 'with_tuned_loss', 3)} |")
    print("\n| score | chooses | ties | regret, nats | with ties | cost saved | with ties | scoring, s |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for metric, row in choices.items():
        ranges = [cell(row, key, 4) for key in ("regret", "regret_with_ties")]
        low, high = row["cost_saved_interval"]
        saved = f"{row['cost_saved']:.1%} ({low:.1%} to {high:.1%}) | {row['cost_saved_with_ties']:.1%}"
        seconds = f"{row['scoring_seconds']:.0f}"
        print(f"| {metric} | {row['chosen']} | {len(row['ties'])} | {' | '.join(ranges)} | {saved} | {seconds} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/milestones"))
    parser.add_argument("--name", default="milestone_selection", help="of the file in results/")
    arguments = parser.parse_args()
    folders = {name: arguments.output / name for name in RUNS}
    runs = {name: run for name, run in folders.items() if len(list_milestones(run)) == NUM_MILESTONES}
    found = {name: forecasts(run) for name, run in [*runs.items(), ("nano", NANO)]}
    print_forecasts(found)
    random, demo = np.random.default_rng(0), runs["demo"]
    scored = {name: correlations(run, random) for name, run in runs.items() if (run / TASK_SCORES).is_file()}
    print_correlations(scored)
    tuning = Tuning(demo, random)
    used = [score for score, (metric, _) in SCORES.items() if metric in (LAST, "text") or "demo" in scored]
    choices = {score: choice(demo, score, tuning, random) for score in used}
    print_choices(tuning, choices)
    figures = {
        "forecasts": found,
        "correlations": scored,
        "milestones": dict(zip(tuning.names, tuning.tokens, strict=True)),
        "loss_by_seed": tuning.by_seed.tolist(),
        "cpu_seconds": tuning.seconds.tolist(),
        "choices": choices,
    }
    print(f"wrote {save(arguments.name, figures)}")


if __name__ == "__main__":
    main()
