"""Pairs of replies as tokens: renders, splits and writes preferences."""

import json
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ..chat.masks import mask_replies, reply_spans
from ..chat.render import Messages, render
from ..errors import InputError
from .conversations import Conversation, TrainingExample, split_conversations
from .preferences import PreferencePair


class RenderedPair(NamedTuple):
    """The tokens of a prompt, up to where a reply starts, and of two replies with their stop tokens.

    The names are those of TRL.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    def examples(self) -> list[TrainingExample]:
        """Returns the conversations with the chosen and with the rejected reply, which has loss."""
        return [
            TrainingExample(self.prompt_ids + reply, [0] * len(self.prompt_ids) + [1] * len(reply))
            for reply in (self.chosen_ids, self.rejected_ids)
        ]

    def lengths(self) -> list[int]:
        """Returns the numbers of tokens of the two conversations."""
        return [len(self.prompt_ids) + len(reply) for reply in (self.chosen_ids, self.rejected_ids)]


def render_pairs(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    max_length: int,
    drop_overlong: bool = False,
) -> tuple[list[RenderedPair], list[PreferencePair]]:
    """Renders pairs for training.

    Returns:
        The rendered pairs by source, the shortest first, so that those next to each other need little padding; and
        the same pairs as messages.

    Raises:
        InputError: for pairs with more than `max_length` tokens in one of the two conversations unless they are
            dropped, and if the tokens of the prompt are not the same before both replies.
    """
    rendered: list[tuple[PreferencePair, RenderedPair]] = []
    overlong: list[tuple[int, str]] = []
    for pair in pairs:
        found = _render_pair(tokenizer, pair)
        if max(found.lengths()) > max_length:
            overlong.append((max(found.lengths()), pair.name))
        else:
            rendered.append((pair, found))
    if overlong and not drop_overlong:
        length, name = max(overlong)
        raise InputError(
            f"{len(overlong)} of {len(pairs)} pairs are longer than data.max_length {max_length}. The longest is "
            f"{name}: {length} tokens. Raise data.max_length (up to the model's context), shorten them, or set "
            "data.too_long to drop"
        )
    ordered = sorted(rendered, key=lambda item: (item[0].source, max(item[1].lengths())))
    return [found for _, found in ordered], [pair for pair, _ in ordered]


def _render_pair(tokenizer: PreTrainedTokenizerBase, pair: PreferencePair) -> RenderedPair:
    prompt = render(tokenizer, pair.prompt, add_generation_prompt=True, where=pair.name).input_ids
    chosen = _reply_ids(tokenizer, pair.prompt + pair.chosen, prompt, f"{pair.name}, chosen")
    rejected = _reply_ids(tokenizer, pair.prompt + pair.rejected, prompt, f"{pair.name}, rejected")
    if chosen == rejected:
        raise InputError(f"{pair.name}: the chat template renders chosen and rejected equally. Remove the row")
    return RenderedPair(prompt, chosen, rejected)


def _reply_ids(tokenizer: PreTrainedTokenizerBase, messages: Messages, prompt: list[int], where: str) -> list[int]:
    """Returns the tokens of the last reply, which must directly follow those of the prompt."""
    ids, masks = mask_replies(tokenizer, messages, render(tokenizer, messages, where=where), where)
    start, end = (reply_spans(masks or []) or [(0, 0)])[-1]
    if ids[:start] != prompt:
        expected, found = (tokenizer.convert_ids_to_tokens(tokens[-4:]) for tokens in (prompt, ids[:start]))
        raise InputError(
            f"{where}: before a reply, the chat template ends the prompt with {expected}, but with this reply the "
            f"tokens before it end with {found}. Remove white space around the reply, or use another template"
        )
    return ids[start:end]


def split_pairs(pairs: Sequence[PreferencePair], fraction: float) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """Splits pairs into training and held-out ones by their prompts. See [`split_conversations`]."""
    prompts = [Conversation(pair.name, pair.prompt) for pair in pairs]
    names = {prompt.name for prompt in split_conversations(prompts, fraction)[1]}
    return [pair for pair in pairs if pair.name not in names], [pair for pair in pairs if pair.name in names]


def write_pairs(pairs: Sequence[PreferencePair]) -> str:
    """Returns pairs as JSON lines that are read both as preferences and as conversations with the chosen replies."""
    rows = (
        {"messages": p.prompt + p.chosen, "prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected}
        for p in pairs
    )
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
