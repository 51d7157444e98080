"""What a card says of a model's scores, in words and in `model-index`."""

from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ..evaluation.harness import SAMPLE, task_files
from ..evaluation.protocol import caveat
from ..evaluation.score_metrics import load_metric
from ..portable import portable_text
from ..provenance import file_sha256, read_json
from .markdown import table


class Scores(NamedTuple):
    """The score files of a run or a model, `None` for each that is not there."""

    bits_per_byte: dict[str, Any] | None
    commonsense: dict[str, Any] | None
    replies: dict[str, Any] | None


def read_scores(folder: Path) -> Scores:
    """Reads what `tinyllama-hf eval` left in a run or beside a model; scores on made-up items are left out."""
    files = (folder / name for name in ("scores.json", "commonsense.json", "replies.json"))
    scores = Scores(*(read_json(file) if file.is_file() else None for file in files))
    if scores.commonsense and _on_made_up_items(scores.commonsense["protocol"]):
        return scores._replace(commonsense=None)
    return scores


def _on_made_up_items(protocol: dict[str, Any]) -> bool:
    """Whether any task read the sample that comes with the package; other tasks of the same scores may have read more."""
    sample = {file_sha256(file) for file in task_files(SAMPLE).values()}
    return protocol["sample"] or not sample.isdisjoint(protocol["data"].values())


def row_of(name: str, scores: dict[str, Any] | None) -> dict[str, Any] | None:
    """The entry of a model in a score file."""
    return next((row for row in scores["models"] if row["name"] == name), None) if scores else None


def eval_results(name: str, scores: Scores) -> list[Any]:
    """The entries of `model-index`: figures on all of a held-out text or task, and no others."""
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


def bits_per_byte(name: str, scores: dict[str, Any] | None) -> str:
    """The section on unseen text; empty without scores of this model."""
    if not (row := row_of(name, scores)):
        return ""
    lines = [
        [portable_text(data["path"]), f"{row['by_source'][data['path']]:.4f}", f"{data['documents']:,}", f"{data['bytes']:,}",
         f"`{data['fingerprint'][:12]}`"]
        for data in scores["data"]
    ]  # fmt: skip
    made_by = row.get("scored_with", scores["provenance"]["libraries"])  # rows of early runs do not say it themselves
    heads = ["held-out text", "bits per byte", "documents", "bytes", "fingerprint"]
    return (
        f"## Bits per byte on unseen text\n\n**{row['bits_per_byte']:.4f}** over all documents, of which no training block "
        f"came. Scored by stock transformers {made_by['transformers']}.\n\n{table(heads, lines)}"
    )


def commonsense(name: str, scores: dict[str, Any] | None) -> str:
    """The section on the seven tasks; empty without scores of this model."""
    if not (row := row_of(name, scores)):
        return ""
    protocol, average = scores["protocol"], average_of(row)
    lines = [
        [task, metric, f"{row['results'][task]['score']:.2f} ± {row['results'][task]['standard_error']:.2f}",
         f"{row['results'][task]['items']:,}", str(protocol["task_versions"][task]), f"`{_rows(protocol['data'][task])}`"]
        for task, metric in protocol["metrics"].items()
    ]  # fmt: skip
    lines.append(["**average**", "", f"**{average['average']:.2f} ± {average['standard_error']:.2f}**", "", "", ""])
    made_on = caveat(protocol, row["results"])
    return (
        "## Commonsense\n\n"
        + (f"**Scored on {made_on}.**\n\n" if made_on else "")
        + f"{table(['task', 'metric', 'percent ± standard error', 'items', 'version', 'rows'], lines)}\n\n"
        f"{protocol['harness']}, {protocol['dtype']}, {protocol['num_fewshot']} examples, "
        f"{'with' if protocol['add_bos_token'] else 'without'} begin-of-sequence, context {protocol['context_length']:,}; "
        "the average is the unweighted mean of the tasks."
    )


def _rows(data: str) -> str:
    """Where a task's rows came from: their place on the Hub, or the beginning of the file's SHA-256."""
    return data if data.startswith("hf://") else data[:12]


def average_of(row: dict[str, Any]) -> dict[str, float]:
    """The mean of the tasks with its standard error, by the metric that the harness uses."""
    return load_metric("commonsense_average").compute(
        predictions=[result["score"] for result in row["results"].values()],
        references=list(row["results"]),
        standard_errors=[result["standard_error"] for result in row["results"].values()],
    )


def replies(record: dict[str, Any], scores: dict[str, Any] | None) -> str:
    """The section on the replies of a fine-tuned model; empty for others."""
    if "held_out_loss" not in record:
        return ""
    losses = record["held_out_loss"]
    text = (
        f"## Replies\n\nThe loss of {record['conversations']['held_out']:,} held-out conversations' replies went from "
        f"{losses['before']:.3f} to **{losses['after']:.3f}** nats per token."
    )
    if scores:
        row = scores["models"][0]
        text += (
            f" Of {row['replies']:,} unseen questions {row['stop_rate']:.1%} of the replies end in the stop token within "
            f"{row['max_new_tokens']} tokens; their median length is {row['median_length']:g} tokens."
        )
    return text
