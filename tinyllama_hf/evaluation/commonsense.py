"""Scoring models, or every milestone of a run, on the commonsense tasks, into one file under one protocol."""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from .. import provenance
from ..errors import InputError
from ..files import read_json, write_text
from ..inference.load import choose_device
from ..released import tables
from .harness import BATCH_SIZE, run_suite
from .models import Evaluated, load_evaluated, models_to_score
from .protocol import TASKS, Protocol
from .score_files import CommonsenseRow, ScoreFile
from .score_metrics import commonsense_average
from .suite import Suite, open_suite


# What decides the scores of a model folder; stock transformers loads no more.
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
) -> dict[str, Any]:
    """Scores models under the published protocol. Nothing is scored twice: the output file is read first.

    Args:
        models (`Sequence[str]`): model folders or names; or one run, for all its milestones.
        data (`str`, *optional*): folder with the tasks' rows, or `"embedded:sample"`; without it they come from the Hub.
        limit (`int`, *optional*): items of each task; all by default.
        batch_size (`int`, *optional*, defaults to 8): rows of a forward pass.
        device (`str`, *optional*, defaults to `"auto"`): where the models run.
        output (`Path`, *optional*): JSON file, written after each model. Models that it already has under an equal
            protocol keep their scores.
        samples (`Path`, *optional*): JSON lines of every item, also written after each model; makes all be scored anew.
        note (`Callable`): called with a line for the user about a model that is left out, or cut requests.
        quantization (`str`, *optional*, defaults to `"none"`): to quantise the models to while they are loaded; folders
            that were saved quantised have their own.

    Returns:
        `dict`: contents of the output file, with the models asked for in their order.

    Raises:
        InputError: for anything missing or contradictory, before the first model is loaded.
    """
    _check_options(limit, batch_size, output, samples)
    device = choose_device(device)
    chosen = models_to_score(models, quantization)
    context = _common_context([model.folder for model in chosen])
    with open_suite(data) as suite:
        protocol = _published_protocol(suite, context, limit)
        file = _open_file(output, protocol)
        rows, lines = [], []
        for model in chosen:
            known = {**model.record(), "fingerprint": _fingerprint(model.folder)}
            before = file.find(("fingerprint", known["fingerprint"], model.quantization))
            if before and not samples:
                note(f"{model.name}: scored before under this protocol, with these weights")
                rows.append(dataclasses.replace(before, **known))
            else:
                row, items = _score_folder(model, known, suite, protocol, batch_size, device, note)
                rows.append(row)
                about = {"model": str(model.folder), "quantization": model.quantization}
                lines += [json.dumps({**about, **item}) + "\n" for item in items]
            file.add(rows[-1])
            if samples:
                samples.parent.mkdir(parents=True, exist_ok=True)
                write_text(samples, "".join(lines))
    return file.contents(rows)


def _check_options(limit: int | None, batch_size: int, output: Path | None, samples: Path | None) -> None:
    if limit is not None and limit < 2:
        raise InputError(f"--limit {limit}: must be at least 2, since one item has no standard error")
    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size}: must be at least 1")
    if samples and samples.is_dir():
        raise InputError(f"--samples {samples}: is a folder; name a file")
    if output and output == samples:
        raise InputError(f"--samples {samples}: is also the output; name two files")


def _common_context(folders: Sequence[Path]) -> int:
    """Tokens that the models read; they decide what is cut from a long request, so all must agree."""
    contexts = {f: read_json(f / "config.json").get("max_position_embeddings") for f in folders}
    if len(set(contexts.values())) > 1:
        raise InputError(
            f"the models' contexts differ ({', '.join(f'{f}: {c}' for f, c in contexts.items())}), and a protocol has "
            "one; score them one at a time, each into a file of its own"
        )
    return contexts[folders[0]]


def _published_protocol(suite: Suite, context: int, limit: int | None) -> Protocol:
    """The protocol of TinyLlama's table, with what it leaves open."""
    table = tables()["protocol"]
    fixed = {key: table[key] for key in ("dtype", "num_fewshot", "add_bos_token", "apply_chat_template")}
    return Protocol(
        harness=suite.harness,
        task_versions=suite.versions,
        metrics=table["metric"],
        **fixed,
        context_length=context,
        limit=limit,
        data=suite.data,
        sample=suite.sample,
    )


def _open_file(output: Path | None, protocol: Protocol) -> ScoreFile[CommonsenseRow]:
    """The score file. A quantized model is another than the plain one of the same path and files."""

    def check_protocol(before: dict[str, Any]) -> None:
        if differences := protocol.differences(before.get("protocol", {})):
            raise InputError(
                f"--output {output}: holds scores of another protocol (different: {'; '.join(differences)}), and scores of "
                "two protocols do not belong together; name another file, or remove this one"
            )

    return ScoreFile(
        output,
        "commonsense",
        {"protocol": protocol.to_dict()},
        CommonsenseRow,
        lambda row: {("path", row.path, row.quantization), ("fingerprint", row.fingerprint, row.quantization)},
        check_protocol,
    )


def _fingerprint(folder: Path) -> str:
    files = {file.name: file for pattern in MODEL_FILES for file in folder.glob(pattern)}
    return provenance.fingerprint({name: provenance.file_sha256(file) for name, file in files.items()})


def _score_folder(
    model: Evaluated,
    known: dict[str, Any],
    suite: Suite,
    protocol: Protocol,
    batch_size: int,
    device: str,
    note: Callable[[str], Any],
) -> tuple[CommonsenseRow, list[dict[str, Any]]]:
    """A model's entry of the score file, and all its items."""
    began = time.perf_counter()
    loaded, tokenizer = load_evaluated(model, device, getattr(torch, protocol.dtype))
    with Progress(transient=True, disable=not Console().is_terminal) as bar:
        task = bar.add_task(f"Scoring {known['name']}", total=None)
        outcome = run_suite(
            loaded,
            tokenizer,
            suite,
            protocol,
            batch_size,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    if outcome.num_cut:
        note(f"{known['name']}: {outcome.num_cut} requests are longer than its context of {protocol.context_length} tokens; "
             "their beginnings were cut")  # fmt: skip
    results = [outcome.results[name] for name in TASKS]
    average = commonsense_average([r.score for r in results], TASKS, [r.standard_error for r in results])
    row = CommonsenseRow(
        **known,
        results=outcome.results,
        average=average["average"],
        average_standard_error=average["standard_error"],
        cut_requests=outcome.num_cut,
        seconds=round(time.perf_counter() - began, 1),
    )
    return row, outcome.items
