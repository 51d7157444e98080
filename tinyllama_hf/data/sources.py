"""Sources of documents: JSON lines, Parquet, text files, data sets of the Hub, and the embedded corpus."""

import fnmatch
import hashlib
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError, one_line
from ..provenance import file_sha256
from ..text import check_text, read_text
from .embedded import SourceDocument, check_kind, documents
from .expressions import Expression, MissingColumn, value_at
from .row_files import JSON_LINES, PARQUET, read_rows


TEXT = (".txt", ".md", ".rst", ".py")
ROWS = JSON_LINES + PARQUET
_EMBEDDED_TASKS = 2  # each task reads the whole standard library to find its share
# Larger sources are identified by sizes and samples: hashing terabytes would take a day.
_HASHED_WHOLE_BYTES = 4 * 2**30
_SAMPLES, _SAMPLE_BYTES = 16, 2**16
_HUB_SOURCE = re.compile(r"hub:(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<pattern>.+))?")


class Source(NamedTuple):
    """Validated sources of one kind.

    Attributes:
        kind (`str`): `"json lines"`, `"parquet"`, `"text"` or `"embedded"`.
        files (`tuple[str, ...]`): paths, or the names of the embedded parts.
        text_column (`str`): column of rows with the text, as a dotted path.
        where (`str`, *optional*): expression that selects rows.
        record (`dict`): identifies the contents.
        num_tasks (`int`): number of tasks that read the sources in parallel.
        stamps (`tuple`): size and modification time of the files when `record` was made.
    """

    kind: str
    files: tuple[str, ...]
    text_column: str
    where: str | None
    record: dict[str, Any]
    num_tasks: int
    stamps: tuple[tuple[int, int], ...] = ()

    def identity(self, task: int) -> dict[str, Any]:
        """What identifies the input of a task: the record of its file, or of the whole source if tasks are not
        files."""
        return self.record["files"][task] if "files" in self.record else self.record


def open_sources(sources: Sequence[str], text_column: str = "text", where: str | None = None) -> Source:
    """Finds and validates sources. Data sets of the Hub are downloaded first.

    Args:
        sources (`Sequence[str]`): as for [`prepare`].
        text_column (`str`, *optional*, defaults to `"text"`): column of rows with the text, as a dotted path.
        where (`str`, *optional*): expression that selects rows.

    Raises:
        InputError: if a source does not exist or has an unknown kind, kinds are mixed, or the first row of a file
            lacks the text column or a path of `where`.
    """
    if not sources:
        raise InputError("No source was given. Give files, folders, hub:OWNER/NAME, embedded:prose or embedded:code")
    chosen = Expression(where) if where is not None else None
    if any(source.startswith("embedded:") for source in sources):
        if chosen:
            raise InputError(f"--where {where!r}: the embedded corpus has no columns to select rows by. Leave it out")
        return _embedded(sources, text_column)
    found = [_hub_files(source) if source.startswith("hub:") else (_files(source), None) for source in sources]
    files = [file for part, _ in found for file in part]
    stamps = tuple(_stamp(file) for file in files)
    _check_distinct([str(file.absolute()) for file in files])
    kinds = {_kind(file) for file in files}
    if len(kinds) > 1:
        raise InputError(
            f"{', '.join(sources)}: {' and '.join(sorted(kinds))} files are mixed. Prepare them as separate data sets"
        )
    kind = kinds.pop()
    if kind == "text" and chosen:
        raise InputError(f"--where {where!r}: text files have no columns to select rows by. Leave it out")
    if kind != "text":
        for file in files:  # find a wrong column or format now, not after hours
            number, row = next(read_rows(file), (0, None))
            if not number:
                raise InputError(f"{file} contains no rows. Remove it, or download it again")
            _text_of(row, f"{file}, row {number}", text_column)
            _is_chosen(row, f"{file}, row {number}", chosen)
    try:
        record: dict[str, Any] = {"kind": kind, "files": _identify(files)}
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}). Check its permissions") from error
    if hubs := [hub for _, hub in found if hub]:
        record["hub"] = hubs
    return Source(kind, tuple(str(file.absolute()) for file in files), text_column, where, record, len(files), stamps)


def read_documents(
    source: Source, task: int = 0, num_tasks: int = 1, counts: Counter | None = None
) -> Iterator[SourceDocument]:
    """Yields the documents of a task in order: every `num_tasks`-th file, or every `num_tasks`-th embedded document.

    Args:
        source (`Source`): from [`open_sources`].
        task (`int`, *optional*, defaults to 0): number of the task.
        num_tasks (`int`, *optional*, defaults to 1): number of tasks.
        counts (`Counter`, *optional*): incremented: `read` rows or documents, and those `kept` by `where`.

    Raises:
        InputError: if a file is damaged or not UTF-8, a row is not a JSON object with a text, or a file was changed
            since `open_sources`.
    """
    counts = Counter() if counts is None else counts
    if source.kind == "embedded":
        named = ((kind, document) for kind in source.files for document in documents(kind))
        for kind, document in itertools.islice(named, task, None, num_tasks):
            counts.update(("read", "kept"))
            yield SourceDocument(f"{kind}/{document.name}", document.text)
        return
    where = Expression(source.where) if source.where is not None else None
    for number in range(task, len(source.files), num_tasks):
        file = Path(source.files[number])
        if source.kind == "text":
            counts.update(("read", "kept"))
            yield SourceDocument(str(file), read_text(file, newline=""))
        else:
            for number_of_row, row in read_rows(file):
                place = f"{file}, row {number_of_row}"
                counts["read"] += 1
                if _is_chosen(row, place, where):
                    counts["kept"] += 1
                    yield SourceDocument(f"{file}/{number_of_row}", _text_of(row, place, source.text_column))
        if _stamp(file) != source.stamps[number]:  # `record` does not identify what was read
            raise InputError(f"{file} was changed while this command was running. Run the command again")


