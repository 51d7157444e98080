"""The scores of a run or a model: for the text of its card, and as the `model-index` of its metadata."""

from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from ..evaluation.protocol import caveat
from ..evaluation.score_files import RunScores, read_run_scores
from ..evaluation.tasks.suite import SAMPLE, task_files
from ..portable import portable_text
from ..provenance import file_sha256


def read_published_scores(folder: Path) -> RunScores:
    """Reads the scores of a run or a model without those on the bundled sample items, which mean nothing."""
    scores = read_run_scores(folder)
    if scores.commonsense:
        # Even if only one task was scored on the sample.
        sample = {file_sha256(file) for file in task_files(SAMPLE).values()}
        if scores.commonsense.protocol.sample or not sample.isdisjoint(scores.commonsense.protocol.data.values()):
            return replace(scores, commonsense=None)
    return scores


def eval_results(scores: RunScores) -> list[Any]:
    """The entries of `model-index` for one model. Scores on a part of a task are not included."""
    from huggingface_hub import EvalResult

    results = []
    if scores.text:
        for source in scores.text.data:
            label = PurePosixPath(portable_text(source.path)).name
            sample = f", sample of {source.bytes:,} bytes" if source.max_bytes else ""
            results.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=label,
                    dataset_name=f"{label}, held-out documents{sample}",
                    dataset_config=source.fingerprint,
                    metric_type="bits_per_byte",
                    metric_name="bits per byte",
                    metric_value=round(scores.text.models[0].by_source[source.path], 4),
                )
            )
    if scores.commonsense and not caveat(scores.commonsense):
        for task, result in scores.commonsense.models[0].results.items():
            results.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=task,
                    dataset_name=task,
                    dataset_args={"num_few_shot": scores.commonsense.protocol.num_fewshot},
                    metric_type=result.metric,
                    metric_value=round(result.score, 2),
                )
            )
    return results
