"""Preparing a corpus: documents in, token shards out, through a datatrove pipeline.

A finished folder holds

    dataset.json                  what it is: tokenizer, separators, counts, fingerprint, provenance
    tokenizer/                    the tokenizer it was made with
    train/00000.tokens            little-endian uint16 (uint32 above 65536 ids), documents one after the other
    train/00000.tokens.index      uint64 end of each document, in tokens of that file
    validation/...                the same, of the documents held out
    validation/00000.jsonl.gz     and their text

`dataset.json` is written last: without it the preparation was interrupted, and the same call goes on with the tasks
that are not complete. A task is complete for the input file that it read; a file that was mended since is read again.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from .. import provenance
from ..errors import InputError, did_you_mean, require
from ..files import locked, read_json, write_json
from ..tokenization_tinyllama import load_tokenizer, tokenizer_fingerprint
from .shards import FORMAT_VERSION, METADATA_FILE, SPLITS
from .sources import Source, open_sources
from .tasks import keep_complete, task_result


SEPARATORS = ("both", "bos", "eos")


class PreparedData(NamedTuple):
    """What `prepare` made: its metadata, and whether it was there already."""

    metadata: dict[str, Any]
    was_finished: bool


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
) -> PreparedData:
    """Tokenises documents into shards, apart from a share that is held out.

    A document goes to the validation split if the hash of its text says so: the split depends on nothing else, and
    equal documents are always on the same side.

    Args:
        sources (`Sequence[str]`): `embedded:prose` or `embedded:code`; or files and folders of `.jsonl`, `.jsonl.gz`,
            `.jsonl.zst`; of `.parquet`; or of `.txt`, `.md`, `.rst`, `.py`, one document a file; or data sets of the Hub,
            `hub:OWNER/NAME[@REVISION][/PATTERN]`, which are fetched first. One kind per call.
        tokenizer (`str` or `os.PathLike`): anything that [`load_tokenizer`] takes.
        output (`str` or `os.PathLike`): folder to write.
        separator (`str`): `"both"` puts begin- and end-of-sequence around each document, `"bos"` and `"eos"` one.
        validation_fraction (`float`): expected share of the documents held out.
        sample_fraction (`float`): expected share of the other documents that is kept for training, by hash as well.
        text_column (`str`): of rows, as a dotted path.
        where (`str`, *optional*): expression that chooses rows, see [`data.expressions`].
        workers (`int`, *optional*, defaults to the number of cores): processes.

    Raises:
        InputError: for sources that do not exist or cannot be read, an output that holds something else, and values
            out of range; before anything is written where it can be known by then. For a disk that is full. What is
            complete by then stays, and the same call goes on.
    """
    request = plan(sources, tokenizer, output, separator, validation_fraction, sample_fraction, text_column, where)
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers}: must be at least 1")
    if request.is_finished:
        return PreparedData(read_json(request.output / METADATA_FILE), True)
    with locked(request.output / "work" / "lock", f"--output {request.output}"):
        if _is_finished(request.output, request.record):  # by another process, since
            return PreparedData(read_json(request.output / METADATA_FILE), True)
        metadata = _run(request, workers or os.cpu_count() or 1, progress)
    shutil.rmtree(request.output / "work", ignore_errors=True)
    return PreparedData(metadata, False)


def _run(request: "Plan", workers: int, progress: bool) -> dict[str, Any]:
    from .pipeline import run_pipeline

    try:
        with writing(request.output):
            begin(request)
            run_pipeline(request.source, request.output, request.record, workers, progress)
    except InputError as error:
        if done := len(keep_complete(request.output, request.source, request.record["token_bytes"])):
            raise InputError(
                f"{error}\n{done} of {request.source.num_tasks} files are done and stay in {request.output}; the same "
                "command goes on with the others"
            ) from error
        shutil.rmtree(request.output, ignore_errors=True)
        raise
    shards, rows = _results(request)
    if not any(shard["tokens"] for shard in shards["train"]):
        shutil.rmtree(request.output, ignore_errors=True)  # other settings are another request
        raise InputError(_nothing_to_train_on(request, rows))
    with writing(request.output):
        metadata = _describe(request, shards, rows)
        write_json(request.output / METADATA_FILE, metadata)
    return metadata


@contextlib.contextmanager
def writing(output: Path) -> Iterator[None]:
    """Turns what a failed write raises, as on a full disk, into an [`InputError`]."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"--output {output}: cannot be written ({error.strerror or error}); make room, or mend what the reason names, "
            "and give the same command again"
        ) from error


def begin(request: "Plan") -> None:
    """Writes what the tasks need: the request, by which a later call knows the folder again, and the tokenizer.

    Tasks whose input has changed since they were complete are to be done again.
    """
    work = request.output / "work"
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / "request.json", request.record)
    try:
        # Saved anew each time: exact, and small next to the data.
        request.tokenizer.save_pretrained(request.output / "tokenizer")
    except Exception as error:  # tokenizers (0.23) knows no better class
        if "os error" in str(error):
            raise OSError(str(error)) from error
        raise
    keep_complete(request.output, request.source, request.record["token_bytes"])


class Plan(NamedTuple):
    """A checked request: what would be read, with what, and whether it was done before."""

    source: Source
    tokenizer: PreTrainedTokenizerFast
    output: Path
    record: dict[str, Any]
    is_finished: bool


