"""Score files of simulated models, written by the functions that `eval tasks` uses."""

import dataclasses
import math
from pathlib import Path

import numpy as np

from tinyllama_hf.evaluation.comparison.compared_models import find_compared_models
from tinyllama_hf.evaluation.comparison.score_comparison import compare_models
from tinyllama_hf.evaluation.protocol import TASKS
from tinyllama_hf.evaluation.score_files import (
    MetricScore,
    Protocol,
    TaskRow,
    TaskScore,
    TaskScoreFile,
    write_scores,
)
from tinyllama_hf.evaluation.score_metrics import metric_scale
from tinyllama_hf.evaluation.scored_items import ScoredItem, items_file_name, write_scored_items
from tinyllama_hf.released import tables


TABLE = tables()["protocol"]
COUNTS = {"hellaswag": 400, "openbookqa": 100, "winogrande": 150, "arc_challenge": 120, "arc_easy": 200,
          "boolq": 250, "piqa": 180}  # fmt: skip
PROTOCOL = Protocol(
    harness="lm-eval 0.4.13",
    task_versions=dict.fromkeys(TASKS, 1.0),
    metrics=TABLE["metric"],
    dtype="float32",
    num_fewshot=0,
    add_bos_token=False,
    apply_chat_template=False,
    context_length=2048,
    limit=None,
    data=dict.fromkeys(TASKS, "f" * 64),
    sample=False,
)


def simulate(ability: float, seed: int, counts=COUNTS) -> list[ScoredItem]:
    """Items of a model. Their difficulty is that of the item, so that two models are right on similar items."""
    shared, own, items = np.random.default_rng(0), np.random.default_rng(seed), []
    for task in TASKS:
        difficulty, noise = shared.normal(0, 1, max(COUNTS.values())), own.normal(0, 0.7, (2, counts[task]))
        for index in range(counts[task]):
            strength = ability + difficulty[index] + noise[:, index]
            metrics = {"acc": float(strength[0] > 0), "acc_norm": float(strength[1] > 0)}
            bits = float(np.exp(-0.3 * strength.mean()))
            doc = f"{task}-{index}"
            items.append(ScoredItem(task=task, index=index, doc=doc, metrics={**metrics, "bits_per_byte": bits}))
    return items


def task_score(task: str, items: list[ScoredItem], reported: str | None = None) -> TaskScore:
    """The score of a task as lm-eval computes it."""
    own = [item.metrics for item in items if item.task == task]
    metrics = {}
    for name in own[0]:
        values, scale = np.array([m[name] for m in own if name in m]), metric_scale(name)
        error = scale * values.std(ddof=1) / math.sqrt(len(values))
        metrics[name] = MetricScore(scale * float(values.mean()), float(error) if error else None)
    reported = reported or TABLE["metric"][task]
    score = metrics[reported]
    return TaskScore(reported, score.score, score.standard_error, len(own), 1.0, metrics)


def write(
    path: Path, models: dict[str, list[ScoredItem]], protocol: Protocol = PROTOCOL, reported: str | None = None
) -> Path:
    """Writes a score file with the items of its models, perhaps with another reported metric."""
    rows = []
    for name, items in models.items():
        results = {task: task_score(task, items, reported) for task in dict.fromkeys(item.task for item in items)}
        average = math.fsum(r.score for r in results.values()) / len(results)
        row = TaskRow(
            name=name, path=f"models/{name}", fingerprint=f"{name:0>16}", results=results, average=average,
            average_standard_error=None, cut_requests=0, seconds=1.0,
        )  # fmt: skip
        rows.append(dataclasses.replace(row, items_file=items_file_name(path, row)))
        write_scored_items(path.parent / rows[-1].items_file, items)
    write_scores(path, TaskScoreFile(protocol=protocol, models=rows))
    return path


def compared(*arguments, **options):
    """Compares models with 1,000 resamples."""
    return compare_models(find_compared_models([str(argument) for argument in arguments]), resamples=1000, **options)
