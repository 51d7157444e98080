"""A weighted mixture of prepared data sets: the training data of a run."""

import os
from collections.abc import Sequence

import numpy as np

from ..errors import InputError
from .order import Block, BlockOrder, WeightChange
from .shards import TokenDataset


class Mixture:
    """Training and validation blocks of several sources.

    Args:
        folders (`Sequence[str]`): prepared data sets.
        weights (`Sequence[float]`): share of the training tokens from each data set.
        block_size (`int`): input tokens of a sequence.
        seed (`int`): seed of the order.
        tokenizer_fingerprint (`str`): fingerprint of the tokenizer of the model.
        changes (`Sequence[WeightChange]`, *optional*): later weights, in blocks.

    Raises:
        InputError: if a folder is not a data set, has less than a block, or was prepared with another tokenizer or
            other separators.
    """

    def __init__(
        self,
        folders: Sequence[str | os.PathLike],
        weights: Sequence[float],
        block_size: int,
        seed: int,
        tokenizer_fingerprint: str,
        changes: Sequence[WeightChange] = (),
    ):
        self.sources = [TokenDataset(folder, block_size) for folder in folders]
        for source in self.sources:
            found = source.metadata["tokenizer"]["fingerprint"]
            if found != tokenizer_fingerprint:
                raise InputError(
                    f"{source.folder} was prepared with a tokenizer of fingerprint {found[:12]}, but data.tokenizer "
                    f"has {tokenizer_fingerprint[:12]}, so its ids stand for other text. Use "
                    f"{source.folder}/tokenizer, or prepare the data again"
                )
            first = self.sources[0]
            if source.metadata["separator"] != first.metadata["separator"]:
                # TinyLlama's separators changed between runs, and the released models never learned to stop.
                raise InputError(
                    f"{source.folder} was prepared with --separator {source.metadata['separator']}, {first.folder} "
                    f"with {first.metadata['separator']}. All data of a run need the same separators. Prepare one of "
                    "them again"
                )
        self.block_size, self.weights = block_size, list(weights)
        self.order = BlockOrder([len(source) for source in self.sources], weights, seed, changes)

    def blocks(self, start: int, count: int) -> list[Block]:
        """The blocks at positions `start` to `start + count - 1` of the run."""
        return self.order.blocks(start, count)

    def tokens(self, blocks: Sequence[Block]) -> np.ndarray:
        """The tokens of blocks, `[len(blocks), block_size + 1]`, as int64."""
        return np.stack([self.sources[block.source][block.index] for block in blocks])

    def position_ids(self, blocks: Sequence[Block]) -> np.ndarray:
        """The positions of the inputs of blocks, `[len(blocks), block_size]`, restarting at each document."""
        return np.stack([self.sources[block.source].position_ids(block.index) for block in blocks])

    def epochs(self, num_blocks: int) -> list[float]:
        """The number of epochs of each source in the first `num_blocks` blocks."""
        counts = self.order.counts(num_blocks)
        return [count / len(source) for count, source in zip(counts, self.sources, strict=True)]

    def shares(self, num_blocks: int) -> list[float]:
        """The share of each source in the first `num_blocks` blocks: its weight, or the mean of changing weights."""
        return [count / num_blocks for count in self.order.counts(num_blocks)]

    def validation_blocks(self, max_tokens: int, shares: Sequence[float]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The first held-out tokens of each source, in proportion to its share, and the positions of the inputs.

        Returns:
            `tuple[list[np.ndarray], list[np.ndarray]]`: per source, `[num_blocks, block_size + 1]` tokens and
            `[num_blocks, block_size]` positions, restarting at each document.

        Raises:
            InputError: if a source has less than one held-out block.
        """
        tokens, positions = [], []
        for source, share in zip(self.sources, shares, strict=True):
            held_out = TokenDataset(source.folder, self.block_size, "validation")
            blocks = range(min(len(held_out), max(int(max_tokens * share) // self.block_size, 1)))
            tokens.append(np.stack([held_out[i] for i in blocks]))
            positions.append(np.stack([held_out.position_ids(i) for i in blocks]))
        return tokens, positions
