"""The rows of a batch while they are generated: their tokens, and where each of them ends."""

import copy
from collections.abc import Sequence

import torch
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..errors import InputError


class Rows:
    """Token buffers without padding, from which finished rows leave.

    Args:
        input_ids (`torch.Tensor`): `[rows, prompt]`, padded on the left.
        attention_mask (`torch.Tensor`, *optional*): `[rows, prompt]`, zero at padding.
        stopping_criteria (`StoppingCriteriaList`): as `generate` prepares them; each is asked after every new token of a row.
            It sees what it would if all rows were this one, `[rows, prompt + new]` with padding, and no scores.
        context (`int`): tokens that the models can read.

    Raises:
        InputError: if the padding is not on the left, a row is empty, or a prompt fills the context.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        stopping_criteria: StoppingCriteriaList,
        context: int,
    ):
        self.paddings = _paddings(input_ids, attention_mask)
        prompt = input_ids.shape[1]
        self.lengths = [prompt - padding for padding in self.paddings]
        for row, length in enumerate(self.lengths):
            if length >= context:
                raise InputError(
                    f"prompt {row}: its {length} tokens leave no room in the context of {context}; shorten it"
                )
        limits = [c.max_length for c in stopping_criteria if isinstance(c, MaxLengthCriteria)]
        if not limits:
            raise InputError("max_new_tokens: is not given, and nothing else ends the output surely; give it")
        self.remaining = [min(limits) - prompt] * len(self.lengths)
        self.eos = {
            token for c in stopping_criteria if isinstance(c, EosTokenCriteria) for token in c.eos_token_id.tolist()
        }
        self.may_end_early = len(stopping_criteria) > len(limits)
        others = [c for c in stopping_criteria if not isinstance(c, (MaxLengthCriteria, EosTokenCriteria))]
        self._criteria = [[_own(criterion) for criterion in others] for _ in self.lengths]
        self._prompts = input_ids
        self.tokens = input_ids.new_zeros(len(self.lengths), max(self.lengths) + 64)  # [rows, slots]
        for row, padding in enumerate(self.paddings):
            self.tokens[row, : prompt - padding] = input_ids[row, padding:]
        self.numbers = list(range(len(self.lengths)))  # of the rows in the batch that are still being generated
        self.finished: dict[int, torch.Tensor] = {}  # number -> all tokens of the row

    def last_tokens(self, num_tokens: int, extra: torch.Tensor | None = None) -> torch.Tensor:
        """The last tokens of each row, followed by the drafted ones: `[rows, num_tokens + width]`; zeros on the left."""
        ends = torch.tensor(self.lengths, device=self.tokens.device)[:, None]
        slots = ends + torch.arange(-num_tokens, 0, device=self.tokens.device)
        last = self.tokens.gather(1, slots.clamp(min=0)) * (slots >= 0)
        return last if extra is None else torch.cat([last, extra], dim=1)

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
        for row, (new, count) in enumerate(zip(tokens.tolist(), counts, strict=True)):
            taken, ends = self._until_end(row, new[: min(count, self.remaining[row])])
            self.lengths[row] += taken
            self.remaining[row] -= taken
            appended.append(new[:taken])
            if not ends and self.remaining[row]:
                going_on.append(row)
        return appended, going_on

    def _until_end(self, row: int, new: list[int]) -> tuple[int, bool]:
        """How many of the new tokens stand, and whether the last of these ends the row."""
        for taken, token in enumerate(new, start=1):
            if token in self.eos or (self._criteria[0] and self._is_stopped(row, taken)):
                return taken, True
        return len(new), False

    def _is_stopped(self, row: int, taken: int) -> bool:
        """Whether a criterion ends a row with so many new tokens."""
        number = self.numbers[row]
        padding = self._prompts[number, : self.paddings[number]]
        padded = torch.cat([padding, self.tokens[row, : self.lengths[row] + taken]])
        batch = padded.expand(len(self.paddings), -1)
        return any(_ends(criterion, batch, number) for criterion in self._criteria[number])

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps the rows of these indices; the others are finished."""
        for row in set(range(len(self.lengths))) - set(rows):
            self.finished[self.numbers[row]] = self.tokens[row, : self.lengths[row]].clone()
        self.tokens = self.tokens[list(rows)]
        self.lengths = [self.lengths[row] for row in rows]
        self.remaining = [self.remaining[row] for row in rows]
        self.numbers = [self.numbers[row] for row in rows]

    def sequences(self, input_ids: torch.Tensor, pad_token_id: int) -> torch.Tensor:
        """The prompts as they were given and what was generated, `[rows, prompt + new]`, padded on the right."""
        prompt = input_ids.shape[1]
        new = [self.finished[row][prompt - padding :] for row, padding in enumerate(self.paddings)]
        width = max(len(tokens) for tokens in new)
        output = input_ids.new_full((len(new), prompt + width), pad_token_id)
        output[:, :prompt] = input_ids
        for row, tokens in enumerate(new):
            output[row, prompt : prompt + len(tokens)] = tokens
        return output


def _own(criterion: StoppingCriteria) -> StoppingCriteria:
    """A criterion for one row: somebody else's may count rows or tokens in itself, the library's do not."""
    is_stateless = type(criterion).__module__ == StoppingCriteria.__module__
    return criterion if is_stateless else copy.deepcopy(criterion)


def _ends(criterion: StoppingCriteria, batch: torch.Tensor, row: int) -> bool:
    try:
        ended = criterion(batch, None)
    except Exception as error:
        raise InputError(
            f"stopping criterion {type(criterion).__name__}: failed on tokens without scores ({type(error).__name__}: {error}), "
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
