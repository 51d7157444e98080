"""Scores models, or all milestones of a run, on the commonsense tasks, and writes the score file."""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import provenance
from ..errors import InputError
from ..files import read_json, write_text
from ..inference.load import choose_device
from ..progress import progress_bar
from ..provenance import file_sha256
from ..released import tables
from .harness import BATCH_SIZE, run_task, wrap_model
from .models import list_eval_models, load_eval_model
from .partial_scores import FinishedTask, PartialScores
from .protocol import TASKS
from .score_files import (
    Protocol,
    ScoredModel,
    TaskRow,
    TaskScoreFile,
    read_scores,
    replace_rows,
    write_scores,
)
from .score_metrics import average_standard_error, commonsense_average
from .suite import Suite, open_suite, task_files


# The files that affect scores: stock transformers loads no others.
MODEL_FILES = ("*.safetensors", "*.bin", "config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def score_commonsense(
    models: Sequence[str],
    data: str | None = None,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    device: str = "auto",
    output: Path | None = None,
    samples: Path | None = None,
    note: Callable[[str], Any] = lambda line: None,
    quantization: str = "none",
) -> TaskScoreFile:
    """Scores models under the published protocol. Models that are in the output file are not scored again.

    Args:
        models (`Sequence[str]`): model folders or names; or one run, for all its milestones.
        data (`str`, *optional*): folder with the tasks' rows, or `"embedded:sample"`. By default they are downloaded
            from the Hub.
        limit (`int`, *optional*): number of items per task; by default all.
        batch_size (`int`, *optional*, defaults to 8): rows per forward pass.
        device (`str`, *optional*, defaults to `"auto"`): the device to run on.
        output (`Path`, *optional*): JSON file, written after each model. Other models in it keep their scores.
            Finished tasks are kept next to it until the row of their model is complete, see [`PartialScores`].
        samples (`Path`, *optional*): JSON lines file for all items, written after each model. With it, models in the
            output file are scored again, except for tasks that an interrupted call with the same output finished.
        note (`Callable`): called with a message about a model or tasks that are skipped, or about truncated requests.
        quantization (`str`, *optional*, defaults to `"none"`): quantization to apply while loading. Folders that were
            saved quantized keep their own.

    Returns:
        `TaskScoreFile`: the contents of the score file, with only the given models, in their order.

    Raises:
        InputError: for missing or contradictory input, before the first model is loaded.
    """
    _check_options(limit, batch_size, output, samples)
    device = choose_device(device)
    chosen = list_eval_models(models, quantization)
    context = _common_context([model.folder for model in chosen])
    file = read_scores(output, TaskScoreFile)
    if file:  # checked as far as possible before the tasks are opened, which takes up to a minute
        rows_of = {name: file_sha256(path) for name, path in task_files(data).items()} if data else file.protocol.data
        expected = dataclasses.replace(file.protocol, context_length=context, limit=limit, data=rows_of)
        _check_protocol(output, file, expected)
    with open_suite(data) as suite:
        protocol = _published_protocol(suite, context, limit)
        file = file or TaskScoreFile(protocol=protocol, models=[])
        _check_protocol(output, file, protocol)
        partial = PartialScores(output)
        rows: list[TaskRow] = []
        lines: list[str] = []
        for model in chosen:
            with progress_bar(f"{model.name}: reading the weights"):
                fingerprint = _fingerprint(model.folder)
            own = [row for row in file.models if row.quantization == model.quantization]
            own = [row for row in own if row.path == model.path or row.fingerprint == fingerprint]
            before = next((row for row in own if row.fingerprint == fingerprint), None)
            if before and not samples:
                note(f"{model.name}: already scored under this protocol, with the same weights")
                row = dataclasses.replace(before, **vars(model))
            else:
                finished = _score_folder(model, fingerprint, suite, protocol, batch_size, device, partial, note)
                row = _row(model, fingerprint, finished)
                about = {"model": model.path, "quantization": model.quantization}
                items = [dataclasses.asdict(item) for done in finished for item in done.items]
                lines += [json.dumps({**about, **item}) + "\n" for item in items]
            rows.append(row)
            replace_rows(file.models, own, row)
            write_scores(output, file)
            if samples:
                samples.parent.mkdir(parents=True, exist_ok=True)
                write_text(samples, "".join(lines))
            else:
                partial.discard(rows, protocol)
        partial.discard(rows, protocol)  # with a samples file only now, which has the items of all models
    return dataclasses.replace(file, models=rows)


