"""What each new token was chosen by: `output_scores` and `output_logits` for rows of different lengths."""

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence


class TokenScores:
    """Collects the target's scores and logits of the tokens that rows get.

    Args:
        names (`Sequence[str]`): what is collected, of `"scores"` (after the processors) and `"logits"` (before them).
        num_rows (`int`): of the generation; rows are named by their numbers.
    """

    def __init__(self, names: Sequence[str] = (), num_rows: int = 0):
        self._collected = {name: [[] for _ in range(num_rows)] for name in names}

    def add(self, rows: Sequence[int], counts: Sequence[int], **values: torch.Tensor) -> None:
        """Keeps the first `counts[row]` positions of `[rows, positions, vocab_size]`, for each name that is collected."""
        for name, collected in self._collected.items():
            for row, count, of_row in zip(rows, counts, values[name], strict=True):
                collected[row].append(of_row[:count].clone())

    def by_token(self) -> dict[str, tuple[torch.Tensor, ...]]:
        """For each name a tensor `[rows, vocab_size]` per new token, as `generate` returns them; zero where a row has ended."""
        return {
            name: tuple(pad_sequence([torch.cat(of_row) for of_row in collected]))
            for name, collected in self._collected.items()
        }
