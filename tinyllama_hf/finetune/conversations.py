"""Conversations to fine-tune on: read, checked, split, and rendered to tokens with the mask of what is learned."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..chat.masks import mask_replies
from ..chat.messages import is_learned, read_messages
from ..chat.render import Rendering, check_messages, render
from ..data.questions import questions
from ..data.row_files import JSON_LINES, read_rows
from ..errors import InputError


EMBEDDED = "embedded:questions"
HELD_OUT_FILE = "validation.jsonl"  # in the folder of a fine-tuned model
# Fields of a row that change what a template renders or what is learned; all others are taken as notes about the row.
_DECISIVE = {
    "chat_template", "chat_template_kwargs", "documents", "function_call", "functions", "parallel_tool_calls", "system",
    "tool_choice", "tools", "train", "training", "weight",
}  # fmt: skip


class Conversation(NamedTuple):
    """A conversation and where it stands, for messages; a reply with `"weight": 0` is context only."""

    name: str
    messages: list[dict[str, Any]]


def read_conversations(source: str) -> list[Conversation]:
    """Reads and checks conversations.

    Args:
        source (`str`): JSON lines (plain, `.gz`, `.zst`) whose rows hold `messages`, a list of
            `{"role": ..., "content": ...}`, see [`read_messages`]; or `"embedded:questions"`. Other fields of a row are
            notes and are not read, but one that would change what is learned, such as `tools`, is refused.

    Raises:
        InputError: naming the file, the row and the rule that it breaks.
    """
    if source == EMBEDDED:
        return [
            Conversation(
                f"{source}, {pair.name}",
                [{"role": "user", "content": pair.question}, {"role": "assistant", "content": pair.answer}],
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
        messages = read_messages(row, where)
        if decisive := sorted(key for key in _DECISIVE & row.keys() if row[key] not in (None, "", [], {})):
            raise InputError(
                f"{where}: field {decisive[0]!r} would change what is learned and is not supported; write it into the "
                "messages, or remove it"
            )
        check_training_messages(messages, where)
        found.append(Conversation(where, messages))
    if not found:
        raise InputError(f"conversations {source}: holds no row")
    return found


def check_training_messages(messages: Sequence[dict[str, Any]], where: str) -> None:
    """Checks that a conversation can be learned from: one that `render` takes, with replies to learn, none of them empty.

    Raises:
        InputError: naming the rule that is broken.
    """
    check_messages(messages, where)
    replies = [(i, message) for i, message in enumerate(messages) if is_learned(message)]
    if not replies:
        raise InputError(
            f"{where}: has no reply of the assistant that is learned (none, or all of weight 0); remove the conversation"
        )
    for number, reply in replies:
        if not reply["content"].strip():
            raise InputError(
                f"{where}, message {number}: the reply is empty; a model would learn to say nothing: fill or drop it"
            )


def split(conversations: Sequence[Conversation], fraction: float) -> tuple[list[Conversation], list[Conversation]]:
    """Splits into (train, held out) by the hash of roles and contents, so that more data never moves a row to the other side.

    Raises:
        InputError: if one of the two would be empty.
    """
    parts: tuple[list[Conversation], list[Conversation]] = ([], [])
    for conversation in conversations:
        said = [{key: message[key] for key in ("content", "role")} for message in conversation.messages]
        digest = hashlib.sha256(json.dumps(said).encode()).digest()
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
        name, messages = conversation
        rendering = render(tokenizer, messages, where=name)
        # Before the replies are looked for, which can take a rendering for each of them.
        if len(rendering.input_ids) > max_length:
            overlong.append((name, len(rendering.input_ids)))
            continue
        rendered.append(mask_replies(tokenizer, messages, rendering, name))
        if not any(rendered[-1].assistant_masks):
            raise InputError(f"{name}: no token of it would be trained; is its template the right one?")
    if overlong and not drop_overlong:
        name, length = max(overlong, key=lambda item: item[1])
        raise InputError(
            f"{len(overlong)} of {len(conversations)} conversations are longer than data.max_length {max_length}; the longest "
            f"is {name}: {length} tokens. Raise data.max_length (up to the model's context), shorten them, or set "
            "data.overlong to drop"
        )
    return rendered


def write_rows(conversations: Sequence[Conversation]) -> str:
    """Conversations as JSON lines that [`read_conversations`] reads."""
    return "".join(json.dumps({"messages": c.messages}, ensure_ascii=False) + "\n" for c in conversations)
