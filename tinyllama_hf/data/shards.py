"""Reading prepared data: memory-mapped token shards as one stream, cut into blocks."""

import os
from functools import cached_property
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..provenance import read_json


FORMAT_VERSION = 1
METADATA_FILE = "dataset.json"


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
        shards = self.metadata["splits"][split]["shards"]
        dtype = np.dtype(self.metadata["token_dtype"])
        self._tokens = [self._map(shard["file"], dtype, shard["tokens"]) for shard in shards if shard["tokens"]]
        self._shards = [shard for shard in shards if shard["tokens"]]
        self._starts = np.cumsum([0, *(len(tokens) for tokens in self._tokens)])
        if len(self) < 1:
            raise InputError(
                f"{self.folder}: its {split} split holds {self.num_tokens} tokens, less than one block of "
                f"{block_size} + 1; prepare more text or shorten data.sequence_length"
            )

    def _map(self, name: str, dtype: np.dtype, num_tokens: int) -> np.memmap:
        path = self.folder / name
        if not path.is_file() or path.stat().st_size != num_tokens * dtype.itemsize:
            raise InputError(
                f"{path}: {METADATA_FILE} announces {num_tokens} tokens, the file "
                f"{'has another size' if path.is_file() else 'is missing'}; prepare the data again"
            )
        return np.memmap(path, dtype=dtype, mode="r")

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
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        pieces = []
        while start < stop:
            offset = start - self._starts[first]
            piece = self._tokens[first][offset : offset + stop - start]
            pieces.append(piece)
            start += len(piece)
            first += 1
        return np.concatenate(pieces).astype(np.int64)

    def position_ids(self, index: int) -> np.ndarray:
        """The `[block_size]` positions of a block's inputs, restarting at 0 where a document starts inside it."""
        first = index * self.block_size
        places = np.arange(first, first + self.block_size)
        document = np.searchsorted(self._document_starts, places, side="right") - 1
        return places - np.maximum(self._document_starts[document], first)

    @cached_property
    def _document_starts(self) -> np.ndarray:
        ends = [
            np.fromfile(self.folder / f"{shard['file']}.index", dtype="<u8").astype(np.int64) + start
            for shard, start in zip(self._shards, self._starts, strict=False)
        ]
        return np.concatenate([[0], *ends])[:-1]


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