def plan(
    sources: Sequence[str],
    tokenizer: str | os.PathLike,
    output: str | os.PathLike,
    separator: str = "both",
    validation_fraction: float = 0.005,
    sample_fraction: float = 1.0,
    text_column: str = "text",
    where: str | None = None,
) -> Plan:
    """Checks a request without writing anything; arguments and errors as for [`prepare`]."""
    if separator not in SEPARATORS:
        raise InputError(f"--separator {separator!r}{did_you_mean(separator, SEPARATORS)}")
    require("datatrove", "data", "preparing data")
    if not 0 <= validation_fraction < 1:
        raise InputError(f"--validation-fraction {validation_fraction}: must be at least 0 and below 1")
    if not 0 < sample_fraction <= 1:
        raise InputError(f"--sample-fraction {sample_fraction}: must lie above 0 and up to 1")
    output = Path(output)
    loaded = load_tokenizer(tokenizer)
    source = open_sources(sources, text_column, where)
    record = {
        "format_version": FORMAT_VERSION,
        "tokenizer": tokenizer_fingerprint(loaded),
        "separator": separator,
        "begin": [loaded.bos_token_id] if separator != "eos" else [],
        "end": [loaded.eos_token_id] if separator != "bos" else [],
        "token_bytes": 2 if len(loaded) <= 1 << 16 else 4,
        "validation_fraction": validation_fraction,
        "sample_fraction": sample_fraction,
        "text_column": text_column,
        "source": source.record,
        **({} if where is None else {"where": where}),
    }
    if None in (*record["begin"], *record["end"]):
        raise InputError(f"{tokenizer}: has no begin- or end-of-sequence token for --separator {separator}")
    return Plan(source, loaded, output, record, _is_finished(output, record))


def _is_finished(output: Path, record: dict[str, Any]) -> bool:
    """Whether the output holds this very data set; raises if it holds another, or something else."""
    work = output / "work"
    finished, begun = output / METADATA_FILE, work / "request.json"
    of_nothing_yet = {work, work / "lock", work / ".request.json.tmp"}
    if finished.is_file():
        found = read_json(finished).get("request")
    elif begun.is_file():
        found = read_json(begun)
    elif output.exists() and not (output.is_dir() and all(path in of_nothing_yet for path in output.rglob("*"))):
        raise InputError(f"--output {output}: is not empty and no data set; choose another folder")
    else:
        return False
    changed = sorted(key for key in {*record, *(found or ())} if not found or found.get(key) != record.get(key))
    if changed == ["source"] and not finished.is_file() and _files_of(found) == _files_of(record):
        return False  # a file was mended: its task is done again
    if changed:
        raise InputError(
            f"--output {output}: holds data prepared from another request (different: {', '.join(changed)}); choose "
            "another folder, or remove this one"
        )
    return finished.is_file()


def _files_of(record: dict[str, Any]) -> tuple:
    """What numbers the tasks: the names of the input files, in order; all that is known of other sources."""
    source = record["source"]
    return source["kind"], [file["name"] for file in source["files"]] if "files" in source else source


def _results(request: Plan) -> tuple[dict[str, list[dict[str, Any]]], dict[str, int]]:
    """The shards of each split, and how many rows (documents, of text files) were read, kept by `where`, and empty.

    Raises:
        InputError: if a task is not complete after all.
    """
    shards, rows = {split: [] for split in SPLITS}, {"read": 0, "kept": 0, "empty": 0}
    for rank in range(request.source.num_tasks):
        result = task_result(request.output, request.source, rank, request.record["token_bytes"])
        if result is None:
            raise InputError(
                f"{request.output}: what task {rank} wrote is not there any more; give the same command again"
            )
        for split in SPLITS:
            shard = {key: result[split][key] for key in ("file", "sha256", "documents", "tokens", "bytes")}
            shards[split].append(shard)
        for name in rows:
            rows[name] += result["rows"][name]
    return shards, rows


def _nothing_to_train_on(request: Plan, rows: dict[str, int]) -> str:
    where = request.record.get("where")
    chosen = f"of {rows['read']:,} rows --where {where!r} kept {rows['kept']:,}; " if where else ""
    empty = f"{rows['empty']:,} of {rows['kept']:,} documents are empty; " if rows["empty"] else ""
    return (
        f"{', '.join(request.source.files[:5])}: no text to train on; {chosen}{empty}of all documents, "
        f"{request.record['validation_fraction']} are held out and {request.record['sample_fraction']} of the rest kept"
    )


def _describe(request: Plan, shards: dict[str, list[dict[str, Any]]], rows: dict[str, int]) -> dict[str, Any]:
    splits = {}
    for split, parts in shards.items():
        totals = {key: sum(shard[key] for shard in parts) for key in ("documents", "tokens", "bytes")}
        splits[split] = {**totals, "shards": parts}
    tokenizer = request.tokenizer
    return {
        "format_version": FORMAT_VERSION,
        "fingerprint": provenance.fingerprint([request.record["tokenizer"], request.record["separator"], splits]),
        "token_dtype": f"<u{request.record['token_bytes']}",
        "tokenizer": {
            "fingerprint": request.record["tokenizer"],
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        "separator": request.record["separator"],
        "rows": rows,
        "splits": splits,
        "request": request.record,
        "provenance": provenance.collect(),
    }
