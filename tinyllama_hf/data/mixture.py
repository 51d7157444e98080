"""Several prepared data sets, mixed by weight: the training stream of a run."""

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
        weights (`Sequence[float]`): share of the training tokens that each gives.
        block_size (`int`): tokens that a sequence feeds to the model.
        seed (`int`): of the order.
        tokenizer_fingerprint (`str`): of the tokenizer that the model is to have.
        changes (`Sequence[WeightChange]`, *optional*): later weights, in blocks.

    Raises:
        InputError: if a folder is no data set, holds too little, was prepared with another tokenizer, or puts other
            separators around documents than the first.
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
                    f"{source.folder}: was prepared with a tokenizer of fingerprint {found[:12]}, data.tokenizer has "
                    f"{tokenizer_fingerprint[:12]}, so its ids would mean other text; use {source.folder}/tokenizer, or "
                    "prepare the data again"
                )
            first = self.sources[0]
            if source.metadata["separator"] != first.metadata["separator"]:
                # TinyLlama's policy changed between runs, and the released models never learned to stop.
                raise InputError(
                    f"{source.folder}: was prepared with --separator {source.metadata['separator']}, {first.folder} with "
                    f"{first.metadata['separator']}; documents of one run must begin and end alike: prepare one again"
                )
        self.block_size, self.weights = block_size, list(weights)
        self.order = BlockOrder([len(source) for source in self.sources], weights, seed, changes)

    def blocks(self, start: int, count: int) -> list[Block]:
        """The blocks at some places of the run."""
        return self.order.blocks(start, count)

    def tokens(self, blocks: Sequence[Block]) -> np.ndarray:
        """The `[len(blocks), block_size + 1]` tokens of some blocks, as int64."""
        return np.stack([self.sources[block.source][block.index] for block in blocks])

    def position_ids(self, blocks: Sequence[Block]) -> np.ndarray:
        """The `[len(blocks), block_size]` positions of their inputs, restarting at each document."""
        return np.stack([self.sources[block.source].position_ids(block.index) for block in blocks])

    def epochs(self, num_blocks: int) -> list[float]:
        """How often each source has been read after so many blocks."""
        counts = self.order.counts(num_blocks)
        return [count / len(source) for count, source in zip(counts, self.sources, strict=True)]

    def shares(self, num_blocks: int) -> list[float]:
        """Share of each source in the first so many blocks: its weight, or the mean of its changing weights."""
        return [count / num_blocks for count in self.order.counts(num_blocks)]

    def validation_blocks(self, max_tokens: int, shares: Sequence[float]) -> list[np.ndarray]:
        """Per source, `[num_blocks, block_size + 1]` held-out tokens: the first of the split, by its share.

        Raises:
            InputError: if a source holds out less than a block.
        """
        chosen = []
        for source, share in zip(self.sources, shares, strict=True):
            held_out = TokenDataset(source.folder, self.block_size, "validation")
            number = min(len(held_out), max(int(max_tokens * share) // self.block_size, 1))
            chosen.append(np.stack([held_out[i] for i in range(number)]))
        return chosen
