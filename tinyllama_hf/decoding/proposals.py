"""Where drafted tokens come from: a smaller model, the target's own first layers, or the text itself."""

import copy
import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import InputError
from .acceptance import Proposal, RowProcessors, draw
from .ragged_cache import RaggedModel
from .rows import DRAFTING, Rows


class Proposer(Protocol):
    """What drafts tokens for the rows of one generation."""

    passes: int
    context: float  # tokens that it can read

    def catch_up(self, rows: Rows) -> None:
        """Reads what it has not read of the rows, such as the prompts, where that is more than drafting reads anyway."""

    def propose(self, rows: Rows, num_tokens: int, processors: RowProcessors, do_sample: bool) -> Proposal:
        """Drafts up to `num_tokens` tokens behind each row's end; the rows stay as they are."""

    def keep(self, kept: Sequence[int]) -> None:
        """Keeps the rows of these indices."""

    def join(self, rows: Rows, other: "Proposer", other_rows: Rows) -> None:
        """Takes in the rows of another one of its kind; `rows` are its own before that."""


class NoDraft:
    """Drafts nothing, for plain decoding."""

    passes = 0
    context = math.inf

    def catch_up(self, rows: Rows) -> None:
        """Nothing is read."""

    def propose(self, rows: Rows, num_tokens: int, processors: RowProcessors, do_sample: bool) -> Proposal:
        """No tokens."""
        return Proposal(rows.tokens[:, :0], torch.zeros_like(rows.tokens[:, 0]))

    def keep(self, kept: Sequence[int]) -> None:
        """Nothing to keep."""

    def join(self, rows: Rows, other: Proposer, other_rows: Rows) -> None:
        """Nothing to take in."""


class ModelProposer:
    """Drafts with a model, which keeps a cache of its own.

    Args:
        model (`PreTrainedModel`): with the target's vocabulary.
        num_rows (`int`): of the batch.

    Raises:
        InputError: if the model cannot read rows of different lengths.
    """

    def __init__(self, model: PreTrainedModel, num_rows: int):
        self._reader = RaggedModel(model, "draft")
        self._read = [0] * num_rows  # tokens of each row that the cache holds for certain

    @property
    def context(self) -> int:
        """Tokens that the model can read."""
        return self._reader.context

    @property
    def passes(self) -> int:
        """Forward passes so far."""
        return self._reader.passes

    def catch_up(self, rows: Rows) -> None:
        """Reads prompts, and what came in plain rounds; after a round with a draft one or two tokens are left to read."""
        if self._behind(rows) > 2:
            self._read_all(rows)

    def propose(self, rows: Rows, num_tokens: int, processors: RowProcessors, do_sample: bool) -> Proposal:
        """Drafts `num_tokens` tokens, one a pass; see [`Proposer`]."""
        latest = rows.last_tokens(self._behind(rows))
        drafted, probabilities = [], []
        for step in range(num_tokens):
            ends = [length + step for length in rows.lengths]
            scores = processors(self._reader.read(latest, ends), rows.tokens, ends)[:, 0]
            if do_sample:
                probabilities.append(scores.softmax(dim=-1))
                latest = draw(probabilities[-1][:, None], rows.uniform(DRAFTING, 1, step))
            else:
                latest = scores.argmax(dim=-1, keepdim=True)
            rows.put(latest, step)
            drafted.append(latest)
        self._read = [length + num_tokens - 1 for length in rows.lengths]
        return Proposal(
            torch.cat(drafted, dim=1),
            torch.full((len(rows.lengths),), num_tokens, device=latest.device),
            torch.stack(probabilities, dim=1) if do_sample else None,
        )

    def _read_all(self, rows: Rows) -> None:
        """Reads all but the last token of each row."""
        self._reader.read(rows.last_tokens(self._behind(rows))[:, :-1], [length - 1 for length in rows.lengths])
        self._read = [length - 1 for length in rows.lengths]

    def _behind(self, rows: Rows) -> int:
        """Tokens that it has not read of the row that it has read least of; rejected ones were read in vain."""
        return max(length - min(read, length - 1) for length, read in zip(rows.lengths, self._read, strict=True))

    def keep(self, kept: Sequence[int]) -> None:
        """Keeps the rows of these indices."""
        self._read = [self._read[row] for row in kept]
        if self.passes:
            self._reader.keep(kept)

    def join(self, rows: Rows, other: "ModelProposer", other_rows: Rows) -> None:
        """Lets the joining rows read their prompts first, by themselves: beside the others, all would be read again."""
        if not len(other_rows):
            return
        for proposer, own_rows in ((self, rows), (other, other_rows)):
            if len(own_rows) and not proposer.passes:
                proposer._read_all(own_rows)
        if self.passes:
            self._reader.join(other._reader, max([*rows.lengths, *other_rows.lengths]))
        else:
            self._reader = other._reader
        self._read += other._read


