"""The rows of a batch during generation: their tokens, their lengths and their stopping criteria."""

import copy
import dataclasses
from collections.abc import Sequence
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


# The three random numbers that each new token of a row may use.
DRAFTING, ACCEPTING, CHOOSING = range(3)


class RowPlan(NamedTuple):
    """Per-request settings of a row.

    Attributes:
        key (`int`): identifies the row's output.
        max_new_tokens (`int`): maximum number of new tokens.
        draws (`torch.Tensor`, *optional*): `[3, max_new_tokens]` random numbers in [0, 1). Since they are drawn in
            advance, the row's output depends neither on the other rows nor on how many tokens are drafted at a time.
    """

    key: int
    max_new_tokens: int
    draws: torch.Tensor | None = None


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


class Rows:
    """The tokens of all rows, each from slot 0 of its buffer. Finished rows are removed and others can join.

    Args:
        input_ids (`torch.Tensor`): `[rows, prompt]`, padded on the left.
        attention_mask (`torch.Tensor`, *optional*): `[rows, prompt]`, zero at padding.
        stopping_criteria (`StoppingCriteriaList`): as `generate` prepares them; called after every new token of a row.
            They are given copies of that row in place of all rows, `[rows, prompt + new]` with padding, and no scores.
        context (`int`): maximum number of tokens that the target can read.
        plans (`Sequence[RowPlan]`, *optional*): by default the keys are the row indices, and the criteria limit the
            length.

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
    ):
        paddings, width = _paddings(input_ids, attention_mask), input_ids.shape[1]
        limits = [c.max_length for c in stopping_criteria if isinstance(c, MaxLengthCriteria)]
        if not limits:
            raise InputError("max_new_tokens: is missing, and no other setting limits the output. Give max_new_tokens")
        self.eos = {
            token for c in stopping_criteria if isinstance(c, EosTokenCriteria) for token in c.eos_token_id.tolist()
        }
        self.may_end_early = len(stopping_criteria) > len(limits)
        others = [c for c in stopping_criteria if not isinstance(c, (MaxLengthCriteria, EosTokenCriteria))]
        plans = plans or [RowPlan(row, min(limits) - width) for row in range(len(paddings))]
        self._rows: list[_Row] = []
        self.tokens = input_ids.new_zeros(len(paddings), width - min(paddings) + 64)  # [rows, slots]
        for row, (plan, padding) in enumerate(zip(plans, paddings, strict=True)):
            length = width - padding
            if length >= context:
                raise InputError(
                    f"prompt {row}: its {length} tokens leave no room in the context of {context}. Shorten it"
                )
            # Criteria of users may keep state, so each row has its own. Those of transformers have none.
            criteria = [c if type(c).__module__ == StoppingCriteria.__module__ else copy.deepcopy(c) for c in others]
            limit = length + plan.max_new_tokens
            filling = input_ids[row, :padding]
            self._rows.append(_Row(plan, filling, length, length, limit, row, len(paddings), criteria))
            self.tokens[row, :length] = input_ids[row, padding:]
        self.finished: dict[int, torch.Tensor] = {}  # key -> new tokens of the row

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
    def paddings(self) -> list[int]:
        """Number of padding tokens of each prompt, as it was given."""
        return [len(row.padding) for row in self._rows]

    def last_tokens(self, num_tokens: int, extra: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the last tokens of each row and `extra`: `[rows, num_tokens + width]`, zeros on the left."""
        ends = torch.tensor(self.lengths, device=self.tokens.device)[:, None]
        slots = ends + torch.arange(-num_tokens, 0, device=self.tokens.device)
        last = self.tokens.gather(1, slots.clamp(min=0)) * (slots >= 0)
        return last if extra is None else torch.cat([last, extra], dim=1)

    def uniform(self, purpose: int, num_tokens: int, offset: int = 0) -> torch.Tensor:
        """Returns random numbers in [0, 1) for the next tokens, starting `offset` tokens after each row's end.

        With `RowPlan.draws`, the number depends on the position of a token only, not on the round. A rejected
        token's number is used again when its position is drafted again. Each output keeps its probability: every
        purpose has its own numbers, and a rejected token leaves no trace in the output.

        Returns:
            `[rows, num_tokens]`, in fp64 if the device has it; unused after a row's last token.
        """
        dtype = torch.float32 if self.tokens.device.type == "mps" else torch.float64
        if self._rows[0].plan.draws is None:
            return torch.rand(len(self), num_tokens, dtype=dtype, device=self.tokens.device)
        numbers = torch.zeros(len(self), num_tokens, dtype=dtype)
        for row, own in zip(numbers, self._rows, strict=True):
            assert own.plan.draws is not None  # all rows of a batch have them, or none has
            drawn = own.plan.draws[purpose, own.length - own.prompt + offset :][:num_tokens]
            row[: len(drawn)] = drawn
        return numbers.to(self.tokens.device)

    def put(self, tokens: torch.Tensor, offset: int = 0) -> None:
        """Writes drafted tokens `[rows, width]` after each row's end, without changing the lengths."""
        width = tokens.shape[1]
        if (missing := max(self.lengths) + offset + width - self.tokens.shape[1]) > 0:
            self.tokens = F.pad(self.tokens, (0, missing + 64))
        starts = torch.tensor(self.lengths, device=self.tokens.device)[:, None] + offset
        self.tokens.scatter_(1, starts + torch.arange(width, device=self.tokens.device), tokens)

    def append(self, tokens: torch.Tensor, counts: Sequence[int]) -> tuple[list[list[int]], list[int]]:
        """Appends the first `counts[row]` tokens of `[rows, width]` to each row, up to where the row ends.

        Returns:
            The tokens that were appended to each row, and the indices of the unfinished rows.
        """
        self.put(tokens)
        appended: list[list[int]] = []
        unfinished: list[int] = []
        for row, (own, new, count) in enumerate(zip(self._rows, tokens.tolist(), counts, strict=True)):
            new = new[: min(count, own.limit - own.length)]
            end = next(
                (n for n, token in enumerate(new, start=1) if token in self.eos or self._is_stopped(row, n)), None
            )
            appended.append(new[:end])
            own.length += len(appended[row])
            if end is None and own.length < own.limit:
                unfinished.append(row)
        return appended, unfinished

    def _is_stopped(self, row: int, taken: int) -> bool:
        """Returns whether a criterion ends the row after its first `taken` new tokens."""
        own = self._rows[row]
        for criterion in own.criteria:
            padded = torch.cat([own.padding, self.tokens[row, : own.length + taken]])
            try:
                ended = criterion(padded.expand(own.num_prompts, -1), None)
            except Exception as error:
                raise InputError(
                    f"stopping criterion {type(criterion).__name__}: failed on tokens without scores "
                    f"({one_line(error)}). Scores are not available with a draft. Generate without a draft"
                ) from error
            if ended[own.place] if isinstance(ended, torch.Tensor) and ended.dim() else ended:
                return True
        return False

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps the rows with these indices; the others are finished."""
        for row in set(range(len(self))) - set(rows):
            own = self._rows[row]
            self.finished[own.plan.key] = self.tokens[row, own.prompt : own.length].clone()
        self.tokens = self.tokens[list(rows)]
        self._rows = [self._rows[row] for row in rows]

    def join(self, other: "Rows") -> None:
        """Adds the rows of another batch that was prepared with the same settings, after the own ones."""
        width = max([*self.lengths, *other.lengths], default=0) + 64
        self.tokens = torch.cat([F.pad(rows.tokens, (0, width - rows.tokens.shape[1])) for rows in (self, other)])
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
