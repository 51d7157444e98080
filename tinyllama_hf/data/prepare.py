"""Preparing a corpus: documents in, token shards out, through a datatrove pipeline.

A finished folder holds

    dataset.json                  what it is: tokenizer, separators, counts, fingerprint, provenance
    tokenizer/                    the tokenizer it was made with
    train/00000.tokens            little-endian uint16 (uint32 above 65536 ids), documents one after the other
    train/00000.tokens.index      uint64 end of each document, in tokens of that file
    validation/...                the same, of the documents held out
    validation/00000.jsonl.gz     and their text

`dataset.json` is written last: without it the preparation was interrupted, and the same call goes on with the tasks
that are not complete.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from .. import provenance
from ..errors import InputError, did_you_mean, require
from ..tokenization_tinyllama import load_tokenizer, tokenizer_fingerprint
from .shards import FORMAT_VERSION, METADATA_FILE
from .sources import Source, open_sources


SEPARATORS = ("both", "bos", "eos")
SPLITS = ("train", "validation")


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
            out of range; before anything is written where it can be known by then.
    """
    request = plan(sources, tokenizer, output, separator, validation_fraction, sample_fraction, text_column, where)
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers}: must be at least 1")
    if request.is_finished:
        return PreparedData(provenance.read_json(request.output / METADATA_FILE), True)
    from .pipeline import run_pipeline

    begin(request)
    try:
        run_pipeline(request.source, request.output, request.record, workers or os.cpu_count() or 1, progress)
        metadata = _describe(request)
    except InputError:
        shutil.rmtree(request.output)  # what a bad source left could never be finished: mended, it is another source
        raise
    provenance.write_json(request.output / METADATA_FILE, metadata)
    shutil.rmtree(request.output / "work")
    return PreparedData(metadata, False)


def begin(request: "Plan") -> None:
    """Writes what the tasks need: the request, by which a later call knows the folder again, and the tokenizer."""
    work = request.output / "work"
    work.mkdir(parents=True, exist_ok=True)
    provenance.write_json(work / "request.json", request.record)
    # Saved anew each time: exact, and small next to the data.
    request.tokenizer.save_pretrained(request.output / "tokenizer")


class Plan(NamedTuple):
    """A checked request: what would be read, with what, and whether it was done before."""

    source: Source
    tokenizer: PreTrainedTokenizerFast
    output: Path
    record: dict[str, Any]
    is_finished: bool


def plan(sources, tokenizer, output, separator, validation_fraction, sample_fraction, text_column, where=None) -> Plan:
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
    finished, begun = output / METADATA_FILE, output / "work" / "request.json"
    if finished.is_file():
        found = provenance.read_json(finished).get("request")
    elif begun.is_file():
        found = provenance.read_json(begun)
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output {output}: is not empty and no data set; choose another folder")
    else:
        return False
    if found != record:
        changed = sorted(key for key in record if not found or found.get(key) != record[key])
        raise InputError(
            f"--output {output}: holds data prepared from another request (different: {', '.join(changed)}); choose "
            "another folder, or remove this one"
        )
    return finished.is_file()


def _rows(request: Plan) -> dict[str, int]:
    """Rows (documents, of text files) that were read, and those that `where` kept, empty ones included."""
    counted = [provenance.read_json(file) for file in sorted((request.output / "work").glob("rows_*.json"))]
    return {name: sum(counts[name] for counts in counted) for name in ("read", "kept")}


def _describe(request: Plan) -> dict[str, Any]:
    splits = {}
    for split in SPLITS:
        shards = []
        for counts_file in sorted((request.output / "work").glob("counts_*.json")):
            counts = provenance.read_json(counts_file)
            name = f"{split}/{counts['rank']:05d}.tokens"
            shards.append({"file": name, "sha256": provenance.file_sha256(request.output / name), **counts[split]})
        totals = {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens", "bytes")}
        splits[split] = {**totals, "shards": shards}
    if splits["train"]["tokens"] == 0:
        rows, where = _rows(request), request.record.get("where")
        chosen = f"of {rows['read']:,} rows --where {where!r} kept {rows['kept']:,}; " if where else ""
        raise InputError(
            f"{', '.join(request.source.files[:5])}: no text to train on; {chosen}of all documents, "
            f"{request.record['validation_fraction']} are held out and {request.record['sample_fraction']} of the rest kept"
        )
    tokenizer, rows = request.tokenizer, _rows(request)
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
