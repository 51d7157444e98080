"""Reads the rows of JSON lines, Parquet and CSV files in bounded memory, and those of a JSON array."""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from ..errors import InputError, require
from ..text import ENCODING, read_text


JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET = (".parquet",)
JSON, CSV = (".json",), (".csv",)
ROW_FILES = JSON_LINES + JSON + CSV + PARQUET
_PARQUET_ROWS = 1024  # per batch


def read_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """Yields (number, value) of the rows of a file, numbered from 1.

    JSON lines are numbered by line, the rows of a CSV file as in a spreadsheet, where the header is row 1. A `.json`
    file contains one array, or JSON lines.

    Raises:
        InputError: if the file is damaged, or a row is not valid JSON or CSV.
    """
    if file.name.endswith(PARQUET):
        return _read_parquet(file)
    if file.name.endswith(CSV):
        return _read_csv(file)
    return _read_json_array(file) if file.name.endswith(JSON) and _is_array(file) else _read_json_lines(file)


def _read_json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    damage: tuple[type[Exception], ...] = (UnicodeDecodeError, OSError, EOFError, zlib.error)
    if file.suffix == ".zst":
        damage += (zstd_library().ZstdError,)
    try:
        with _open_lines(file) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, json.loads(line)
    except damage as error:
        raise _unreadable(file, number, error) from error
    # Invalid syntax, numbers of more than 4300 digits, and nesting deeper than Python's stack.
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}, row {number}: not valid JSON ({error}). Fix or remove it") from error


def _is_array(file: Path) -> bool:
    try:
        with _open_lines(file) as lines:
            return next((line.lstrip() for line in lines if line.strip()), "").startswith("[")
    except (UnicodeDecodeError, OSError) as error:
        raise _unreadable(file, 0, error) from error


def _read_json_array(file: Path) -> Iterator[tuple[int, Any]]:
    text = read_text(file)
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not a valid JSON array ({error}). Fix it, or download it again") from error
    yield from enumerate(rows, start=1)


def _read_csv(file: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with file.open(encoding=ENCODING, newline="") as lines:
            rows = csv.reader(lines, strict=True)
            header = next(rows, [])
            if repeated := [name for name in header if header.count(name) > 1]:
                raise InputError(f"{file}: two columns have the name {repeated[0]!r}. Rename one")
            for number, row in enumerate(rows, start=2):
                if row and len(row) != len(header):
                    raise InputError(
                        f"{file}, row {number}: has {len(row)} cells, the header {len(header)}. Quote text that "
                        "contains commas"
                    )
                if row:
                    yield number, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise InputError(f"{file}: not valid CSV after row {max(number, 1)} ({error}). Fix it") from error
    except (UnicodeDecodeError, OSError) as error:
        raise _unreadable(file, number, error) from error


def _read_parquet(file: Path) -> Iterator[tuple[int, Any]]:
    require("pyarrow", "data", "reading Parquet files")
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise _unreadable(file, number, error) from error


def _unreadable(file: Path, number: int, error: Exception) -> InputError:
    if isinstance(error, OSError) and error.errno:  # a system error; libraries raise OSError without errno for damage
        return InputError(
            f"{file} cannot be read after row {number} ({error.strerror}). Check its permissions and the disk"
        )
    return InputError(f"{file}: damaged after row {number} ({error}). Download it again")


def _open_lines(file: Path) -> TextIO:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding=ENCODING)
    if file.suffix == ".zst":
        return zstd_library().open(file, "rt", encoding=ENCODING)
    return file.open(encoding=ENCODING)


def zstd_library() -> ModuleType:
    """The module of Python 3.14 or its backport. The package zstandard (0.25) reads truncated files without an
    error."""
    try:
        from compression import zstd
    except ImportError:
        require("backports.zstd", "data", "reading .zst files")
        from backports import zstd
    return zstd
