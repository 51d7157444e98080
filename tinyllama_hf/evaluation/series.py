"""Scores a series of checkpoints in bits per byte, with n-gram models fitted to the same text as baselines."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from .. import provenance
from ..data.mixture import Mixture
from ..errors import InputError
from ..files import locked
from ..pretrain.milestones import find_run, list_milestones, read_record
from ..pretrain.run_record import RunRecord, open_mixture, read_run_record
from ..progress import progress_bar
from ..quantization.names import check_quantization_name
from ..quantization.quantized_model import check_quantization
from ..tokenization_tinyllama import load_tokenizer, tokenizer_fingerprint
from .held_out.baselines import fit_baselines
from .held_out.bits_per_byte import score_documents
from .held_out.held_out_text import DEFAULT_MAX_BYTES, HeldOut, held_out_documents
from .held_out.text_protocol import (
    check_same_dtype,
    check_same_protocol,
    check_same_text,
    check_text_dtype,
    text_dtype,
)
from .models import describe_model, list_eval_models, load_eval_model
from .score_files import ScoredModel, TextRow, TextScoreFile, read_scores, replace_rows, write_scores


SCORES_FILE = "scores.json"


class _Settings(NamedTuple):
    """How models are scored; see [`score`]."""

    device: str
    dtype: str
    max_bytes: int | None
    show_progress: bool = True


class _Series(NamedTuple):
    """The text to score on, and the score file. `run` and `record` are set for the milestones of a run."""

    run: Path | None
    record: RunRecord | None
    held_out: list[HeldOut]
    output: Path | None
    file: TextScoreFile
    settings: _Settings


def score(
    models: Sequence[str],
    data: Sequence[str] = (),
    baselines: bool = False,
    device: str = "auto",
    output: Path | None = None,
    rescore: bool = False,
    show_progress: bool = True,
    quantization: str = "none",
    dtype: str = "fp32",
    max_bytes: int | None = DEFAULT_MAX_BYTES,
) -> TextScoreFile:
    """Scores models, or all milestones of a run, in bits per byte. Models in the output file are not scored again.

    Args:
        models (`Sequence[str]`): model folders or names; or one run, for all its milestones.
        data (`Sequence[str]`, *optional*): prepared data sets with held-out documents. For a run, defaults to its
            training data.
        baselines (`bool`, *optional*, defaults to `False`): for a run, also fit a unigram and a 5-gram model to
            the text that each milestone was trained on.
        device (`str`, *optional*, defaults to `"auto"`): the device to run on.
        output (`Path`, *optional*): JSON file, written after each model.
        rescore (`bool`, *optional*, defaults to `False`): score all models again.
        show_progress (`bool`, *optional*, defaults to `True`): show the progress of each model.
        quantization (`str`, *optional*, defaults to `"none"`): quantization to apply while loading. Folders that were
            saved quantized keep their own.
        dtype (`str`, *optional*, defaults to `"fp32"`): `"fp32"` or `"bf16"`. int4 and fp8 models always use bf16.
        max_bytes (`int`, *optional*, defaults to 2,000,000): UTF-8 bytes of the sample of each data set; `None` for
            all held-out documents.

    Returns:
        `TextScoreFile`: contents of the score file.

    Raises:
        InputError: for missing input, an output file that another process is writing, or one with scores of another
            task, on other text or in another dtype. Raised before the first model is scored.
    """
    settings = _Settings(device, dtype, max_bytes, show_progress)
    with _open_series(models, data, baselines, output, rescore, settings) as series:
        chosen = list_eval_models(models, quantization)
        opened = _open_mixture(series.record) if series.record and baselines else None
        file, before = series.file, list(series.file.models)
        check_same_dtype(before, chosen, dtype, output)
        rows = [_score(model, series) for model in chosen]
        if series.run:  # rows of milestones that no longer exist are removed
            file.models = rows
        write_scores(output, file)
        if opened:
            # Baselines depend on the training text of a milestone, so only those of unchanged milestones are reused.
            kept = {row.step for row in rows if any(row is old for old in before)}
            known = [row for row in file.baselines if row.step in kept]
            for file.baselines in fit_baselines(*opened, [model.folder for model in chosen], series.held_out, known):
                write_scores(output, file)
        return file


def watch(
    run: Path,
    device: str,
    output: Path,
    every_seconds: float,
    log: Callable[[str], None],
    rescore: bool = False,
    quantization: str = "none",
    dtype: str = "fp32",
    max_bytes: int | None = DEFAULT_MAX_BYTES,
) -> None:
    """Scores the milestones of a run as they appear, and returns after the last one.

    Args:
        run (`Path`): a running or finished run.
        device (`str`): the device to run on.
        output (`Path`): JSON file, written after each milestone. It is locked against other processes.
        every_seconds (`float`): time between checks for new milestones.
        log (`Callable[[str], None]`): called with one line per milestone.
        rescore (`bool`, *optional*, defaults to `False`): score all milestones again.
        quantization, dtype, max_bytes (*optional*): as for [`score`].

    Raises:
        InputError: as [`score`], before the first check; or if the folder is not a run.
    """
    last = read_run_record(run).num_steps
    check_quantization_name(quantization)
    check_quantization(quantization)
    settings = _Settings(device, dtype, max_bytes)
    with _open_series([str(run)], (), False, output, rescore, settings) as series:
        logged = set()
        while True:
            for folder in list_milestones(run):
                model = describe_model(folder, quantization)
                check_same_dtype(series.file.models, [model], dtype, output)
                row = _score(model, series)
                if (folder, row.created) not in logged:  # a resumed run may write a milestone again
                    logged.add((folder, row.created))
                    log(f"{row.bits_per_byte:.4f} bits per byte  {row.name}")
                if row.step == last:
                    return
            time.sleep(every_seconds)


def check_can_score(run: Path, data: Sequence[str]) -> None:
    """Checks, before a run starts, that [`score`] can score its milestones. Reads no documents.

    Raises:
        InputError: if the score file of the run is of another task, or on other text.
    """
    if file := read_scores(run / SCORES_FILE, TextScoreFile):
        check_same_text(file, data, DEFAULT_MAX_BYTES, run / SCORES_FILE)


@contextlib.contextmanager
def lock_score_file(path: Path | None) -> Iterator[None]:
    """Keeps other processes from writing a score file, since the rows of one of them would be lost.

    Raises:
        InputError: if another process is writing it, or the file system has no locks.
    """
    if path is None:
        yield
        return
    lock = path.with_name(f".{path.name}.lock")
    with locked(lock, f"--output {path}"):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # while locked, so that it is not the lock of another process


@contextlib.contextmanager
def _open_series(
    models: Sequence[str],
    data: Sequence[str],
    baselines: bool,
    output: Path | None,
    rescore: bool,
    settings: _Settings,
) -> Iterator[_Series]:
    """Checks models and data, locks and reads an existing score file, and opens the held-out documents."""
    check_text_dtype(settings.dtype)
    run = find_run(models)
    record = read_run_record(run) if run else None
    data = _text_to_score(data, record, baselines)
    read_scores(output, TextScoreFile, rescore)  # a file of another task is refused without a lock
    with lock_score_file(output):
        before = read_scores(output, TextScoreFile, rescore)
        if before:
            check_same_text(before, data, settings.max_bytes, output)
        held_out = [held_out_documents(folder, settings.max_bytes) for folder in data]
        sources = [h.source for h in held_out]
        file = dataclasses.replace(before, data=sources) if before else TextScoreFile(data=sources, models=[])
        yield _Series(run, record, held_out, output, file, settings)


def _text_to_score(data: Sequence[str], record: RunRecord | None, baselines: bool) -> Sequence[str]:
    """Returns the data sets to score on, by default those that a run was trained on."""
    if len({Path(folder).resolve() for folder in data}) < len(data):
        raise InputError(f"--data {', '.join(data)} has the same data set twice. Name each one once")
    if record:
        if not data and (missing := [source.path for source in record.sources if not Path(source.path).is_dir()]):
            raise InputError(
                f"data folder {missing[0]} does not exist. Paths of a run are relative to the folder in which it was "
                "started. Run the command there, or pass the data with --data"
            )
        return data or [source.path for source in record.sources]
    if baselines:
        raise InputError(
            "--baselines needs one run (a folder with milestones), since they are fitted to its training text"
        )
    if not data:
        raise InputError("--data is required to score model folders. Name prepared data sets")
    return data


def _score(model: ScoredModel, series: _Series) -> TextRow:
    """Returns the score of a model: that in the file if the folder has not changed since, else a new one."""
    file, run = series.file, series.run
    # Milestones of a run are identified by name, so that a moved run is not scored again.
    own = [row for row in file.models if (row.name == model.name if run else row.path == model.path)]
    own = [row for row in own if row.quantization == model.quantization]
    known = own[0] if own else None
    is_ours = (model.folder / "provenance.json").is_file()  # written by this package
    created = read_record(model.folder).get("created") if is_ours else None
    if known and created is not None and known.created == created:
        return known
    row = _score_folder(model, series, created)
    check_same_protocol(row, [other for other in file.models if other is not known], series.output)
    replace_rows(file.models, own, row)
    write_scores(series.output, file)
    return row


def _score_folder(model: ScoredModel, series: _Series, created: str | None) -> TextRow:
    """Scores a model with stock transformers classes, as users without this package load it."""
    began, settings = time.perf_counter(), series.settings
    dtype = getattr(torch, text_dtype(model, settings.dtype))
    with progress_bar(f"{model.name}: bits per byte", "bytes", show=settings.show_progress) as update:
        loaded, tokenizer = load_eval_model(model, settings.device, dtype)
        scores, protocol = score_documents(loaded, tokenizer, series.held_out, update=update)
    libraries = provenance.collect()["libraries"]
    return TextRow(
        **vars(model),
        created=created,
        **vars(scores),
        protocol=protocol,
        scored_with={name: libraries[name] for name in ("transformers", "torch")} | {"device": loaded.device.type},
        seconds=round(time.perf_counter() - began, 1),
    )


def _open_mixture(record: RunRecord) -> tuple[Mixture, PreTrainedTokenizerBase]:
    """Opens the training text of a run and its tokenizer."""
    tokenizer = load_tokenizer(record.tokenizer)
    return open_mixture(record, tokenizer_fingerprint(tokenizer)), tokenizer
