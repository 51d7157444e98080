"""Conversations to fine-tune on: read, checked, split, and rendered to tokens with the mask of what is learned."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..chat.render import Rendering, check_messages, render
from ..data.questions import questions
from ..data.rows import JSON_LINES, read_rows
from ..errors import InputError


EMBEDDED = "embedded:questions"
HELD_OUT_FILE = "validation.jsonl"  # in the folder of a fine-tuned model


class Conversation(NamedTuple):
    """A conversation and where it stands, for messages."""

    name: str
    messages: list[dict[str, str]]


def read_conversations(source: str) -> list[Conversation]:
    """Reads and checks conversations.

    Args:
        source (`str`): JSON lines (plain, `.gz`, `.zst`) whose rows hold `messages`, a list of
            `{"role": ..., "content": ...}`; or `"embedded:questions"`.

    Raises:
        InputError: naming the file, the row and the rule that it breaks.
    """
    if source == EMBEDDED:
        return [
            Conversation(
                f"{source}, {pair.name}", [_message("user", pair.question), _message("assistant", pair.answer)]
            )
            for pair in questions()
        ]
    path = Path(source)
    if not path.is_file() or not path.name.endswith(JSON_LINES):
        raise InputError(
            f"conversations {source}: no such file of JSON lines ({', '.join(JSON_LINES)}); or use {EMBEDDED}"
        )
    found = []
    for number, row in read_rows(path):
        where = f"{source}, row {number}"
        found.append(Conversation(where, _messages(row, where)))
        check_training_messages(found[-1].messages, where)
    if not found:
        raise InputError(f"conversations {source}: holds no row")
    return found


def check_training_messages(messages: Sequence[dict[str, str]], where: str) -> None:
    """Checks that a conversation can be learned from: one that `render` takes, with replies, none of them empty.

    Raises:
        InputError: naming the rule that is broken.
    """
    check_messages(messages, where)
    replies = [(i, message) for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not replies:
        raise InputError(f"{where}: has no reply of the assistant, so that nothing can be learned from it; drop it")
    for number, reply in replies:
        if not reply["content"].strip():
            raise InputError(
                f"{where}, message {number}: the reply is empty; a model would learn to say nothing: fill or drop it"
            )


def split(conversations: Sequence[Conversation], fraction: float) -> tuple[list[Conversation], list[Conversation]]:
    """Splits into (train, held out) by the hash of the messages, so that more data never moves a row to the other side.

    Raises:
        InputError: if one of the two would be empty.
    """
    parts: tuple[list[Conversation], list[Conversation]] = ([], [])
    for conversation in conversations:
        digest = hashlib.sha256(json.dumps(conversation.messages, sort_keys=True).encode()).digest()
        parts[int.from_bytes(digest[:8], "big") < fraction * 2**64].append(conversation)
    if not parts[0] or not parts[1]:
        raise InputError(
            f"data.validation_fraction: {fraction} of {len(conversations)} conversations leaves {len(parts[0])} to train on "
            f"and {len(parts[1])} held out; both are needed: change it, or add conversations"
        )
    return parts


def render_all(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    max_length: int,
    drop_overlong: bool = False,
) -> list[Rendering]:
    """Renders conversations for training.

    Raises:
        InputError: for a conversation without a token to learn, and, unless they are dropped, for those longer than
            `max_length` tokens.
    """
    rendered, overlong = [], []
    for conversation in conversations:
        rendering = render(tokenizer, conversation.messages, where=conversation.name)
        if not any(rendering.assistant_masks or ()):
            raise InputError(f"{conversation.name}: no token of it would be trained; is its template the right one?")
        if len(rendering.input_ids) > max_length:
            overlong.append((conversation.name, len(rendering.input_ids), sum(rendering.assistant_masks)))
        else:
            rendered.append(rendering)
    if overlong and not drop_overlong:
        name, length, learned = max(overlong, key=lambda item: item[1])
        raise InputError(
            f"{len(overlong)} of {len(conversations)} conversations are longer than data.max_length {max_length}; the longest "
            f"is {name}: {length} tokens, {learned} of them the assistant's. Raise data.max_length (up to the model's "
            "context), shorten them, or set data.overlong to drop"
        )
    return rendered


def write_rows(conversations: Sequence[Conversation]) -> str:
    """Conversations as JSON lines that [`read_conversations`] reads."""
    return "".join(json.dumps({"messages": c.messages}, ensure_ascii=False) + "\n" for c in conversations)


def _messages(row: Any, where: str) -> list[dict[str, str]]:
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        columns = ", ".join(sorted(row)) if isinstance(row, dict) else type(row).__name__
        raise InputError(
            f"{where}: no list of messages under 'messages', but: {columns}; a row is "
            '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}'
        )
    return messages


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