def read_texts(source: Source) -> Iterator[str]:
    """Yields the texts of all documents in order, to train or verify a tokenizer."""
    return (document.text for document in read_documents(source))


def _check_distinct(names: Sequence[str]) -> None:
    if repeated := [name for name, number in Counter(names).items() if number > 1]:
        raise InputError(f"{repeated[0]} is named twice and would be read twice. Name it once")


def _kind(file: Path) -> str:
    if file.name.endswith(JSON_LINES):
        return "json lines"
    return "parquet" if file.name.endswith(PARQUET) else "text"


def _is_chosen(row: Any, place: str, where: Expression | None) -> bool:
    if where is None:
        return True
    try:
        return where(row)
    except MissingColumn as error:
        raise InputError(f"{place}: {error.args[0]}. Check --where {where.text!r}") from error
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def _text_of(row: Any, place: str, text_column: str) -> str:
    try:
        text = value_at(row, text_column)
    except MissingColumn as error:
        raise InputError(f"{place}: no text: {error.args[0]}. Check --text-column") from error
    if not isinstance(text, str):
        shown = json.dumps(text, default=str)[:40]
        raise InputError(f"{place}: {text_column!r} is {shown}, not a string. Fix or remove the row")
    check_text(text, f"{place}, {text_column!r}")
    return text


def _stamp(file: Path) -> tuple[int, int]:
    try:
        stat = file.stat()
    except FileNotFoundError:
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


def _identify(files: Sequence[Path]) -> list[dict[str, Any]]:
    """What identifies the files: SHA-256 of their contents or, if they are very large, their sizes and SHA-256 of
    samples."""
    if sum(file.stat().st_size for file in files) <= _HASHED_WHOLE_BYTES:
        return [{"name": file.name, "sha256": file_sha256(file)} for file in files]
    return [
        {"name": file.name, "bytes": file.stat().st_size, "sampled_sha256": _sampled_sha256(file)} for file in files
    ]


def _sampled_sha256(file: Path) -> str:
    size, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as stream:
        for number in range(_SAMPLES):
            stream.seek(max(size - _SAMPLE_BYTES, 0) * number // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _embedded(sources: Sequence[str], text_column: str) -> Source:
    if not all(source.startswith("embedded:") for source in sources):
        raise InputError(
            f"{', '.join(sources)}: the embedded corpus and files are mixed. Prepare them as separate data sets"
        )
    names = [source.removeprefix("embedded:") for source in sources]
    for name in names:
        check_kind(name)
    _check_distinct(sources)
    record = {"kind": "embedded", "names": names, "python": sys.version.split()[0]}
    return Source("embedded", tuple(names), text_column, None, record, _EMBEDDED_TASKS)


def _files(source: str) -> list[Path]:
    path = Path(source)
    if not path.exists():
        raise InputError(f"source {source} does not exist")
    inside = path.rglob("*") if path.is_dir() else [path]
    found = sorted(file for file in inside if file.is_file() and file.name.endswith(ROWS + TEXT))
    if not found:
        raise InputError(f"source {source}: no file of type {', '.join(ROWS + TEXT)}")
    return found


def _hub_files(source: str) -> tuple[list[Path], dict[str, str]]:
    """The files of `hub:OWNER/NAME[@REVISION][/PATTERN]` in the Hub cache, and their repository and commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    match = _HUB_SOURCE.fullmatch(source)
    if not match:
        raise InputError(
            f"source {source}: the form is hub:OWNER/NAME, hub:OWNER/NAME@REVISION or hub:OWNER/NAME/PATTERN"
        )
    repo, revision, pattern = match["repo"], match["revision"], match["pattern"]
    wanted = [pattern] if pattern else [f"*{ending}" for ending in ROWS]
    try:
        folder = Path(snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=wanted))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise InputError(
            f"source {source} cannot be downloaded ({one_line(error)}). Check name, access and network"
        ) from error
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name.endswith(ROWS))
    files = [path for path in files if any(fnmatch.fnmatch(path.relative_to(folder).as_posix(), w) for w in wanted)]
    if not files:
        raise InputError(f"source {source}: no file matches {', '.join(wanted)} and is of type {', '.join(ROWS)}")
    return files, {"repo": repo, "revision": folder.name}  # the name of a snapshot folder is its commit
