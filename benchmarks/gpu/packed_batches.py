"""Batches of conversations, padded and in packed rows, with the lengths of real ones and random tokens."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from tinyllama_hf.finetune.training_order import TrainingOrder, training_steps


LENGTHS_FILE = Path(__file__).with_name("conversation_lengths.json")
SOURCES = ("multi_turn", "short_instructions")


class Conversation(NamedTuple):
    """Tokens of a conversation; labels are -100 where there is no loss."""

    input_ids: torch.Tensor
    labels: torch.Tensor


def real_lengths(longest: int) -> list[list[tuple[int, int]]]:
    """Returns the numbers of tokens and of trained tokens of the conversations of each source."""
    rows = json.loads(LENGTHS_FILE.read_text(encoding="ascii"))
    return [[(tokens, trained) for tokens, trained in rows[name] if tokens <= longest] for name in SOURCES]


def draw_conversations(lengths: Sequence[tuple[int, int]], vocab_size: int) -> list[Conversation]:
    """Returns conversations with random tokens, the same ones for the same arguments."""
    random, conversations = torch.Generator().manual_seed(0), []
    for tokens, trained in lengths:
        ids = torch.randint(3, vocab_size, (tokens,), generator=random)
        labels = ids.clone()
        labels[torch.randperm(tokens, generator=random)[: tokens - trained]] = -100
        conversations.append(Conversation(ids, labels))
    return conversations


def padded_batch(conversations: Sequence[Conversation]) -> dict[str, torch.Tensor]:
    """Returns a batch with one conversation per row, padded to the longest."""
    ids, labels = zip(*conversations, strict=True)
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
    }


def packed_batch(conversations: Sequence[Conversation], multiple: int = 1) -> dict[str, Any]:
    """Returns conversations in one row, as TRL's `DataCollatorForLanguageModeling(padding_free=True)` does.

    Args:
        conversations (`Sequence[Conversation]`): in this order.
        multiple (`int`): TRL's `pad_to_multiple_of`. A padding token is a sequence of its own, without loss.
    """
    ids, labels = (torch.cat(column) for column in zip(*conversations, strict=True))
    positions = torch.cat([torch.arange(len(one.input_ids)) for one in conversations])
    ids, labels, positions = (pad(column[None], (0, -len(column) % multiple)) for column in (ids, labels, positions))
    starts = positions[0] == 0
    labels[0, starts] = -100
    bounds = torch.cat([starts.nonzero().flatten(), torch.tensor([ids.shape[1]])]).to(torch.int32)
    longest = int(bounds.diff().max())
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": positions,
        **{"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds},
        **{"max_length_q": longest, "max_length_k": longest},
    }


@dataclass(frozen=True)
class Variant:
    """How the conversations of a step are put into forward passes.

    Attributes:
        name (`str`): of its row in the results.
        order (`str`): `random`, `sorted` or `packed`; only `packed` has no padding.
        passes (`int`): forward passes per step.
        attention (`str`): attention implementation.
        multiple (`int`): packed rows are padded to a multiple of this.
    """

    name: str
    order: str
    passes: int
    attention: str = "sdpa"
    multiple: int = 1


class Workload:
    """The conversations of each training step, equally many of each source.

    Args:
        sources (`list`): tokens and trained tokens of the conversations of each source.
        per_step (`int`): conversations per step.
        vocab_size (`int`): of the random tokens.
    """

    def __init__(self, sources: Sequence[Sequence[tuple[int, int]]], per_step: int, vocab_size: int):
        lengths = [length for source in sources for length in source]
        self.conversations = draw_conversations(lengths, vocab_size)
        self.lengths = [tokens for tokens, _ in lengths]
        sizes = [len(source) for source in sources]
        self.steps = training_steps(sizes, [min(sizes) / size for size in sizes], 1, per_step, seed=0)

    def tokens(self, step: int) -> int:
        """Returns the number of tokens of a step, without padding."""
        return sum(self.lengths[number] for number in self.steps[step % len(self.steps)])

    def batches(self, variant: Variant, step: int) -> list[dict[str, Any]]:
        """Returns the inputs of each forward pass of a step."""
        numbers = self.steps[step % len(self.steps)]
        if variant.order == "random":
            size = len(numbers) // variant.passes
            rows = [numbers[start : start + size] for start in range(0, len(numbers), size)]
        else:
            rows = TrainingOrder([numbers], self.lengths, variant.passes, variant.order == "packed").rows()
        groups = [[self.conversations[number] for number in row] for row in rows]
        if variant.order == "packed":
            return [packed_batch(group, variant.multiple) for group in groups]
        return [padded_batch(group) for group in groups]
