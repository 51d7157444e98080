"""Sources of drafted tokens: a smaller model, the target's own first layers, or the text itself."""

import copy
import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import InputError
from .acceptance import RowProcessors, draw
from .graphs import Graphs
from .ragged_cache import RaggedCache, RaggedModel
from .row_state import DRAFTING
from .rows import Rows


@dataclasses.dataclass
class SpeculationStatistics:
    """Counts and times of one generation.

    Attributes:
        rows (`int`): number of generated sequences.
        new_tokens (`int`): number of new tokens, all rows together.
        drafted (`int`): number of drafted tokens.
        accepted (`int`): number of drafted tokens in the output.
        verified (`int`): number of drafted tokens up to the first rejected one of each round and row; `accepted /
            verified` estimates the probability that a token is accepted if all tokens before it are.
        target_passes (`int`): forward passes of the target, including those over the prompts.
        row_passes (`int`): the same, summed over the rows of each pass. Each adds a token of the target's own, unless
            an accepted token ends the row.
        draft_passes (`int`): forward passes of the draft model.
        plain_rounds (`int`): rounds without drafting, because it was slower or to time a plain pass.
        prefill_seconds (`float`): time of the passes over the prompts.
        target_seconds (`float`): time of the other target passes, including acceptance.
        draft_seconds (`float`): time of drafting, including the draft's passes over the prompts.
    """

    rows: int
    new_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    verified: int = 0
    target_passes: int = 0
    row_passes: int = 0
    draft_passes: int = 0
    plain_rounds: int = 0
    prefill_seconds: float = 0.0
    target_seconds: float = 0.0
    draft_seconds: float = 0.0

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that are in the output."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """New tokens per row and target pass; 1 in plain decoding."""
        return self.new_tokens / self.row_passes if self.row_passes else 0.0

    @property
    def seconds(self) -> float:
        """Time of all passes."""
        return self.prefill_seconds + self.target_seconds + self.draft_seconds

    def add(self, other: "SpeculationStatistics") -> None:
        """Adds the counts of rows that join the batch; passes are counted where they are made."""
        for name in ("rows", "new_tokens", "row_passes", "prefill_seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def __str__(self) -> str:
        line = (
            f"draft: {self.acceptance * 100:.0f} % of {self.drafted} drafted tokens accepted, "
            f"{self.target_passes} target passes for {self.new_tokens} tokens, {self.seconds:.1f} s"
        )
        gave_up = self.plain_rounds > 1 + self.target_passes // 10  # one plain round is always timed
        return line + (f"; {self.plain_rounds} passes without drafting, since drafting was slower" if gave_up else "")


class Proposer:
    """Base class of drafts: proposes tokens for rows of different lengths. The base class itself proposes none.

    Attributes:
        context (`int`): maximum number of tokens that it can read.
        statistics (`SpeculationStatistics`, *optional*): of the last generation that used it.
    """

    context: int = sys.maxsize
    statistics: SpeculationStatistics | None = None

    @property
    def passes(self) -> int:
        """Forward passes of the draft model so far."""
        return 0

    def begin(self, num_rows: int) -> "Proposer":
        """Returns a proposer for one generation, which holds the state of its rows."""
        return self

    def read_piece(self, rows: Rows, num_tokens: int, offset: int) -> None:
        """Reads the tokens of each row up to `offset` tokens after its end, before the row has started."""

    def catch_up(self, rows: Rows) -> None:
        """Reads unread tokens, such as the prompts, if there are more of them than drafting reads anyway."""

    def propose(self, rows: Rows, num_tokens: int, processors: RowProcessors, do_sample: bool) -> int:
        """Drafts up to `num_tokens` tokens after each row's end, and sets `rows.state.drafted`.

        Returns:
            The largest number of tokens that a row may have got; the target verifies as many.
        """
        return 0

    def keep(self, kept: Sequence[int]) -> None:
        """Keeps the rows with these indices, in this order."""

    def join(self, rows: Rows, other: "Proposer", other_rows: Rows) -> None:
        """Adds the rows of a proposer from the same [`begin`]; `rows` are the own rows before that."""


# The numbers of tokens that steps of fixed shape read to catch up.
_CATCH_UP = [8 * 4**power for power in range(16)]


class ModelProposer(Proposer):
    """Drafts with a model, over its own cache.

    Args:
        model (`PreTrainedModel`): a model with the target's vocabulary.
        num_rows (`int`, *optional*, defaults to 0): batch size.
    """

    def __init__(self, model: PreTrainedModel, num_rows: int = 0):
        self.model = model
        self._reader = RaggedModel(model)
        self._read = [0] * num_rows  # tokens per row that the cache holds; more may be in it, rejected ones
        self._graphs: Graphs | None = None
        self.context = self._reader.context

    @property
    def passes(self) -> int:
        return self._reader.passes

    def begin(self, num_rows: int) -> "ModelProposer":
        return ModelProposer(self.model, num_rows)

    @property
    def reader(self) -> RaggedModel:
        """Reads rows with the draft."""
        return self._reader

    def read_piece(self, rows: Rows, num_tokens: int, offset: int) -> None:
        self._reader.read(rows, num_tokens, offset)
        self._read = [max(0, length + offset) for length in rows.lengths]

    def catch_up(self, rows: Rows) -> None:
        """Reads prompts and the tokens of plain rounds; after a drafting round only one or two tokens are unread."""
        behind = self._behind(rows)
        if behind > 2 or not self.passes:
            self._read_all(rows, behind)

    def propose(self, rows: Rows, num_tokens: int, processors: RowProcessors, do_sample: bool) -> int:
        """Drafts `num_tokens` tokens, one per pass."""
        # A step of fixed shape reads two tokens again, where one is unread: that changes nothing in the cache.
        behind = self._behind(rows) if rows.bucket is None else 2
        draft = functools.partial(self._draft, rows, num_tokens, behind, processors, do_sample)
        passes = self.passes
        if self._graphs is None or processors.recordable is None:
            draft()
        else:
            self._graphs.run(("draft", rows.bucket, num_tokens, do_sample, processors.recordable), draft)
        self._reader.passes = passes + num_tokens
        # The last drafted token was not read. Rejected ones are in the cache, and are overwritten: see `_behind`.
        self._read = [length + num_tokens - 1 for length in rows.lengths]
        return num_tokens

    def _draft(self, rows: Rows, num_tokens: int, behind: int, processors: RowProcessors, do_sample: bool) -> None:
        state = rows.state
        for step in range(num_tokens):
            logits = self._reader.read(rows, behind if step == 0 else 1, step)
            scores = processors(logits, rows, step)
            if do_sample:
                probabilities = scores.softmax(dim=-1)
                rows.probabilities(num_tokens, probabilities)[:, step : step + 1] = probabilities
                drafted = draw(probabilities, state.uniform(DRAFTING, 1, step))
            else:
                drafted = scores.argmax(dim=-1)
            state.put(drafted, step)
        state.plan_draft(num_tokens, self.context)

    def _read_all(self, rows: Rows, num_tokens: int) -> None:
        """Reads the last tokens of each row but the very last one."""
        if rows.bucket is not None:  # few shapes
            num_tokens = min(next(size for size in _CATCH_UP if size >= num_tokens), rows.bucket.slots)
        self._reader.read(rows, num_tokens - 1, -1)
        self._read = [length - 1 for length in rows.lengths]

    def _behind(self, rows: Rows) -> int:
        """Returns the largest number of unread tokens of a row; rejected tokens do not count as read."""
        return max(length - min(read, length - 1) for length, read in zip(rows.lengths, self._read, strict=True))

    def keep(self, kept: Sequence[int]) -> None:
        self._read = [self._read[row] for row in kept]
        if self.passes:
            self._reader.keep(kept)

    def move_to(self, cache: RaggedCache, graphs: Graphs, num_rows: int) -> None:
        """Moves the rows to a cache of fixed size, whose steps run as graphs."""
        self._reader.move_to(cache, graphs, num_rows)
        self._graphs = graphs

    def join(self, rows: Rows, other: Proposer, other_rows: Rows) -> None:
        """Reads the prompts of the joining rows first: in one pass with the others, those would be read again too."""
        assert isinstance(other, ModelProposer)
        if not len(other_rows):
            return
        for proposer, own_rows in ((self, rows), (other, other_rows)):
            behind = proposer._behind(own_rows) if len(own_rows) else 0
            if behind > 2 or (behind and not proposer.passes):
                proposer._read_all(own_rows, behind)
        if self.passes:
            self._reader.join(other._reader, len(rows), max([*rows.lengths, *other_rows.lengths]))
        else:
            self._reader = other._reader
        self._read += other._read


class PromptLookup(Proposer):
    """Drafts the tokens that followed an earlier occurrence of the row's last tokens; needs no model.

    Saxena 2023, "Prompt lookup decoding". The longest match is used, and the latest of several.

    Args:
        max_matching_ngram_size (`int`, *optional*, defaults to 3): maximum number of tokens to match.
    """

    def __init__(self, max_matching_ngram_size: int = 3):
        if max_matching_ngram_size < 1:
            raise InputError(f"max_matching_ngram_size={max_matching_ngram_size}: must be at least 1")
        self.max_matching_ngram_size = max_matching_ngram_size

    def propose(self, rows: Rows, num_tokens: int, processors: RowProcessors, do_sample: bool) -> int:
        """Drafts up to `num_tokens` tokens per row; none if nothing matches."""
        state, tokens = rows.state, rows.state.tokens.cpu()
        found = [self._look_up(tokens[row, :length], num_tokens) for row, length in enumerate(rows.lengths)]
        found += [tokens[0, :0]] * (len(state.ends) - len(found))  # rows that only fill up a batch
        counts = [len(following) for following in found]
        width = max(counts)
        state.plan_draft(num_tokens, self.context)
        state.drafted.copy_(state.drafted.minimum(torch.tensor(counts).to(state.drafted)))
        if width:
            state.put(nn.utils.rnn.pad_sequence(found, batch_first=True).to(state.tokens))
        return width

    def _look_up(self, row: torch.Tensor, num_tokens: int) -> torch.Tensor:
        for size in range(min(self.max_matching_ngram_size, len(row) - 1), 0, -1):
            matches = (row[:-1].unfold(0, size, 1) == row[-size:]).all(dim=1).nonzero()
            if len(matches):
                begin = int(matches[-1]) + size
                return row[begin : begin + num_tokens]
        return row[:0]


def first_layers(model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """Returns a model of the first layers of another one, with its embeddings, norm and head; all weights are shared.

    Args:
        model (`PreTrainedModel`): a model with Llama's module names (`model.model.layers`).
        num_layers (`int`): number of layers, fewer than the model has.

    Raises:
        InputError: if the number is out of range, or the model has no such layers.
    """
    inner: Any = getattr(model, "model", None)
    layers = getattr(inner, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise InputError(f"first_layers: {type(model).__name__} has no `model.layers`. Use a Llama")
    if not 1 <= num_layers < len(layers):
        raise InputError(
            f"first_layers={num_layers}: must be from 1 to {len(layers) - 1}; the target has {len(layers)} layers"
        )
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = num_layers
    inner = _view(inner, config, layers=nn.ModuleList(layers[:num_layers]))
    return _view(model, config, model=inner)


def _view(module: nn.Module, config: PreTrainedConfig, **submodules: nn.Module) -> Any:
    """Returns a module that shares everything with another one except its configuration and the given submodules."""
    view: Any = copy.copy(module)
    view._modules = {**module._modules, **submodules}
    view.config = config
    return view
