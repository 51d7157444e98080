"""Where drafted tokens come from: a smaller model, the target's own first layers, or the text itself."""

import copy
import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import InputError
from .acceptance import Proposal, RowProcessors, draw
from .ragged_cache import RaggedModel
from .rows import DRAFTING, Rows


@dataclasses.dataclass
class SpeculationStatistics:
    """What was counted and timed in one generation.

    Attributes:
        rows (`int`): sequences that were generated.
        new_tokens (`int`): in all of them.
        drafted (`int`): tokens that were proposed.
        accepted (`int`): proposed tokens that stand in the output.
        judged (`int`): proposed tokens up to the first rejected one of each round and row; `accepted / judged` estimates the
            probability that a token is accepted where all before it are.
        target_passes (`int`): forward passes of the target, those over the prompts included.
        row_passes (`int`): the same summed over the rows that were in each pass; every one adds a token of the
            target's own, unless an accepted one ends the row.
        draft_passes (`int`): forward passes of the draft model.
        plain_rounds (`int`): rounds in which nothing was to be drafted, since it did not pay or a plain pass was to be timed.
        prefill_seconds (`float`): of the passes over the prompts.
        target_seconds (`float`): of the other ones, with choosing what is accepted.
        draft_seconds (`float`): of drafting, the draft's own reading of the prompts included.
    """

    rows: int
    new_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    judged: int = 0
    target_passes: int = 0
    row_passes: int = 0
    draft_passes: int = 0
    plain_rounds: int = 0
    prefill_seconds: float = 0.0
    target_seconds: float = 0.0
    draft_seconds: float = 0.0

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that stand in the output."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a row gains in a pass of the target, 1 in plain decoding."""
        return self.new_tokens / self.row_passes if self.row_passes else 0.0

    @property
    def seconds(self) -> float:
        """Of the passes together."""
        return self.prefill_seconds + self.target_seconds + self.draft_seconds

    def add(self, other: "SpeculationStatistics") -> None:
        """Adds what was counted of rows that join; passes are counted by those who make them."""
        for name in ("rows", "new_tokens", "row_passes", "prefill_seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def __str__(self) -> str:
        line = (
            f"draft: {self.acceptance * 100:.0f} % of {self.drafted} drafted tokens accepted, {self.target_passes} target "
            f"passes for {self.new_tokens} tokens, {self.seconds:.1f} s"
        )
        gave_up = self.plain_rounds > 1 + self.target_passes // 10  # one is plain in any case, and timed
        return line + (f"; {self.plain_rounds} passes without drafting, which did not pay" if gave_up else "")


class Proposer:
    """Drafts tokens for rows of different lengths; this one drafts none, and is the base of those that do.

    Attributes:
        context (`float`): tokens that it can read.
        statistics (`SpeculationStatistics`, *optional*): of the last generation with its help.
    """

    context: float = math.inf
    statistics: SpeculationStatistics | None = None

    @property
    def passes(self) -> int:
        """Forward passes of a model so far."""
        return 0

    def begin(self, num_rows: int) -> "Proposer":
        """Returns the proposer of one generation, which keeps what was read of its rows."""
        return self

    def catch_up(self, rows: Rows) -> None:
        """Reads what it has not read of the rows, such as the prompts, where that is more than drafting reads anyway."""

    def propose(self, rows: Rows, num_tokens: int, processors: RowProcessors, do_sample: bool) -> Proposal:
        """Drafts up to `num_tokens` tokens behind each row's end; the rows stay as they are."""
        return nothing_drafted(rows)

    def keep(self, kept: Sequence[int]) -> None:
        """Keeps the rows of these indices."""

    def join(self, rows: Rows, other: "Proposer", other_rows: Rows) -> None:
        """Takes in the rows of another one that began from the same; `rows` are its own before that."""


class ModelProposer(Proposer):
    """Drafts with a model, which keeps a cache of its own.

    Args:
        model (`PreTrainedModel`): with the target's vocabulary.
        num_rows (`int`, *optional*, defaults to 0): of the batch.
    """

    def __init__(self, model: PreTrainedModel, num_rows: int = 0):
        self.model = model
        self._reader = RaggedModel(model)
        self._read = [0] * num_rows  # tokens of each row that the cache holds for certain
        self.context = self._reader.context

    @property
    def passes(self) -> int:
        return self._reader.passes

    def begin(self, num_rows: int) -> "ModelProposer":
        return ModelProposer(self.model, num_rows)

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
        ends = [length - 1 for length in rows.lengths]
        self._reader.read(rows.last_tokens(self._behind(rows))[:, :-1], ends)
        self._read = ends

    def _behind(self, rows: Rows) -> int:
        """Tokens that it has not read of the row that it has read least of; rejected ones were read in vain."""
        return max(length - min(read, length - 1) for length, read in zip(rows.lengths, self._read, strict=True))

    def keep(self, kept: Sequence[int]) -> None:
        self._read = [self._read[row] for row in kept]
        if self.passes:
            self._reader.keep(kept)

    def join(self, rows: Rows, other: Proposer, other_rows: Rows) -> None:
        """Lets the joining rows read their prompts first, by themselves: beside the others, all would be read again."""
        assert isinstance(other, ModelProposer)
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


class PromptLookup(Proposer):
    """Drafts what followed the last tokens where they stood before in the same row; needs no model.

    Saxena 2023, "Prompt lookup decoding". The longest match counts, and of several the latest.

    Args:
        max_matching_ngram_size (`int`, *optional*, defaults to 3): tokens of the longest match that is looked for.
    """

    def __init__(self, max_matching_ngram_size: int = 3):
        if max_matching_ngram_size < 1:
            raise InputError(f"max_matching_ngram_size {max_matching_ngram_size}: must be at least 1")
        self.max_matching_ngram_size = max_matching_ngram_size

    def propose(self, rows: Rows, num_tokens: int, processors: RowProcessors, do_sample: bool) -> Proposal:
        """Drafts up to `num_tokens` tokens of a row, none where nothing matches; see [`Proposer`]."""
        found = [self._look_up(rows.tokens[row, :length], num_tokens) for row, length in enumerate(rows.lengths)]
        tokens = nn.utils.rnn.pad_sequence(found, batch_first=True)
        if tokens.shape[1]:
            rows.put(tokens)
        return Proposal(tokens, torch.tensor([len(following) for following in found], device=tokens.device))

    def _look_up(self, row: torch.Tensor, num_tokens: int) -> torch.Tensor:
        for size in range(min(self.max_matching_ngram_size, len(row) - 1), 0, -1):
            matches = (row[:-1].unfold(0, size, 1) == row[-size:]).all(dim=1).nonzero()
            if len(matches):
                begin = int(matches[-1]) + size
                return row[begin : begin + num_tokens]
        return row[:0]


def nothing_drafted(rows: Rows) -> Proposal:
    """No token for any row, as in plain decoding."""
    return Proposal(rows.tokens[:, :0], torch.zeros_like(rows.tokens[:, 0]))


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
