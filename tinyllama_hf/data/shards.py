"""Reads prepared data: memory-mapped token shards as one stream of blocks.

A corpus may have more shards than a process may have open files: SlimPajama has 59 166. Shards are mapped when they
    are
read, and the least recently used one is closed. Opening a data set compares only the sizes of its files with
`dataset.json`; [`check_contents`] reads every byte.
"""

import gzip
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..files import read_json
from ..progress import progress_bar
from ..provenance import file_sha256, fingerprint


FORMAT_VERSION = 1
METADATA_FILE = "dataset.json"
SPLITS = ("train", "validation")
_INDEX_DTYPE = np.dtype("<u8")


@dataclass(frozen=True)
class Shard:
    """An entry of `shards` in `dataset.json`.

    Attributes:
        file (`str`): path of the tokens, relative to the data set.
        sha256 (`str`): of the tokens.
        documents, tokens, bytes (`int`): numbers of documents and tokens, and UTF-8 bytes of the text.
    """

    file: str
    sha256: str
    documents: int
    tokens: int
    bytes: int


class TokenDataset:
    """One split of a data set from `tinyllama-hf prepare`.

    Block i consists of tokens `i T .. i T + T` of the concatenated documents: T inputs and, shifted by one, T labels.
    The last token of a block is the first of the next. Blocks cross documents and files; a tail of less than a block
    is not read, and never padded.

    Args:
        folder (`str` or `os.PathLike`): folder with `dataset.json`.
        block_size (`int`): T, the number of input tokens of a sequence.
        split (`str`, *optional*, defaults to `"train"`): `"train"` or `"validation"`.

    Raises:
        InputError: if the folder is not a finished data set, or has less than one block.
    """

    def __init__(self, folder: str | os.PathLike, block_size: int, split: str = "train"):
        self.folder, self.block_size, self.split = Path(folder), block_size, split
        self.metadata = read_metadata(self.folder)
        self._dtype = np.dtype(self.metadata["token_dtype"])
        self._shards = [shard for shard in _shards_of(self.metadata, split) if shard.tokens]
        self._starts = np.cumsum([0, *(shard.tokens for shard in self._shards)])
        # Absolute, since the working directory may change before files are opened.
        self._root = os.path.abspath(self.folder)
        for shard in self._shards:
            check_sizes(self._root, shard, self._dtype.itemsize)
        if len(self) < 1:
            more = "with a larger --validation-fraction" if split == "validation" else "from more text"
            raise InputError(
                f"{self.folder}: the {split} split has {self.num_tokens} tokens, less than one block of "
                f"{block_size} + 1. Prepare the data {more}, or reduce data.sequence_length"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens of the split, including the unread tail."""
        return int(self._starts[-1])

    @property
    def num_tail_tokens(self) -> int:
        """Tokens after the last complete block."""
        return self.num_tokens - len(self) * self.block_size

    def __len__(self) -> int:
        return max(self.num_tokens - 1, 0) // self.block_size

    def __getitem__(self, index: int) -> np.ndarray:
        """The tokens of a block, `[block_size + 1]`, as int64."""
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        return self.tokens(index * self.block_size, index * self.block_size + self.block_size + 1)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """The tokens `start .. stop - 1` of the split, as int64."""
        pieces = [
            self._map(number, "tokens")[first:last].astype(np.int64)
            for number, first, last in self._pieces(start, stop)
        ]
        return np.concatenate(pieces)

    def position_ids(self, index: int) -> np.ndarray:
        """The positions of the inputs of a block, `[block_size]`, restarting at 0 at each document that starts inside
        it."""
        block_start = index * self.block_size
        found = []
        for number, first, last in self._pieces(block_start, block_start + self.block_size):
            ends = self._map(number, "index")
            inside = ends[np.searchsorted(ends, first, "right") : np.searchsorted(ends, last - 1, "right")]
            starts = np.concatenate([[first], inside.astype(np.int64)])  # a shard starts with a document
            positions = np.arange(first, last)
            found.append(positions - starts[np.searchsorted(starts, positions, side="right") - 1])
        return np.concatenate(found)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yields (shard number, start, stop) for each part of a range of tokens."""
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            begin, end = self._starts[number], self._starts[number + 1]
            yield number, int(start - begin), int(min(stop, end) - begin)
            start, number = end, number + 1

    def _map(self, number: int, what: str) -> np.ndarray:
        shard = self._shards[number]
        path = f"{self._root}/{shard.file}"
        if what == "index":
            return _mapped(f"{path}.index", _INDEX_DTYPE, shard.documents, shard.sha256)
        return _mapped(path, self._dtype, shard.tokens, shard.sha256)


def _max_open_maps() -> int:
    """A quarter of the limit on open files, and at most 4096, since the kernel allows 65 530 maps."""
    try:
        import resource  # not on Windows
    except ImportError:
        return 512
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 4096 if limit == resource.RLIM_INFINITY else min(max(limit // 4, 1), 4096)


# One cache for all data sets, since the limits are per process. The digest is part of the key, so that a cached map is
# not used for a file with other contents.
@lru_cache(maxsize=_max_open_maps())
def _mapped(path: str, dtype: np.dtype, length: int, sha256: str) -> np.ndarray:
    try:
        return np.memmap(path, dtype=dtype, mode="r", shape=(length,))
    except (OSError, ValueError) as error:  # ValueError if the file became shorter
        raise InputError(
            f"{path} cannot be read ({error}), although it existed when the data set was opened. Restore the file"
        ) from error


def _shards_of(metadata: dict, split: str) -> list[Shard]:
    return [Shard(**shard) for shard in metadata["splits"][split]["shards"]]


def check_sizes(root: str | os.PathLike, shard: Shard, token_bytes: int) -> None:
    """Compares the sizes of a shard and its index with `dataset.json`, without opening them.

    Raises:
        InputError: if a file is missing or has another size.
    """
    path = f"{os.fspath(root)}/{shard.file}"
    expected = ((path, shard.tokens * token_bytes), (f"{path}.index", shard.documents * _INDEX_DTYPE.itemsize))
    for name, size in expected:
        try:
            problem = None if os.stat(name).st_size == size else "has another size"
        except FileNotFoundError:
            problem = "is missing"
        if problem:
            raise InputError(
                f"{name}: the file {problem}; {METADATA_FILE} lists {shard.tokens} tokens in {shard.documents} "
                "documents. Prepare the data again"
            )


def check_contents(folder: str | os.PathLike, progress: bool = True) -> int:
    """Reads all files of a data set, compares them with `dataset.json`, and returns the number of shards.

    Tokens are compared by SHA-256, document ends by order, number and last value, held-out text by the checksum of the
    gzip file and the number of documents, and `dataset.json` by its fingerprint.

    Raises:
        InputError: if files differ.
    """
    folder, metadata = Path(folder), read_metadata(folder)
    identity = [metadata["tokenizer"]["fingerprint"], metadata["separator"], metadata["splits"]]
    problems = [] if fingerprint(identity) == metadata["fingerprint"] else [f"{METADATA_FILE}: fingerprint"]
    shards = [(split, shard) for split in metadata["splits"] for shard in _shards_of(metadata, split)]
    token_bytes = np.dtype(metadata["token_dtype"]).itemsize
    with progress_bar("checking", "shards", len(shards), progress) as update:
        for split, shard in shards:
            problems += _problems(folder, split, shard, token_bytes)
            update(advance=1)
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:10])
        raise InputError(
            f"{folder}: {len(problems)} file(s) differ from {METADATA_FILE}. Copy them again, or prepare the data "
            f"again\n{shown}"
        )
    return len(shards)


def _problems(folder: Path, split: str, shard: Shard, token_bytes: int) -> list[str]:
    try:
        check_sizes(folder, shard, token_bytes)
    except InputError as error:
        return [str(error)]
    path, found = folder / shard.file, []
    if file_sha256(path) != shard.sha256:
        found.append(f"{path}: SHA-256")
    ends = np.fromfile(f"{path}.index", dtype=_INDEX_DTYPE).astype(np.int64)
    if (np.diff(ends, prepend=0) < 1).any() or (ends[-1] if len(ends) else 0) != shard.tokens:
        found.append(f"{path}.index: document ends")
    if split == "validation" and shard.documents:
        text = path.with_suffix(".jsonl.gz")
        try:
            with gzip.open(text) as lines:
                number = sum(1 for _ in lines)
        except (OSError, EOFError, zlib.error) as error:
            found.append(f"{text}: {error}")
        else:
            found += [] if number == shard.documents else [f"{text}: {number} documents, not {shard.documents}"]
    return found


def read_metadata(folder: str | os.PathLike) -> dict:
    """Returns the contents of `dataset.json` of a data set.

    Raises:
        InputError: if the folder does not exist, is not finished, or has another format.
    """
    folder = Path(folder)
    path = folder / METADATA_FILE
    if not folder.is_dir():
        raise InputError(
            f"data folder {folder} does not exist. Create it with `tinyllama-hf prepare ... --output {folder}`"
        )
    if not path.is_file():
        raise InputError(
            f"{folder}: {METADATA_FILE} is missing, so this is not a data set, or its preparation was interrupted. "
            "Run `tinyllama-hf prepare` with the same arguments to resume"
        )
    metadata = read_json(path)
    if metadata.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: format_version is {metadata.get('format_version')!r}; only {FORMAT_VERSION} is supported. "
            "Prepare the data again"
        )
    return metadata
