"""The scores of a run or a model: for the text of its card, and as the `model-index` of its metadata."""

from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from ..evaluation.protocol import caveat
from ..evaluation.score_metrics import average_standard_error, commonsense_average
from ..evaluation.suite import SAMPLE, task_files
from ..portable import portable_text
from ..provenance import file_sha256
from ..report.run_scores import Scores, read_scores, row_of


def read_published_scores(folder: Path) -> Scores:
    """Reads the scores of a run or a model without those on the bundled sample items, which mean nothing."""
    scores = read_scores(folder)
    is_sample = bool(scores.commonsense) and _uses_sample(scores.commonsense["protocol"])
    return replace(scores, commonsense={}) if is_sample else scores


def _uses_sample(protocol: dict[str, Any]) -> bool:
    """Whether any task was scored on the bundled sample, even if others were not."""
    sample = {file_sha256(file) for file in task_files(SAMPLE).values()}
    return protocol["sample"] or not sample.isdisjoint(protocol["data"].values())


def eval_results(name: str, scores: Scores) -> list[Any]:
    """The entries of `model-index`. Only scores on a complete text or task are included."""
    from huggingface_hub import EvalResult

    results = []
    if row := row_of(name, scores.bits_per_byte):
        for source in scores.bits_per_byte["data"]:
            label = PurePosixPath(portable_text(source["path"])).name
            results.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=label,
                    dataset_name=f"{label}, held-out documents",
                    dataset_config=source["fingerprint"],
                    metric_type="bits_per_byte",
                    metric_name="bits per byte",
                    metric_value=round(row["by_source"][source["path"]], 4),
                )
            )
    if (row := row_of(name, scores.commonsense)) and not caveat(scores.commonsense["protocol"], row["results"]):
        for task, metric in scores.commonsense["protocol"]["metrics"].items():
            results.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=task,
                    dataset_name=task,
                    dataset_args={"num_few_shot": scores.commonsense["protocol"]["num_fewshot"]},
                    metric_type=metric,
                    metric_value=round(row["results"][task]["score"], 2),
                )
            )
    return results


def average_of(row: dict[str, Any]) -> dict[str, float]:
    """The mean of the tasks and its standard error, by the same metric as `eval`."""
    results = row["results"].values()
    return {
        "average": commonsense_average([result["score"] for result in results], list(row["results"])),
        "standard_error": average_standard_error([result["standard_error"] for result in results]),
    }