class PromptLookup:
    """Drafts what followed the last tokens where they stood before in the same row; needs no model.

    Saxena 2023, "Prompt lookup decoding". The longest match counts, and of several the latest.

    Args:
        max_matching_ngram_size (`int`, *optional*, defaults to 3): tokens of the longest match that is looked for.
    """

    passes = 0
    context = math.inf

    def __init__(self, max_matching_ngram_size: int = 3):
        if max_matching_ngram_size < 1:
            raise InputError(f"max_matching_ngram_size {max_matching_ngram_size}: must be at least 1")
        self.max_matching_ngram_size = max_matching_ngram_size

    def catch_up(self, rows: Rows) -> None:
        """Nothing is read before it is looked up."""

    def propose(self, rows: Rows, num_tokens: int, processors: RowProcessors, do_sample: bool) -> Proposal:
        """Drafts up to `num_tokens` tokens of a row, none where nothing matches; see [`Proposer`]."""
        found = [self._look_up(rows.tokens[row, :length], num_tokens) for row, length in enumerate(rows.lengths)]
        counts = [len(tokens) for tokens in found]
        tokens = rows.tokens.new_zeros(len(found), max(counts))
        for row, following in enumerate(found):
            tokens[row, : len(following)] = following
        if tokens.shape[1]:
            rows.put(tokens)
        return Proposal(tokens, torch.tensor(counts, device=tokens.device))

    def keep(self, kept: Sequence[int]) -> None:
        """Nothing to keep."""

    def join(self, rows: Rows, other: Proposer, other_rows: Rows) -> None:
        """Nothing to take in."""

    def _look_up(self, row: torch.Tensor, num_tokens: int) -> torch.Tensor:
        for size in range(min(self.max_matching_ngram_size, len(row) - 1), 0, -1):
            matches = (row[:-1].unfold(0, size, 1) == row[-size:]).all(dim=1).nonzero()
            if len(matches):
                begin = int(matches[-1]) + size
                return row[begin : begin + num_tokens]
        return row[:0]


def first_layers(model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """A model of the first layers of another, with its embeddings, norm and head; it shares all weights.

    Args:
        model (`PreTrainedModel`): a model of Llama's build: `model.model.layers`.
        num_layers (`int`): fewer than it has.

    Raises:
        InputError: if the number is out of range, or the model is built otherwise.
    """
    inner = getattr(model, "model", None)
    layers = getattr(inner, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise InputError(f"first_layers: {type(model).__name__} has no model.layers to take the first ones of")
    if not 1 <= num_layers < len(layers):
        raise InputError(
            f"first_layers {num_layers}: must be from 1 to {len(layers) - 1}, the target has {len(layers)}"
        )
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = num_layers
    inner = _view(inner, config, layers=nn.ModuleList(layers[:num_layers]))
    return _view(model, config, model=inner)


def _view(module: nn.Module, config, **submodules: nn.Module) -> nn.Module:
    """A module that shares everything with another one but its configuration and these submodules."""
    view = copy.copy(module)
    view._modules = {**module._modules, **submodules}
    view.config = config
    return view