def _check_options(limit: int | None, batch_size: int, output: Path | None, samples: Path | None) -> None:
    if limit is not None and limit < 2:
        raise InputError(f"--limit {limit}: must be at least 2, to have a standard error")
    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size}: must be at least 1")
    if samples and samples.is_dir():
        raise InputError(f"--samples {samples} is a folder. Name a file")
    if output and output == samples:
        raise InputError(f"--samples {samples} is also the output. Name two files")


def _common_context(folders: Sequence[Path]) -> int:
    """Returns the context that all models share. It is part of the protocol, since longer requests are truncated."""
    contexts = {f: read_json(f / "config.json").get("max_position_embeddings") for f in folders}
    if len(set(contexts.values())) > 1:
        raise InputError(
            f"the contexts of the models differ ({', '.join(f'{f}: {c}' for f, c in contexts.items())}). A protocol "
            "has one context; score the models one at a time, each with its own --output"
        )
    return contexts[folders[0]]


def _published_protocol(suite: Suite, context: int, limit: int | None) -> Protocol:
    """Returns the protocol of TinyLlama's table, completed with the fields that it does not define."""
    table = tables()["protocol"]
    return Protocol(
        harness=suite.harness,
        task_versions=suite.versions,
        metrics=table["metric"],
        **{key: table[key] for key in ("dtype", "num_fewshot", "add_bos_token", "apply_chat_template")},
        context_length=context,
        limit=limit,
        data=suite.data,
        sample=suite.sample,
    )


def _check_protocol(output: Path | None, file: TaskScoreFile, protocol: Protocol) -> None:
    if differences := protocol.differences(file.protocol):
        raise InputError(
            f"--output {output} has scores of another protocol (different: {'; '.join(differences)}). A file has "
            "one protocol. Choose another --output, or remove this file"
        )


def _fingerprint(folder: Path) -> str:
    files = {file.name: file for pattern in MODEL_FILES for file in folder.glob(pattern)}
    return provenance.fingerprint({name: provenance.file_sha256(file) for name, file in files.items()})


def _score_folder(
    model: ScoredModel,
    fingerprint: str,
    suite: Suite,
    protocol: Protocol,
    batch_size: int,
    device: str,
    partial: PartialScores,
    note: Callable[[str], Any],
) -> list[FinishedTask]:
    """Returns the finished tasks of a model in the order of `TASKS`; scores those that are not finished yet."""
    finished = partial.find(model, fingerprint, protocol)
    if finished:
        note(f"{model.name}: {', '.join(finished)}: finished before the interruption")
    if missing := [name for name in TASKS if name not in finished]:
        with progress_bar(f"{model.name}: loading", "requests") as update:
            loaded, tokenizer = load_eval_model(model, device, getattr(torch, protocol.dtype))
            harness_model = wrap_model(loaded, tokenizer, protocol, batch_size, update)
            for name in missing:
                began = time.perf_counter()
                place = f"{TASKS.index(name) + 1} of {len(TASKS)}"
                update(description=f"{model.name}: {name} ({place})", completed=0, total=0)
                score, items, num_cut = run_task(harness_model, name, suite, protocol)
                finished[name] = FinishedTask(
                    model=model.name,
                    fingerprint=fingerprint,
                    quantization=model.quantization,
                    protocol=protocol,
                    task=name,
                    score=score,
                    items=items,
                    cut_requests=num_cut,
                    seconds=time.perf_counter() - began,
                )
                partial.add(finished[name])
    if num_cut := sum(done.cut_requests for done in finished.values()):
        note(
            f"{model.name}: {num_cut} requests are longer than the context of {protocol.context_length} "
            "tokens and were truncated from the left"
        )
    return [finished[name] for name in TASKS]


def _row(model: ScoredModel, fingerprint: str, finished: Sequence[FinishedTask]) -> TaskRow:
    scores = [done.score for done in finished]
    errors = [score.standard_error for score in scores if score.standard_error is not None]
    return TaskRow(
        **vars(model),
        fingerprint=fingerprint,
        results={done.task: done.score for done in finished},
        average=commonsense_average([score.score for score in scores], TASKS),
        average_standard_error=average_standard_error(errors) if len(errors) == len(scores) else None,
        cut_requests=sum(done.cut_requests for done in finished),
        seconds=round(sum(done.seconds for done in finished), 1),
    )
