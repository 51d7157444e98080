"""The rows of a batch during generation, on the host: their lengths, limits and stopping criteria.

The tokens are on the device, see `row_state.py`.
"""

import copy
import dataclasses
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..errors import InputError, one_line
from .row_state import RowState


_SPARE = 64  # slots after the longest row, when buffers grow


class RowPlan(NamedTuple):
    """Per-request settings of a row.

    Attributes:
        key (`int`): identifies the row's output.
        max_new_tokens (`int`): maximum number of new tokens.
        draws (`torch.Tensor`, *optional*): `[3, max_new_tokens]` random numbers in [0, 1), for sampling; by default
            they are drawn from torch's generator. Since they are drawn in advance, the row's output does not depend on
            the other rows.
        draft_length (`int`, *optional*): number of tokens to draft in each round, for all rows of its batch, in place
            of a number that depends on measured times.
        is_drafted (`bool`): whether tokens are drafted for the row; other rows of its batch are not affected.
    """

    key: int
    max_new_tokens: int
    draws: torch.Tensor | None = None
    draft_length: int | None = None
    is_drafted: bool = True


class Bucket(NamedTuple):
    """A fixed shape that holds all rows: the number of rows, and of the slots that attention reads."""

    rows: int
    slots: int


@dataclasses.dataclass
class _Row:
    """One row, with the prompt batch that it came from."""

    plan: RowPlan
    padding: torch.Tensor  # the padding tokens on the left of its prompt
    prompt: int  # tokens of the prompt
    length: int  # tokens, including the prompt
    limit: int  # maximum length
    place: int  # index in its prompt batch
    num_prompts: int  # of its prompt batch
    criteria: list[StoppingCriteria]
    is_finished: bool = False


