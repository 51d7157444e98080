"""The held-out documents of prepared data sets: all of them as a stream, or a fixed sample.

A sample consists of the documents with the lowest hashes of their text, up to a number of UTF-8 bytes; the last one is
truncated at a character boundary. So it is the same for every model and tokenizer, for any order of the documents and
any number of files. `prepare` holds out documents by the same hash: data sets from the same rows have the same sample
for every `--validation-fraction` that holds out more than the sample.
"""

import dataclasses
import functools
import gzip
import hashlib
import heapq
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from ...data.shards import METADATA_FILE, Shard, read_metadata
from ...errors import InputError, refuse_damage
from ...recipe import parse_count
from ..score_files import TextSource


DEFAULT_MAX_BYTES = 2_000_000
LARGEST_SAMPLE = 256_000_000  # bytes, since a sample is kept in memory


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The documents of a prepared data set to score.

    Attributes:
        source (`TextSource`): the data set, and how much of its held-out text this is.
        texts (`Iterable[str]`): the documents. Every iteration returns all of them.
    """

    source: TextSource
    texts: Iterable[str]


def parse_max_bytes(value: str) -> int | None:
    """Returns the number of bytes of `--max-bytes`; `None` for `all` and `0`.

    Raises:
        InputError: if it is not a number, or too large for a sample.
    """
    try:
        count = 0 if value == "all" else parse_count(value)
    except ValueError as error:
        raise InputError(f"--max-bytes {value!r}: {error}; or all") from error
    if count > LARGEST_SAMPLE:
        raise InputError(
            f"--max-bytes {value}: a sample is kept in memory and has at most {LARGEST_SAMPLE:,} bytes. Use less, or "
            "all, which is read as a stream"
        )
    return count or None


def held_out_source(folder: str | Path, max_bytes: int | None = None) -> TextSource:
    """Returns the held-out text of a data set without reading it.

    For a sample, only the maximum number of bytes is known before reading; `documents` counts all.

    Args:
        folder (`str` or `Path`): the prepared data set.
        max_bytes (`int`, *optional*): size of the sample; by default everything.

    Raises:
        InputError: if the folder is not a prepared data set or has no held-out documents.
    """
    folder = Path(folder)
    metadata = read_metadata(folder)
    shards = _held_out_shards(metadata)
    documents, num_bytes = (sum(getattr(shard, key) for shard in shards) for key in ("documents", "bytes"))
    if not num_bytes:
        raise InputError(f"{folder} has no held-out documents. Prepare it again with a larger --validation-fraction")
    source = TextSource(str(folder), metadata["fingerprint"], documents, num_bytes, documents, num_bytes)
    if max_bytes is None or max_bytes >= num_bytes:
        return source
    return dataclasses.replace(source, bytes=max_bytes, max_bytes=max_bytes)


def held_out_documents(folder: str | Path, max_bytes: int | None = None) -> HeldOut:
    """Returns the documents that `tinyllama-hf prepare` held out, or the sample of them.

    A sample is kept in memory until the process ends, since training scores on it at every milestone.

    Args:
        folder (`str` or `Path`): the prepared data set.
        max_bytes (`int`, *optional*): size of the sample; by default everything.

    Raises:
        InputError: as [`held_out_source`]; if a file is missing, or the sample is smaller than the first character.
            Damaged files are reported when they are read.
    """
    source = held_out_source(folder, max_bytes)
    if source.max_bytes is None:
        return HeldOut(source, _Documents(Path(folder)))
    texts = _sampled(Path(folder).resolve(), source.fingerprint, source.max_bytes)
    if not texts:
        raise InputError(f"--max-bytes {max_bytes}: not enough for the first character of {folder}. Use at least 4")
    size = sum(len(text.encode()) for text in texts)
    return HeldOut(dataclasses.replace(source, documents=len(texts), bytes=size), texts)


def choose_sample(texts: Iterable[str], max_bytes: int) -> tuple[str, ...]:
    """Returns the texts with the lowest hashes, in that order. Keeps `max_bytes` and one text in memory.

    Args:
        texts (`Iterable[str]`): all texts, in any order.
        max_bytes (`int`): UTF-8 bytes of the sample. The last text is truncated to fit, at a character boundary.
    """
    kept: list[tuple[int, bytes]] = []  # a heap, the highest hash first
    size = 0
    for text in texts:
        encoded = text.encode()
        heapq.heappush(kept, (-_hash(encoded), encoded))
        size += len(encoded)
        while size - len(kept[0][1]) >= max_bytes:
            size -= len(heapq.heappop(kept)[1])
    chosen = [encoded for _, encoded in sorted(kept, reverse=True)]
    if size > max_bytes:
        chosen[-1] = chosen[-1][: max_bytes - size].decode(errors="ignore").encode()
    return tuple(encoded.decode() for encoded in chosen if encoded)


class _Documents:
    """All held-out documents of a data set, read from its files in each iteration."""

    def __init__(self, folder: Path):
        self._folder, self._shards = folder, _held_out_shards(read_metadata(folder))
        for shard in self._shards:  # now, not after hours of scoring
            if not (file := _text_file(folder, shard)).is_file():
                raise InputError(
                    f"{file}: the file is missing; {METADATA_FILE} lists {shard.documents} documents. Prepare the "
                    "data again"
                )

    def __iter__(self) -> Iterator[str]:
        for shard in self._shards:
            number, file = 0, _text_file(self._folder, shard)
            with refuse_damage(file), gzip.open(file, "rt", encoding="utf-8") as lines:
                for line in lines:
                    number += 1
                    yield json.loads(line)["text"]
            if number != shard.documents:
                raise InputError(
                    f"{file}: has {number} documents, {METADATA_FILE} lists {shard.documents}. Prepare the data again"
                )


@functools.cache
def _sampled(folder: Path, fingerprint: str, max_bytes: int) -> tuple[str, ...]:
    """Returns the sample of a data set; the fingerprint is part of the cache key."""
    return choose_sample(_Documents(folder), max_bytes)


def _held_out_shards(metadata: dict) -> list[Shard]:
    shards = [Shard(**shard) for shard in metadata["splits"]["validation"]["shards"]]
    return [shard for shard in shards if shard.documents]


def _text_file(folder: Path, shard: Shard) -> Path:
    return (folder / shard.file).with_suffix(".jsonl.gz")


def _hash(text: bytes) -> int:
    """The hash that `prepare` compares with the share to hold out."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
