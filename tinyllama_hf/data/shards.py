"""Reading prepared data: memory-mapped token shards as one stream, cut into blocks.

A corpus may have more shards than a process may have files: SlimPajama has 59 166. They are mapped when they are read, and
the least recently used one is closed for the next. Opening a data set compares the sizes of its files with what
`dataset.json` announces, and nothing more; [`check_contents`] reads every byte.
"""

import gzip
import os
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from rich.progress import track

from ..errors import InputError
from ..files import read_json
from ..provenance import file_sha256, fingerprint


FORMAT_VERSION = 1
METADATA_FILE = "dataset.json"
SPLITS = ("train", "validation")
_INDEX_DTYPE = np.dtype("<u8")


class TokenDataset:
    """One split of a folder that `tinyllama-hf prepare` wrote.

    Block i is the tokens `i T .. i T + T` of all documents one after the other: T inputs and, shifted by one, T labels.
    The last token of a block is the first of the next. Blocks cross documents and files; what is left after the last
    whole block is not read and never padded.

    Args:
        folder (`str` or `os.PathLike`): holds `dataset.json`.
        block_size (`int`): T, the tokens that a sequence feeds to the model.
        split (`str`, *optional*, defaults to `"train"`): `"train"` or `"validation"`.

    Raises:
        InputError: if the folder is no finished data set, or holds less than one block.
    """

    def __init__(self, folder: str | os.PathLike, block_size: int, split: str = "train"):
        self.folder, self.block_size, self.split = Path(folder), block_size, split
        self.metadata = read_metadata(self.folder)
        self._dtype = np.dtype(self.metadata["token_dtype"])
        self._shards = [shard for shard in self.metadata["splits"][split]["shards"] if shard["tokens"]]
        self._starts = np.cumsum([0, *(shard["tokens"] for shard in self._shards)])
        # Absolute, since files are opened later, perhaps from another working directory.
        self._root = os.path.abspath(self.folder)
        for shard in self._shards:
            check_sizes(self._root, shard, self._dtype.itemsize)
        if len(self) < 1:
            raise InputError(
                f"{self.folder}: its {split} split holds {self.num_tokens} tokens, less than one block of "
                f"{block_size} + 1; prepare more text or shorten data.sequence_length"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens of the split, the unread tail included."""
        return int(self._starts[-1])

    @property
    def num_tail_tokens(self) -> int:
        """Tokens after the last whole block."""
        return self.num_tokens - len(self) * self.block_size

    def __len__(self) -> int:
        return max(self.num_tokens - 1, 0) // self.block_size

    def __getitem__(self, index: int) -> np.ndarray:
        """The `[block_size + 1]` tokens of a block, as int64."""
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
        """The `[block_size]` positions of a block's inputs, restarting at 0 where a document starts inside it."""
        block_start = index * self.block_size
        found = []
        for number, first, last in self._pieces(block_start, block_start + self.block_size):
            ends = self._map(number, "index")
            inside = ends[np.searchsorted(ends, first, "right") : np.searchsorted(ends, last - 1, "right")]
            starts = np.concatenate([[first], inside.astype(np.int64)])  # a shard begins with a document
            places = np.arange(first, last)
            found.append(places - starts[np.searchsorted(starts, places, side="right") - 1])
        return np.concatenate(found)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(number of the shard, first, last + 1 in it) of a stretch of the split."""
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            begin, end = self._starts[number], self._starts[number + 1]
            yield number, int(start - begin), int(min(stop, end) - begin)
            start, number = end, number + 1

    def _map(self, number: int, what: str) -> np.ndarray:
        shard = self._shards[number]
        path = f"{self._root}/{shard['file']}"
        if what == "index":
            return _mapped(f"{path}.index", _INDEX_DTYPE, shard["documents"], shard["sha256"])
        return _mapped(path, self._dtype, shard["tokens"], shard["sha256"])


# One cache for all data sets of the process, since its limits are the process's. The digest says what the file holds, so
# that a map outlives nothing but equal contents.
def _max_open_maps() -> int:
    """A quarter of the files that this process may have; at most 4096, since the kernel allows 65 530 maps."""
    try:
        import resource  # not on Windows
    except ImportError:
        return 512
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 4096 if limit == resource.RLIM_INFINITY else min(max(limit // 4, 1), 4096)


@lru_cache(maxsize=_max_open_maps())
def _mapped(path: str, dtype: np.dtype, length: int, sha256: str) -> np.ndarray:
    try:
        return np.memmap(path, dtype=dtype, mode="r", shape=(length,))
    except (OSError, ValueError) as error:  # a file that has become too short is a ValueError
        raise InputError(f"{path}: was there when the data set was opened, cannot be read now ({error})") from error


def check_sizes(root: str | os.PathLike, shard: dict, token_bytes: int) -> None:
    """Compares the sizes of a shard and of its index with what is announced, without opening them.

    Raises:
        InputError: if one is missing or has another size.
    """
    path = f"{os.fspath(root)}/{shard['file']}"
    expected = (
        (path, shard["tokens"] * token_bytes),
        (f"{path}.index", shard["documents"] * _INDEX_DTYPE.itemsize),
    )
    for name, size in expected:
        try:
            problem = None if os.stat(name).st_size == size else "has another size"
        except FileNotFoundError:
            problem = "is missing"
        if problem:
            raise InputError(
                f"{name}: {METADATA_FILE} announces {shard['tokens']} tokens in {shard['documents']} documents, the file "
                f"{problem}; prepare the data again"
            )


def check_contents(folder: str | os.PathLike, progress: bool = True) -> int:
    """Reads a whole data set and compares it with `dataset.json`; returns the number of shards.

    Tokens by their SHA-256, document ends by their order, number and last one, held-out text by the checksum inside its
    gzip file and its number of documents, and `dataset.json` by its own fingerprint.

    Raises:
        InputError: naming the files that differ.
    """
    folder, metadata = Path(folder), read_metadata(folder)
    decisive = [metadata["tokenizer"]["fingerprint"], metadata["separator"], metadata["splits"]]
    problems = [] if fingerprint(decisive) == metadata["fingerprint"] else [f"{METADATA_FILE}: fingerprint"]
    shards = [(split, shard) for split, values in metadata["splits"].items() for shard in values["shards"]]
    token_bytes = np.dtype(metadata["token_dtype"]).itemsize
    for split, shard in track(shards, "Checking", disable=not progress):
        problems += _problems(folder, split, shard, token_bytes)
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:10])
        raise InputError(
            f"{folder}: {len(problems)} file(s) differ from what was prepared; fetch them again, or prepare the data "
            f"again\n{shown}"
        )
    return len(shards)


def _problems(folder: Path, split: str, shard: dict, token_bytes: int) -> list[str]:
    try:
        check_sizes(folder, shard, token_bytes)
    except InputError as error:
        return [str(error)]
    path, found = folder / shard["file"], []
    if file_sha256(path) != shard["sha256"]:
        found.append(f"{path}: SHA-256")
    ends = np.fromfile(f"{path}.index", dtype=_INDEX_DTYPE).astype(np.int64)
    if (np.diff(ends, prepend=0) < 1).any() or (ends[-1] if len(ends) else 0) != shard["tokens"]:
        found.append(f"{path}.index: document ends")
    if split == "validation" and shard["documents"]:
        text = path.with_suffix(".jsonl.gz")
        try:
            with gzip.open(text) as lines:
                number = sum(1 for _ in lines)
        except (OSError, EOFError, zlib.error) as error:
            found.append(f"{text}: {error}")
        else:
            found += [] if number == shard["documents"] else [f"{text}: {number} documents, not {shard['documents']}"]
    return found


def read_metadata(folder: str | os.PathLike) -> dict:
    """Returns the contents of a data set's `dataset.json`.

    Raises:
        InputError: if the folder does not exist, was not finished, or has another format.
    """
    folder = Path(folder)
    path = folder / METADATA_FILE
    if not folder.is_dir():
        raise InputError(
            f"data folder {folder} does not exist; make it with `tinyllama-hf prepare ... --output {folder}`"
        )
    if not path.is_file():
        raise InputError(
            f"{folder}: no {METADATA_FILE}, so it is no prepared data set or its preparation was interrupted; run "
            "`tinyllama-hf prepare` again with the same arguments, it goes on where it stopped"
        )
    metadata = read_json(path)
    if metadata.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: format_version {metadata.get('format_version')!r}, this version reads {FORMAT_VERSION}; prepare again"
        )
    return metadata
