"""Prepares a corpus for pretraining: tokenizes documents into shards, with a datatrove pipeline.

A finished folder contains

    dataset.json                  metadata: tokenizer, separators, counts, fingerprint, provenance
    tokenizer/                    the tokenizer that was used
    train/00000.tokens            little-endian uint16 (uint32 above 65536 ids), the concatenated documents
    train/00000.tokens.index      uint64 end of each document, in tokens of that file
    validation/...                the same for the held-out documents
    validation/00000.jsonl.gz     text of the held-out documents

`dataset.json` is written last. Without it the preparation was interrupted, and the same call resumes with the tasks
that are not complete. A task is complete for the input file that it read; a file that changed since is read again.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from .. import provenance
from ..errors import InputError, did_you_mean, require
from ..files import locked, read_json, write_json
from ..tokenization_tinyllama import load_tokenizer, tokenizer_fingerprint
from .shards import FORMAT_VERSION, METADATA_FILE, SPLITS, Shard
from .sources import Source, open_sources
from .tasks import DataRequest, complete_tasks, read_task_result


SEPARATORS = ("both", "bos", "eos")


def prepare(
    sources: Sequence[str],
    tokenizer: str | os.PathLike,
    output: str | os.PathLike,
    separator: str = "both",
    validation_fraction: float = 0.005,
    sample_fraction: float = 1.0,
    text_column: str = "text",
    where: str | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> tuple[dict[str, Any], bool]:
    """Tokenizes documents into shards, and holds out a share of them for validation.

    The split of a document depends only on the hash of its text, so equal documents are always in the same split.

    Args:
        sources (`Sequence[str]`): `embedded:prose` or `embedded:code`; or files and folders of `.jsonl`, `.jsonl.gz`,
            `.jsonl.zst`; of `.parquet`; or of `.txt`, `.md`, `.rst`, `.py`, one document per file; or data sets of the
            Hub, `hub:OWNER/NAME[@REVISION][/PATTERN]`, which are downloaded first. One kind per call.
        tokenizer (`str` or `os.PathLike`): as for [`load_tokenizer`].
        output (`str` or `os.PathLike`): folder to write.
        separator (`str`): `"both"` adds begin- and end-of-sequence tokens to each document, `"bos"` or `"eos"` one of
            them.
        validation_fraction (`float`): expected share of documents that are held out.
        sample_fraction (`float`): expected share of the other documents that are used for training, also chosen by
            hash.
        text_column (`str`): column of rows with the text, as a dotted path.
        where (`str`, *optional*): expression that selects rows, see [`data.expressions`].
        workers (`int`, *optional*, defaults to the number of cores): number of processes.
        progress (`bool`, *optional*, defaults to `True`): show a progress bar.

    Returns:
        `tuple[dict, bool]`: the metadata, and whether the data set was already finished.

    Raises:
        InputError: if a source is missing or unreadable, the output holds something else, a value is out of range, or
            the output cannot be written, as on a full disk. Complete tasks are kept, and the same call resumes.
    """
    preparation = plan_preparation(
        sources, tokenizer, output, separator, validation_fraction, sample_fraction, text_column, where
    )
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers} must be at least 1")
    if preparation.is_finished:
        return read_json(preparation.output / METADATA_FILE), True
    with locked(preparation.output / "work" / "lock", f"--output {preparation.output}"):
        if _is_finished(preparation.output, preparation.request):  # in the meantime, by another process
            return read_json(preparation.output / METADATA_FILE), True
        metadata = _run(preparation, workers or os.cpu_count() or 1, progress)
    shutil.rmtree(preparation.output / "work", ignore_errors=True)
    return metadata, False


def _run(preparation: "Preparation", workers: int, progress: bool) -> dict[str, Any]:
    from .pipeline import run_pipeline

    try:
        write_request(preparation)
        with _translate_write_errors(preparation.output):
            run_pipeline(preparation.source, preparation.output, preparation.request, workers, progress)
    except InputError as error:
        if done := len(complete_tasks(preparation.output, preparation.source, preparation.request.token_bytes)):
            raise InputError(
                f"{error}\n{done} of {preparation.source.num_tasks} files are finished and kept in "
                f"{preparation.output}; the same command resumes with the others"
            ) from error
        shutil.rmtree(preparation.output, ignore_errors=True)
        raise
    shards, rows = _results(preparation)
    if not any(shard.tokens for shard in shards["train"]):
        shutil.rmtree(preparation.output, ignore_errors=True)  # another call may use other settings
        raise InputError(_nothing_to_train_on(preparation, rows))
    metadata = _describe(preparation, shards, rows)
    with _translate_write_errors(preparation.output):
        write_json(preparation.output / METADATA_FILE, metadata)
    return metadata


@contextlib.contextmanager
def _translate_write_errors(output: Path) -> Iterator[None]:
    """Translates failed writes, as on a full disk, into an [`InputError`]."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"--output {output} cannot be written ({error.strerror or error}). Free space or fix the cause, and run "
            "the same command again"
        ) from error


def write_request(preparation: "Preparation") -> None:
    """Writes what the tasks need, and the request, which identifies the folder in later calls.

    Tasks with changed input are marked as incomplete.

    Raises:
        InputError: if the output cannot be written.
    """
    work = preparation.output / "work"
    with _translate_write_errors(preparation.output):
        work.mkdir(parents=True, exist_ok=True)
        write_json(work / "request.json", preparation.request.to_json())
        try:
            # Saved by each call: small compared with the data, and complete after an interruption.
            preparation.tokenizer.save_pretrained(preparation.output / "tokenizer")
        except Exception as error:  # tokenizers (0.23) raises no subclass
            if "os error" in str(error):
                raise OSError(str(error)) from error
            raise
        complete_tasks(preparation.output, preparation.source, preparation.request.token_bytes)


