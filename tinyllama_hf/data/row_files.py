"""Reads the rows of JSON lines and Parquet files in bounded memory."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from ..errors import InputError, require
from ..text import ENCODING


JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET = (".parquet",)
_PARQUET_ROWS = 1024  # per batch


def read_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """Yields (number, value) of the rows of a file, numbered from 1 (JSON lines by line).

    Raises:
        InputError: if the file is damaged, or a row is not valid JSON.
    """
    return _read_parquet(file) if file.name.endswith(PARQUET) else _read_json_lines(file)


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
