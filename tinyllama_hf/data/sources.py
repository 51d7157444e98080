"""Where documents come from: files of JSON lines, text files, or the embedded corpus."""

import gzip
import itertools
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError, require
from ..provenance import file_sha256
from . import embedded


JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
TEXT = (".txt", ".md", ".rst", ".py")
_EMBEDDED_TASKS = 2  # each task walks the whole standard library to find its share


class SourceDocument(NamedTuple):
    """A document and where it stands, for messages."""

    name: str
    text: str


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
        for file in files:  # a wrong column or format is found now, not after hours
            if next(_read_json_lines(file, text_column), None) is None:
                raise InputError(f"{file}: holds no row; remove it, or fetch it again")
    record = {"kind": kind, "files": [{"name": file.name, "sha256": file_sha256(file)} for file in files]}
    return Source(kind, tuple(str(file.resolve()) for file in files), text_column, record, len(files))


def read_documents(source: Source, task: int = 0, num_tasks: int = 1) -> Iterator[SourceDocument]:
    """Yields the documents of a task, in order: every `num_tasks`-th file, or document of the embedded corpus.

    Raises:
        InputError: at a file that is damaged, a row that is no JSON object with a text, and text that is not UTF-8.
    """
    if source.kind == "embedded":
        named = ((kind, document) for kind in source.files for document in embedded.documents(kind))
        for kind, document in itertools.islice(named, task, None, num_tasks):
            yield SourceDocument(f"{kind}/{document.name}", document.text)
        return
    read = _read_text if source.kind == "text" else _read_json_lines
    for file in source.files[task::num_tasks]:
        yield from read(Path(file), source.text_column)


def read_texts(source: Source) -> Iterator[str]:
    """Yields the text of every document, in order: for training and checking tokenizers."""
    return (document.text for document in read_documents(source))


def _read_text(file: Path, text_column: str) -> Iterator[SourceDocument]:
    try:
        # Bytes, so that line ends stay as they are.
        yield SourceDocument(str(file), file.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 ({error.reason} at byte {error.start}); convert it first") from error


def _read_json_lines(file: Path, text_column: str) -> Iterator[SourceDocument]:
    for number, row in read_rows(file):
        yield SourceDocument(f"{file}/{number}", _text_of(row, f"{file}, row {number}", text_column))


def read_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """Yields (number of the line, value) of the rows of a JSON lines file.

    Raises:
        InputError: at a file that is damaged, and a row that is no JSON.
    """
    number = 0
    damage = (UnicodeDecodeError, OSError, EOFError, zlib.error)
    if file.suffix == ".zst":
        damage += (zstd_library().ZstdError,)
    try:
        with _open_lines(file) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{file}, row {number}: no JSON ({error}); repair or remove it") from error
    except damage as error:
        raise InputError(f"{file}: damaged after row {number} ({error}); fetch it again") from error


def _text_of(row: Any, where: str, text_column: str) -> str:
    if not isinstance(row, dict) or text_column not in row:
        columns = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
        raise InputError(f"{where}: no text under {text_column!r}, but: {columns}; see --text-column")
    if not isinstance(row[text_column], str):
        raise InputError(
            f"{where}: {text_column!r} is {json.dumps(row[text_column])[:40]}, no string; repair or drop the row"
        )
    text = row[text_column]
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise InputError(f"{where}: {error.reason} at character {error.start}; repair or drop the row") from error
    return text


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
        return zstd_library().open(file, "rt", encoding="utf-8")
    return file.open(encoding="utf-8")


def zstd_library():
    """Python 3.14's module or its backport. The package zstandard (0.25) reads a truncated file without a word."""
    try:
        from compression import zstd
    except ImportError:
        require("backports.zstd", "data", "reading .zst files")
        from backports import zstd
    return zstd
