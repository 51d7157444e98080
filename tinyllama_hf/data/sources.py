"""Where documents come from: files of JSON lines, text files, or the embedded corpus."""

import gzip
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from . import embedded


JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
TEXT = (".txt", ".md", ".rst", ".py")
_EMBEDDED_TASKS = 2  # each task walks the whole standard library to find its share


class Source(NamedTuple):
    """Checked sources of one kind.

    `kind` is `"json lines"`, `"text"` or `"embedded"`; `files` are paths, or the name of the embedded part; `record`
    identifies the contents; `num_tasks` is in how many parts they are read.
    """

    kind: str
    files: tuple[str, ...]
    text_column: str
    record: dict[str, Any]
    num_tasks: int


def open_sources(sources: Sequence[str], text_column: str = "text") -> Source:
    """Finds and checks what `sources` name.

    Raises:
        InputError: if something does not exist, is of no known kind, or the kinds differ.
    """
    if not sources:
        raise InputError("no source given: name files, folders, embedded:prose or embedded:code")
    if any(source.startswith("embedded:") for source in sources):
        return _embedded(sources, text_column)
    files = [file for source in sources for file in _files(source)]
    kinds = {"json lines" if file.name.endswith(JSON_LINES) else "text" for file in files}
    if len(kinds) > 1:
        raise InputError(f"{', '.join(sources)}: JSON lines and text files mixed; prepare them as two data sets")
    kind = kinds.pop()
    if kind == "json lines":
        for file in files:
            _check_first_row(file, text_column)
    record = {"kind": kind, "files": [{"name": file.name, "sha256": _sha256(file)} for file in files]}
    return Source(kind, tuple(str(file.resolve()) for file in files), text_column, record, len(files))


def read_texts(source: Source) -> Iterator[str]:
    """Yields the text of every document, in order, without a pipeline: for training and checking tokenizers."""
    for file in source.files:
        if source.kind == "embedded":
            yield from (document.text for document in embedded.documents(file))
        elif source.kind == "text":
            yield read_text(file)
        else:
            with _open_lines(Path(file)) as lines:
                for line in lines:
                    if line.strip():
                        yield json.loads(line)[source.text_column]


def read_text(file: str) -> str:
    """Reads a text file as UTF-8, line ends as they are.

    Raises:
        InputError: if it is not UTF-8.
    """
    try:
        return Path(file).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 ({error.reason} at byte {error.start}); convert it first") from error


def _embedded(sources: Sequence[str], text_column: str) -> Source:
    names = [source.removeprefix("embedded:") for source in sources]
    if not all(source.startswith("embedded:") for source in sources):
        raise InputError(f"{', '.join(sources)}: the embedded corpus and files mixed; prepare them as two data sets")
    for name in names:
        if name not in embedded.KINDS:
            raise InputError(
                f"embedded:{name} does not exist; valid: {', '.join(f'embedded:{k}' for k in embedded.KINDS)}"
            )
    record = {"kind": "embedded", "names": names, "python": sys.version.split()[0]}
    return Source("embedded", tuple(names), text_column, record, _EMBEDDED_TASKS)


def _files(source: str) -> list[Path]:
    path = Path(source)
    if not path.exists():
        raise InputError(f"source {source}: no such file or folder")
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(JSON_LINES + TEXT))
        if not found:
            raise InputError(f"source {source}: holds none of {', '.join(JSON_LINES + TEXT)}")
        return found
    if not path.name.endswith(JSON_LINES + TEXT):
        raise InputError(f"source {source}: of no known kind; known: {', '.join(JSON_LINES + TEXT)}")
    return [path]


def _open_lines(file: Path):
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8")
    if file.suffix == ".zst":
        import fsspec

        return fsspec.open(str(file), "rt", compression="zstd", encoding="utf-8").open()
    return file.open(encoding="utf-8")


def _check_first_row(file: Path, text_column: str) -> None:
    try:
        with _open_lines(file) as lines:
            row = json.loads(next(iter(lines), "null"))
    except (json.JSONDecodeError, UnicodeDecodeError, OSError, EOFError) as error:
        raise InputError(f"{file}: its first line is no JSON: {error}") from error
    if row is None:
        raise InputError(f"{file}: is empty")
    if not isinstance(row, dict) or not isinstance(row.get(text_column), str):
        columns = ", ".join(sorted(row)) if isinstance(row, dict) else "no columns"
        raise InputError(f"{file}: its first row has no text under {text_column!r}, but: {columns}; see --text-column")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