class Preparation(NamedTuple):
    """A validated request: sources, tokenizer, output, and whether it is already finished."""

    source: Source
    tokenizer: PreTrainedTokenizerFast
    output: Path
    request: DataRequest
    is_finished: bool


def plan_preparation(
    sources: Sequence[str],
    tokenizer: str | os.PathLike,
    output: str | os.PathLike,
    separator: str = "both",
    validation_fraction: float = 0.005,
    sample_fraction: float = 1.0,
    text_column: str = "text",
    where: str | None = None,
) -> Preparation:
    """Validates a request without writing anything; arguments and errors as for [`prepare`]."""
    if separator not in SEPARATORS:
        raise InputError(f"--separator {separator!r} is unknown{did_you_mean(separator, SEPARATORS)}")
    require("datatrove", "data", "preparing data")
    if not 0 <= validation_fraction < 1:
        raise InputError(f"--validation-fraction {validation_fraction} must be at least 0 and below 1")
    if not 0 < sample_fraction <= 1:
        raise InputError(f"--sample-fraction {sample_fraction} must be above 0 and at most 1")
    output = Path(output)
    loaded = load_tokenizer(tokenizer)
    source = open_sources(sources, text_column, where)
    request = DataRequest(
        format_version=FORMAT_VERSION,
        tokenizer=tokenizer_fingerprint(loaded),
        separator=separator,
        begin=[loaded.bos_token_id] if separator != "eos" else [],
        end=[loaded.eos_token_id] if separator != "bos" else [],
        token_bytes=2 if len(loaded) <= 1 << 16 else 4,
        validation_fraction=validation_fraction,
        sample_fraction=sample_fraction,
        text_column=text_column,
        source=source.record,
        where=where,
    )
    if None in (*request.begin, *request.end):
        raise InputError(f"{tokenizer} lacks the begin- or end-of-sequence token that --separator {separator} needs")
    return Preparation(source, loaded, output, request, _is_finished(output, request))


def _is_finished(output: Path, request: DataRequest) -> bool:
    """Whether the output holds this data set. Raises if it holds another one or other files."""
    work = output / "work"
    finished, begun = output / METADATA_FILE, work / "request.json"
    own_files = {work, work / "lock", work / ".request.json.tmp"}
    if finished.is_file():
        found = read_json(finished).get("request", {})
    elif begun.is_file():
        found = read_json(begun)
    elif output.exists() and not (output.is_dir() and all(path in own_files for path in output.rglob("*"))):
        raise InputError(f"--output {output} is not empty and not a data set. Choose another folder")
    else:
        return False
    wanted = request.to_json()
    changed = sorted(key for key in {*wanted, *found} if not found or found.get(key) != wanted.get(key))
    if changed == ["source"] and not finished.is_file() and _files_of(found["source"]) == _files_of(request.source):
        return False  # a file was repaired; its task runs again
    if changed:
        raise InputError(
            f"--output {output} holds data of another request (different: {', '.join(changed)}). Choose another "
            "folder, or delete this one"
        )
    return finished.is_file()


def _files_of(source: dict[str, Any]) -> tuple[str, Any]:
    """What assigns numbers to tasks: the names of the input files in order, or the whole record of other sources."""
    return source["kind"], [file["name"] for file in source["files"]] if "files" in source else source


def _results(preparation: Preparation) -> tuple[dict[str, list[Shard]], dict[str, int]]:
    """The shards of each split, and the numbers of rows (of text files: documents) read, kept by `where`, and empty.

    Raises:
        InputError: if the files of a task are missing.
    """
    shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    rows = {"read": 0, "kept": 0, "empty": 0}
    for rank in range(preparation.source.num_tasks):
        result = read_task_result(preparation.output, preparation.source, rank, preparation.request.token_bytes)
        if result is None:
            raise InputError(f"{preparation.output}: the files of task {rank} are missing. Run the same command again")
        for split, shard in result[0].items():
            shards[split].append(shard)
        for name in rows:
            rows[name] += result[1][name]
    return shards, rows


def _nothing_to_train_on(preparation: Preparation, rows: dict[str, int]) -> str:
    request = preparation.request
    selected = f"--where {request.where!r} kept {rows['kept']:,} of {rows['read']:,} rows; " if request.where else ""
    empty = f"{rows['empty']:,} of {rows['kept']:,} documents are empty; " if rows["empty"] else ""
    return (
        f"{', '.join(preparation.source.files[:5])}: no text to train on; {selected}{empty}a share of "
        f"{request.validation_fraction} is held out, and {request.sample_fraction} of the rest is kept"
    )


def _describe(preparation: Preparation, shards: dict[str, list[Shard]], rows: dict[str, int]) -> dict[str, Any]:
    splits = {}
    for split, parts in shards.items():
        totals = {key: sum(getattr(shard, key) for shard in parts) for key in ("documents", "tokens", "bytes")}
        splits[split] = {**totals, "shards": [asdict(shard) for shard in parts]}
    tokenizer, request = preparation.tokenizer, preparation.request
    return {
        "format_version": FORMAT_VERSION,
        "fingerprint": provenance.fingerprint([request.tokenizer, request.separator, splits]),
        "token_dtype": f"<u{request.token_bytes}",
        "tokenizer": {
            "fingerprint": request.tokenizer,
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        "separator": request.separator,
        "rows": rows,
        "splits": splits,
        "request": request.to_json(),
        "provenance": provenance.collect(),
    }
