"""The rows of a batch on the device: their tokens, lengths, limits and random numbers, changed in place.

Nothing here waits for the device or reads from it, so that a step over these tensors can be captured as a graph.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch.nn import functional as F


# The three random numbers that each new token of a row may use.
DRAFTING, ACCEPTING, CHOOSING = range(3)


@dataclasses.dataclass
class RowState:
    """Tensors of all rows; each row begins at slot 0 of its part of `tokens`.

    Attributes:
        tokens (`torch.Tensor`): `[rows, slots]`. Drafted tokens follow a row's end.
        ends (`torch.Tensor`): `[rows]`, number of tokens, including the prompt.
        starts (`torch.Tensor`): `[rows]`, number of tokens of the prompt.
        limits (`torch.Tensor`): `[rows]`, maximum number of tokens.
        drafted (`torch.Tensor`): `[rows]`, number of drafted tokens after the end.
        active (`torch.Tensor`): `[rows]`, false for finished rows and for rows that only fill up a batch.
        draws (`torch.Tensor`, *optional*): `[rows, 3, new tokens]` random numbers in [0, 1), for sampling.
        eos (`torch.Tensor`): `[tokens]` that end a row, the same for all rows.
        probabilities (`torch.Tensor`, *optional*): `[rows, drafted, vocab_size]`, the distributions that the drafted
            tokens were sampled from; `None` if they were not sampled.
    """

    tokens: torch.Tensor
    ends: torch.Tensor
    starts: torch.Tensor
    limits: torch.Tensor
    drafted: torch.Tensor
    active: torch.Tensor
    draws: torch.Tensor | None
    eos: torch.Tensor
    probabilities: torch.Tensor | None = None

    @classmethod
    def empty(cls, rows: int, slots: int, draws: torch.Tensor | None, eos: torch.Tensor) -> "RowState":
        """Returns rows that are not active, of two tokens, so that every step can read them."""
        zeros = eos.new_zeros(rows)
        two = torch.full_like(zeros, 2)
        return cls(eos.new_zeros(rows, slots), two, two.clone(), two.clone(), zeros, zeros.bool(), draws, eos)

    def slots(self, num_tokens: int, offset: int = 0) -> torch.Tensor:
        """Returns the slots `[rows, num_tokens]` up to `offset` tokens after each row's end; may be negative."""
        ends = self.ends[:, None]
        if num_tokens == 1:
            return ends if offset == 1 else ends + (offset - 1)
        return ends + torch.arange(offset - num_tokens, offset, device=self.ends.device)

    def read(self, slots: torch.Tensor) -> torch.Tensor:
        """Returns the tokens at slots `[rows, num_tokens]`; token 0 at negative ones."""
        return self.tokens.gather(1, slots.clamp(min=0)) * (slots >= 0)

    def drafted_tokens(self, width: int) -> torch.Tensor:
        """Returns the tokens after each row's end, `[rows, width]`."""
        return self.tokens.gather(1, self.slots(width, width))

    def uniform(self, purpose: int, num_tokens: int, offset: int = 0) -> torch.Tensor:
        """Returns random numbers in [0, 1) for the next tokens, starting `offset` tokens after each row's end.

        The number depends on the row and the position of a token only, not on the round or the batch. A rejected
        token's number is used again when its position is drafted again. Each output keeps its probability: every
        purpose has its own numbers, and a rejected token leaves no trace in the output.

        Returns:
            `[rows, num_tokens]`; unused after a row's last token.
        """
        assert self.draws is not None
        places = self.slots(num_tokens, offset + num_tokens) - self.starts[:, None]
        return self.draws[:, purpose].gather(1, places.clamp(0, self.draws.shape[2] - 1))

    def put(self, tokens: torch.Tensor, offset: int = 0) -> None:
        """Writes tokens `[rows, width]` after each row's end, without changing the lengths."""
        self.tokens.scatter_(1, self.slots(tokens.shape[1], offset + tokens.shape[1]), tokens)

    def plan_draft(self, width: int, context: int) -> None:
        """Sets the numbers of drafted tokens: at most `width`, and as many as the draft can read.

        A round also adds a token of the target's own, so that drafting the last token of a row would be wasted.
        """
        room = (self.limits - 1).clamp(max=context) - self.ends
        torch.clamp(room, min=0, max=width, out=self.drafted)

    def advance(self, tokens: torch.Tensor, accepted: torch.Tensor) -> torch.Tensor:
        """Appends the first `accepted + 1` of `[rows, width]` tokens to each active row, up to where the row ends.

        A row ends with a token of `eos`, which is appended, or at its limit. It is not active after that.

        Returns:
            The number of appended tokens, `[rows]`.
        """
        width = tokens.shape[1]
        is_end = (tokens[..., None] == self.eos).any(dim=-1)
        self.put(tokens)
        if width == 1:  # without drafted tokens, an active row has room for one
            counts, is_end = self.active.long(), is_end[:, 0]
        else:
            places = torch.arange(width, device=tokens.device)
            first_end = torch.where(is_end, places, width).amin(dim=1)  # `width` if there is none
            counts = (accepted.minimum(first_end) + 1).minimum(self.limits - self.ends) * self.active
            is_end = first_end < counts
        self.ends.add_(counts)
        self.active.logical_and_((self.ends < self.limits) & ~is_end)
        return counts

    def window(self, rows: int) -> "RowState":
        """Returns a view of the first rows."""
        return self._each(lambda tensor: tensor[:rows])

    def select(self, rows: torch.Tensor) -> "RowState":
        """Returns a copy of the rows with these indices, without the distributions of drafted tokens."""
        return dataclasses.replace(self, probabilities=None)._each(lambda tensor: tensor[rows])

    def _each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "RowState":
        changed = {
            field.name: function(tensor)
            for field in dataclasses.fields(self)
            if field.name != "eos" and (tensor := getattr(self, field.name)) is not None
        }
        return dataclasses.replace(self, **changed)

    def snapshot(self) -> dict[str, torch.Tensor]:
        """Returns copies of what a step changes."""
        return {name: getattr(self, name).clone() for name in ("tokens", "ends", "drafted", "active")}

    def restore(self, snapshot: dict[str, torch.Tensor]) -> None:
        """Undoes what was changed since [`snapshot`]."""
        for name, tensor in snapshot.items():
            getattr(self, name).copy_(tensor)

    def copy_rows(self, other: "RowState", start: int = 0) -> None:
        """Overwrites the rows from index `start` with those of another state, which end within the own slots."""
        rows = slice(start, start + len(other.ends))
        for name in ("ends", "starts", "limits", "drafted", "active"):
            getattr(self, name)[rows] = getattr(other, name)
        slots = min(self.tokens.shape[1], other.tokens.shape[1])
        self.tokens[rows, :slots] = other.tokens[:, :slots]
        if other.draws is not None:
            assert self.draws is not None
            self.draws[rows, :, : other.draws.shape[2]] = other.draws

    def move(self, source: int, target: int) -> None:
        """Overwrites a row with another one."""
        self.copy_rows(self._each(lambda tensor: tensor[source : source + 1]), target)

    def concatenated(self, other: "RowState", slots: int) -> "RowState":
        """Returns a copy of the rows of both, with this number of slots."""
        draws = None
        if self.draws is not None and other.draws is not None:
            longest = max(self.draws.shape[2], other.draws.shape[2])
            draws = torch.cat([F.pad(own, (0, longest - own.shape[2])) for own in (self.draws, other.draws)])
        joined = {
            name: torch.cat([getattr(self, name), getattr(other, name)])
            for name in ("ends", "starts", "limits", "drafted", "active")
        }
        tokens = torch.cat([F.pad(each.tokens, (0, slots - each.tokens.shape[1])) for each in (self, other)])
        return RowState(tokens=tokens, draws=draws, eos=self.eos, **joined)
