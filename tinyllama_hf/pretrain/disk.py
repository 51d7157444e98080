"""Writes that fail, as a rule because the disk is full, and sizes as one would say them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from ..errors import one_line


class FullDiskError(RuntimeError):
    """Something of a run could not be written, as a rule because the disk is full; the checkpoints before it are whole."""

    def __init__(self, path: Path, reason: str):
        super().__init__(
            f"{path}: could not be written ({reason}); the checkpoints before it are whole. On a full disk make room, or "
            "lower checkpoints.keep; then give the same command again"
        )


@contextlib.contextmanager
def full_disk_says(path: Path) -> Iterator[None]:
    """Turns what a failed write raises into a [`FullDiskError`]."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise FullDiskError(path, one_line(error)) from error


def size_in_words(num_bytes: float) -> str:
    """`13.2 GB`, and below one GB `45 MB`."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.0f} MB"