class Rows:
    """All rows, each from slot 0 of its buffer. Finished rows are removed and others can join.

    Args:
        input_ids (`torch.Tensor`): `[rows, prompt]`, padded on the left.
        attention_mask (`torch.Tensor`, *optional*): `[rows, prompt]`, zero at padding.
        stopping_criteria (`StoppingCriteriaList`): as `generate` prepares them; called after every new token of a row.
            They are given copies of that row in place of all rows, `[rows, prompt + new]` with padding, and no scores.
        context (`int`): maximum number of tokens that the target can read.
        plans (`Sequence[RowPlan]`, *optional*): by default the keys are the row indices, and the criteria limit the
            length.
        do_sample (`bool`, *optional*, defaults to `False`): whether rows need random numbers.

    Attributes:
        state (`RowState`): the rows on the device, in the same order. With a bucket, rows that are not active follow.
        bucket (`Bucket`, *optional*): fixed shape of the steps of a round; by default they fit the rows exactly.

    Raises:
        InputError: if the padding is not on the left, a row is empty, or a prompt fills the context.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        stopping_criteria: StoppingCriteriaList,
        context: int,
        plans: Sequence[RowPlan] | None = None,
        do_sample: bool = False,
    ):
        paddings, width = _paddings(input_ids, attention_mask), input_ids.shape[1]
        limits = [c.max_length for c in stopping_criteria if isinstance(c, MaxLengthCriteria)]
        if not limits:
            raise InputError("max_new_tokens: is missing, and no other setting limits the output. Give max_new_tokens")
        eos = [c.eos_token_id.flatten() for c in stopping_criteria if isinstance(c, EosTokenCriteria)]
        self.may_end_early = len(stopping_criteria) > len(limits)
        others = [c for c in stopping_criteria if not isinstance(c, (MaxLengthCriteria, EosTokenCriteria))]
        plans = plans or [RowPlan(row, min(limits) - width) for row in range(len(paddings))]
        self._rows: list[_Row] = []
        for row, (plan, padding) in enumerate(zip(plans, paddings, strict=True)):
            length = width - padding
            if length >= context:
                raise InputError(
                    f"prompt {row}: its {length} tokens leave no room in the context of {context}. Shorten it"
                )
            # Criteria of users may keep state, so each of several rows has its own. Those of transformers have none.
            criteria = [
                c if len(paddings) == 1 or type(c).__module__ == StoppingCriteria.__module__ else copy.deepcopy(c)
                for c in others
            ]
            limit = length + plan.max_new_tokens
            filling = input_ids[row, :padding]
            self._rows.append(_Row(plan, filling, length, length, limit, row, len(paddings), criteria))
        draws = _draws(plans, input_ids.device) if do_sample else None
        no_eos = input_ids.new_empty(0)
        self.state = RowState.empty(
            len(paddings), width - min(paddings) + _SPARE, draws, torch.cat([no_eos, *eos]).to(no_eos)
        )
        for row, padding in enumerate(paddings):
            self.state.tokens[row, : width - padding] = input_ids[row, padding:]
        for name, values in (("ends", self.lengths), ("starts", self.lengths), ("limits", self.limits)):
            getattr(self.state, name).copy_(torch.tensor(values))
        self.state.active.fill_(True)
        self.finished: dict[int, torch.Tensor] = {}  # key -> new tokens of the row
        self.bucket: Bucket | None = None
        self._fixed: RowState | None = None  # all rows of buffers of fixed size, of which `state` is a window

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def keys(self) -> list[int]:
        """Key of each row."""
        return [row.plan.key for row in self._rows]

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each row, including its prompt."""
        return [row.length for row in self._rows]

    @property
    def remaining(self) -> list[int]:
        """Number of tokens that each row can still get."""
        return [row.limit - row.length for row in self._rows]

    @property
    def limits(self) -> list[int]:
        """Maximum length of each row, including its prompt."""
        return [row.limit for row in self._rows]

    @property
    def draft_length(self) -> int | None:
        """The number of drafted tokens that a row asks for."""
        return next((row.plan.draft_length for row in self._rows if row.plan.draft_length), None)

    @property
    def are_drafted(self) -> list[bool]:
        """Whether tokens are drafted for each row."""
        return [row.plan.is_drafted for row in self._rows]

    @property
    def paddings(self) -> list[int]:
        """Number of padding tokens of each prompt, as it was given."""
        return [len(row.padding) for row in self._rows]

    @property
    def criteria_names(self) -> list[str]:
        """The kinds of stopping criteria that have to be called for the rows, beyond end-of-sequence and length."""
        return sorted({type(criterion).__name__ for row in self._rows for criterion in row.criteria})

    def make_room(self, num_tokens: int) -> None:
        """Prepares a round in which the tokens of each row end at most `num_tokens` after its last one."""
        end = max(self.lengths) + num_tokens
        if self._fixed is not None:
            rows = row_bucket(len(self))
            if self.bucket is not None and rows <= self.bucket.rows < 4 * rows:
                rows = self.bucket.rows  # recording steps for a little fewer rows would take more time than it saves
            self.bucket = Bucket(rows, min(slot_bucket(end), self._fixed.tokens.shape[1]))
            self.state = self._fixed.window(self.bucket.rows)
        elif end > self.state.tokens.shape[1]:
            self.state.tokens = F.pad(self.state.tokens, (0, end - self.state.tokens.shape[1] + _SPARE))

    def probabilities(self, width: int, like: torch.Tensor) -> torch.Tensor:
        """Returns room for the distributions of drafted tokens, `[rows, width or more, vocab_size]`."""
        room = self.state.probabilities
        if room is None or (self._fixed is None and room.shape[1] != width):
            room = self.state.probabilities = like.new_empty(like.shape[0], width, like.shape[-1])
        return room

    def move_to(self, fixed: RowState) -> None:
        """Moves the rows into buffers of fixed size."""
        fixed.copy_rows(self.state.window(len(self)))
        fixed.active[len(self) :] = False
        fixed.eos.fill_(-1)
        fixed.eos[: len(self.state.eos)] = self.state.eos
        self._fixed = fixed

    def record(self, tokens: Sequence[Sequence[int]], counts: Sequence[int], active: Sequence[int]) -> list[list[int]]:
        """Records what [`RowState.advance`] has done, up to where a stopping criterion ends a row.

        Args:
            tokens (`Sequence`): `[rows, width]`.
            counts (`Sequence`): number of tokens that were appended to each row.
            active (`Sequence`): whether each row is still active.

        Returns:
            The new tokens of each row.
        """
        appended = []
        for row, (own, new, count) in enumerate(zip(self._rows, tokens, counts, strict=True)):
            end = next((n for n in range(1, count + 1) if self._is_stopped(row, n)), None) if own.criteria else None
            appended.append(list(new[: count if end is None else end]))
            own.length += len(appended[row])
            own.is_finished = end is not None or not active[row]
        return appended

    def cancel(self, keys: Collection[int]) -> None:
        """Ends the rows with these keys."""
        for row in self._rows:
            row.is_finished |= row.plan.key in keys

    def has_finished(self) -> bool:
        """Whether a row has finished and was not removed yet."""
        return any(row.is_finished for row in self._rows)

    def unfinished(self) -> list[int]:
        """Returns the indices of the unfinished rows, with the last ones in the places of finished ones.

        Few rows have to be moved in this order.
        """
        found = [index for index, row in enumerate(self._rows) if not row.is_finished]
        last = [index for index in found if index >= len(found)]
        return [last.pop() if self._rows[index].is_finished else index for index in range(len(found))]

    def _is_stopped(self, row: int, taken: int) -> bool:
        """Returns whether a criterion ends the row after its first `taken` new tokens."""
        own = self._rows[row]
        for criterion in own.criteria:
            padded = torch.cat([own.padding, self.state.tokens[row, : own.length + taken]])
            try:
                ended = criterion(padded.expand(own.num_prompts, -1), None)
            except (AttributeError, IndexError, TypeError) as error:  # of `None` in place of scores
                raise InputError(
                    f"stopping criterion {type(criterion).__name__}: failed on tokens without scores "
                    f"({one_line(error)}). Scores are not available with a draft. Generate without a draft"
                ) from error
            if ended[own.place] if isinstance(ended, torch.Tensor) and ended.dim() else ended:
                return True
        return False

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps the rows with these indices, in this order; the others are finished."""
        for row in set(range(len(self))) - set(rows):
            own = self._rows[row]
            self.finished[own.plan.key] = self.state.tokens[row, own.prompt : own.length].clone()
        if self._fixed is None:
            self.state = self.state.select(torch.tensor(rows, dtype=torch.long, device=self.state.ends.device))
        else:
            for target, source in enumerate(rows):
                if source != target:
                    self._fixed.move(source, target)
            self._fixed.active[len(rows) :] = False
        self._rows = [self._rows[row] for row in rows]

    def join(self, other: "Rows") -> None:
        """Adds the rows of another batch that was prepared with the same settings, after the own ones.

        Rows in buffers of fixed size need room in them.
        """
        if self._fixed is None:
            slots = max([*self.lengths, *other.lengths], default=0) + _SPARE
            self.state = self.state.concatenated(other.state, slots)
        else:
            self._fixed.copy_rows(other.state, len(self))
        self._rows += other._rows
        self.finished |= other.finished

    def take_finished(self) -> list[tuple[int, torch.Tensor]]:
        """Returns key and new tokens of the rows that finished since the last call."""
        taken, self.finished = list(self.finished.items()), {}
        return taken

    def sequences(self, input_ids: torch.Tensor, pad_token_id: int) -> torch.Tensor:
        """Returns left-padded prompts and new tokens, `[rows, prompt + new]`, padded on the right."""
        new = [self.finished[row] for row in range(len(input_ids))]
        return torch.cat([input_ids, pad_sequence(new, batch_first=True, padding_value=pad_token_id)], dim=1)


def _paddings(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[int]:
    """Number of padding tokens on the left of each row."""
    if attention_mask is None:
        return [0] * input_ids.shape[0]
    mask = attention_mask.long()
    if mask.shape != input_ids.shape or bool((mask.diff(dim=1) < 0).any()):
        raise InputError(
            f"attention_mask of shape {list(mask.shape)} for prompts of shape {list(input_ids.shape)}: "
            "padding must be on the left only. Use padding_side='left'"
        )
    lengths = mask.sum(dim=1).tolist()
    if 0 in lengths:
        raise InputError(f"prompt {lengths.index(0)}: is empty. Give at least one token, such as begin-of-sequence")
    return [mask.shape[1] - length for length in lengths]


def _draws(plans: Sequence[RowPlan], device: torch.device) -> torch.Tensor:
    """Returns the random numbers of all rows, `[rows, 3, new tokens]`, in fp64 if the device has it."""
    drawn = [
        # The numbers of a token follow those of the token before, whatever the maximum length is.
        torch.rand(plan.max_new_tokens, 3, dtype=torch.float64).T if plan.draws is None else plan.draws
        for plan in plans
    ]
    longest = max(numbers.shape[1] for numbers in drawn)
    together = torch.stack([F.pad(numbers, (0, longest - numbers.shape[1])) for numbers in drawn])
    return together.to(device, torch.float32 if device.type == "mps" else torch.float64)


def row_bucket(rows: int) -> int:
    """Returns the number of rows of the smallest bucket: a power of two, from 128 on a multiple of 64."""
    return 1 << (rows - 1).bit_length() if rows <= 128 else -(-rows // 64) * 64


def slots_of(limit: int, context: int, longest_draft: int) -> int:
    """Returns the number of slots that caches of fixed size have per row.

    Args:
        limit (`int`): tokens of the longest row.
        context (`int`): of the model; no bucket is much larger, unless a row is.
        longest_draft (`int`): maximum number of drafted tokens, which may exceed the limit.
    """
    most = max(limit, context) + longest_draft + 1
    return min(slot_bucket(limit + longest_draft + 1), -(-most // 64) * 64)


def slot_bucket(end: int) -> int:
    """Returns the number of slots of the smallest bucket: 128, 256, 384, 512, 768, 1024, 1536 and so on."""
    size = 128
    while size < end:
        size = size * 4 // 3 if size % 3 == 0 else size * 3 // 2 if size > 128 else 256
    return size
