"""The rows of a batch while they are generated: their tokens, and where each of them ends."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..errors import InputError, one_line


# What a row draws a number for, for each of its new tokens.
DRAFTING, ACCEPTING, CHOOSING = range(3)


class RowPlan(NamedTuple):
    """What a row brings along where it shares passes with rows of other calls.

    Attributes:
        key (`int`): its name among the finished ones.
        max_new_tokens (`int`): at most so many.
        draws (`torch.Tensor`, *optional*): `[3, max_new_tokens]` numbers in [0, 1), drawn beforehand: what the row gets
            depends neither on the rows beside it nor on how many tokens are drafted at a time for them.
    """

    key: int
    max_new_tokens: int
    draws: torch.Tensor | None = None


@dataclasses.dataclass
class _Row:
    """One row: its plan, and what `generate` would know of it."""

    plan: RowPlan
    padding: torch.Tensor  # on the left of its prompt, as it was given
    prompt: int  # tokens
    length: int  # tokens, the prompt's among them
    place: int  # among the prompts that it was given with
    num_prompts: int
    criteria: list[StoppingCriteria]

    @property
    def new_tokens(self) -> int:
        return self.length - self.prompt


class Rows:
    """Token buffers without padding, which finished rows leave and others join.

    Args:
        input_ids (`torch.Tensor`): `[rows, prompt]`, padded on the left.
        attention_mask (`torch.Tensor`, *optional*): `[rows, prompt]`, zero at padding.
        stopping_criteria (`StoppingCriteriaList`): as `generate` prepares them; each is asked after every new token of a row.
            It sees what it would if all rows were this one, `[rows, prompt + new]` with padding, and no scores.
        context (`int`): tokens that the models can read.
        plans (`Sequence[RowPlan]`, *optional*): by default rows are numbered, and all are as long as the criteria let them be.

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
        for row, padding in enumerate(paddings):
            if width - padding >= context:
                raise InputError(
                    f"prompt {row}: its {width - padding} tokens leave no room in the context of {context}; shorten it"
                )
        limits = [c.max_length for c in stopping_criteria if isinstance(c, MaxLengthCriteria)]
        if not limits:
            raise InputError("max_new_tokens: is not given, and nothing else ends the output surely; give it")
        self.eos = {
            token for c in stopping_criteria if isinstance(c, EosTokenCriteria) for token in c.eos_token_id.tolist()
        }
        self.may_end_early = len(stopping_criteria) > len(limits)
        others = [c for c in stopping_criteria if not isinstance(c, (MaxLengthCriteria, EosTokenCriteria))]
        plans = plans or [RowPlan(row, min(limits) - width) for row in range(len(paddings))]
        self._rows = [
            _Row(
                plan,
                input_ids[row, :padding],
                width - padding,
                width - padding,
                row,
                len(paddings),
                list(map(_own, others)),
            )
            for row, (plan, padding) in enumerate(zip(plans, paddings, strict=True))
        ]
        self.tokens = input_ids.new_zeros(len(self._rows), max(self.lengths) + 64)  # [rows, slots]
        for row, padding in enumerate(paddings):
            self.tokens[row, : width - padding] = input_ids[row, padding:]
        self.finished: dict[int, torch.Tensor] = {}  # key -> new tokens of the row

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def keys(self) -> list[int]:
        """Name of each row."""
        return [row.plan.key for row in self._rows]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [row.length for row in self._rows]

    @property
    def remaining(self) -> list[int]:
        """Tokens that each row can still get."""
        return [row.plan.max_new_tokens - row.new_tokens for row in self._rows]

    @property
    def limits(self) -> list[int]:
        """Tokens that each row can have in the end."""
        return [row.prompt + row.plan.max_new_tokens for row in self._rows]

    @property
    def paddings(self) -> list[int]:
        """Padding tokens that each prompt was given with."""
        return [len(row.padding) for row in self._rows]

    def last_tokens(self, num_tokens: int, extra: torch.Tensor | None = None) -> torch.Tensor:
        """The last tokens of each row, followed by the drafted ones: `[rows, num_tokens + width]`; zeros on the left."""
        ends = torch.tensor(self.lengths, device=self.tokens.device)[:, None]
        slots = ends + torch.arange(-num_tokens, 0, device=self.tokens.device)
        last = self.tokens.gather(1, slots.clamp(min=0)) * (slots >= 0)
        return last if extra is None else torch.cat([last, extra], dim=1)

    def uniform(self, purpose: int, num_tokens: int, offset: int = 0) -> torch.Tensor:
        """Numbers in [0, 1) to draw the next tokens with, from the one `offset` behind each row's end on.

        Where rows have draws of their own, those of a token do not depend on when it is drawn, and of what was rejected
        nothing is left in the output: each output still has its probability.

        Returns:
            `[rows, num_tokens]`, in fp64 where the device has it; behind a row's last token they have no meaning.
        """
        dtype = torch.float32 if self.tokens.device.type == "mps" else torch.float64
        if self._rows[0].plan.draws is None:
            return torch.rand(len(self), num_tokens, dtype=dtype, device=self.tokens.device)
        numbers = torch.zeros(len(self), num_tokens, dtype=dtype)
        for row, own in zip(numbers, self._rows, strict=True):
            drawn = own.plan.draws[purpose, own.new_tokens + offset :][:num_tokens]
            row[: len(drawn)] = drawn
        return numbers.to(self.tokens.device)

    def put(self, tokens: torch.Tensor, offset: int = 0) -> None:
        """Writes drafted tokens `[rows, width]` behind each row's end, where nothing counts them yet."""
        width = tokens.shape[1]
        if (missing := max(self.lengths) + offset + width - self.tokens.shape[1]) > 0:
            self.tokens = torch.nn.functional.pad(self.tokens, (0, missing + 64))
        starts = torch.tensor(self.lengths, device=self.tokens.device)[:, None] + offset
        self.tokens.scatter_(1, starts + torch.arange(width, device=self.tokens.device), tokens)

    def append(self, tokens: torch.Tensor, counts: Sequence[int]) -> tuple[list[list[int]], list[int]]:
        """Appends the first `counts[row]` of `[rows, width]` to each row, cut where the row ends.

        Returns:
            What was appended to each row, and the indices of the rows that go on.
        """
        self.put(tokens)
        appended, going_on = [], []
        for row, (new, count, remaining) in enumerate(zip(tokens.tolist(), counts, self.remaining, strict=True)):
            taken, ends = self._until_end(row, new[: min(count, remaining)])
            self._rows[row].length += taken
            appended.append(new[:taken])
            if not ends and taken < remaining:
                going_on.append(row)
        return appended, going_on

    def _until_end(self, row: int, new: list[int]) -> tuple[int, bool]:
        """How many of the new tokens stand, and whether the last of these ends the row."""
        for taken, token in enumerate(new, start=1):
            if token in self.eos or (self._rows[row].criteria and self._is_stopped(row, taken)):
                return taken, True
        return len(new), False

    def _is_stopped(self, row: int, taken: int) -> bool:
        """Whether a criterion ends a row with so many new tokens."""
        own = self._rows[row]
        padded = torch.cat([own.padding, self.tokens[row, : own.length + taken]])
        batch = padded.expand(own.num_prompts, -1)
        return any(_ends(criterion, batch, own.place) for criterion in own.criteria)

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps the rows of these indices; the others are finished."""
        for row in set(range(len(self))) - set(rows):
            own = self._rows[row]
            self.finished[own.plan.key] = self.tokens[row, own.prompt : own.length].clone()
        self.tokens = self.tokens[list(rows)]
        self._rows = [self._rows[row] for row in rows]

    def join(self, other: "Rows") -> None:
        """Takes in the rows of another batch that was prepared with the same settings, behind its own."""
        width = max([*self.lengths, *other.lengths], default=0) + 64
        self.tokens = torch.cat([sized(tokens, 1, width) for tokens in (self.tokens, other.tokens)])
        self._rows += other._rows
        self.finished |= other.finished

    def take_finished(self) -> list[tuple[int, torch.Tensor]]:
        """Key and new tokens of the rows that have ended since it was last asked."""
        taken, self.finished = list(self.finished.items()), {}
        return taken

    def sequences(self, input_ids: torch.Tensor, pad_token_id: int) -> torch.Tensor:
        """The prompts as they were given and what was generated, `[rows, prompt + new]`, padded on the right."""
        new = [self.finished[row] for row in range(len(input_ids))]
        output = input_ids.new_full((len(new), input_ids.shape[1] + max(map(len, new))), pad_token_id)
        output[:, : input_ids.shape[1]] = input_ids
        for row, tokens in enumerate(new):
            output[row, input_ids.shape[1] :][: len(tokens)] = tokens
        return output


def sized(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """Cut off or filled up with zeros at the end of a dimension."""
    if tensor.shape[dim] >= size:
        return tensor.narrow(dim, 0, size)
    filling = list(tensor.shape)
    filling[dim] = size - tensor.shape[dim]
    return torch.cat([tensor, tensor.new_zeros(filling)], dim=dim)


def _own(criterion: StoppingCriteria) -> StoppingCriteria:
    """A criterion for one row: somebody else's may count rows or tokens in itself, the library's do not."""
    is_stateless = type(criterion).__module__ == StoppingCriteria.__module__
    return criterion if is_stateless else copy.deepcopy(criterion)


def _ends(criterion: StoppingCriteria, batch: torch.Tensor, row: int) -> bool:
    try:
        ended = criterion(batch, None)
    except Exception as error:
        raise InputError(
            f"stopping criterion {type(criterion).__name__}: failed on tokens without scores ({one_line(error)}), "
            "which is what it sees while a draft helps; generate without a draft"
        ) from error
    return bool(ended[row] if isinstance(ended, torch.Tensor) and ended.dim() else ended)


def _paddings(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[int]:
    """Padding tokens on the left of each row."""
    if attention_mask is None:
        return [0] * input_ids.shape[0]
    mask = attention_mask.long()
    if mask.shape != input_ids.shape or bool((mask.diff(dim=1) < 0).any()):
        raise InputError(
            f"attention_mask of shape {list(mask.shape)} for prompts of {list(input_ids.shape)}: padding must be on the left "
            "and nowhere else; use padding_side='left'"
        )
    lengths = mask.sum(dim=1).tolist()
    if 0 in lengths:
        raise InputError(f"prompt {lengths.index(0)}: is empty; give at least one token, such as begin-of-sequence")
    return [mask.shape[1] - length for length in lengths]
