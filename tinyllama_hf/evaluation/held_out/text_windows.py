"""Overlapping windows over the tokens of documents, sorted in a bounded buffer and batched by number of tokens."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Window(NamedTuple):
    """The tokens of a document that one forward pass reads. The last `num_scored` of them are scored.

    Attributes:
        source (`int`): index of the data set.
        tokens (`np.ndarray`): `[num_inputs + 1]`.
        num_scored (`int`): number of scored tokens.
        num_bytes (`float`): the document's UTF-8 bytes, divided among its windows by their scored tokens.
    """

    source: int
    tokens: np.ndarray
    num_scored: int
    num_bytes: float

    @property
    def num_inputs(self) -> int:
        """Number of tokens that the model reads: all but the last."""
        return len(self.tokens) - 1


def windows(source: int, tokens: np.ndarray, context: int, stride: int, num_bytes: int) -> Iterator[Window]:
    """Splits a document into overlapping windows, so that every token after the first is scored once.

    Args:
        source (`int`): index of the data set.
        tokens (`np.ndarray`): `[num_tokens]`, begin-of-sequence first.
        context (`int`): number of tokens that a forward pass reads.
        stride (`int`): number of scored tokens in each window after the first.
        num_bytes (`int`): UTF-8 bytes of the document.
    """
    done, predicted = 0, len(tokens) - 1
    while done < predicted:
        new = min(context if done == 0 else stride, predicted - done)
        first = max(done + new - context, 0)
        yield Window(source, tokens[first : done + new + 1], new, num_bytes * new / predicted)
        done += new


def sorted_buffers(stream: Iterable[Window], num_tokens: int) -> Iterator[list[Window]]:
    """Yields the windows of a stream in lists of about `num_tokens` tokens, each sorted from long to short.

    Windows of similar length need little padding. The longest come first, so that a batch that does not fit in the
    memory of a GPU fails at once. Reads no more of the stream than the next list needs.
    """
    buffer: list[Window] = []
    held = 0
    for window in stream:
        buffer.append(window)
        held += window.num_inputs
        if held >= num_tokens:
            yield _sorted(buffer)
            buffer, held = [], 0
    if buffer:
        yield _sorted(buffer)


def _sorted(buffer: list[Window]) -> list[Window]:
    return sorted(buffer, key=lambda window: window.num_inputs, reverse=True)


def count_in_batch(ordered: Sequence[Window], num_tokens: int) -> int:
    """Returns how many of the first windows fit in a batch of `num_tokens` tokens with padding; at least one.

    Args:
        ordered (`Sequence[Window]`): windows from long to short, at least one.
        num_tokens (`int`): maximum number of tokens of a batch.
    """
    return min(max(num_tokens // ordered[0].num_inputs, 1), len(ordered))
