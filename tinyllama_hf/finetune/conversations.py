"""Conversations for fine-tuning: reads, checks and splits them, and renders them to tokens with loss masks."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..chat.masks import mask_replies
from ..chat.messages import is_learned, read_messages
from ..chat.render import Messages, Rendering, check_messages, render
from ..data.questions import questions
from ..data.row_files import JSON_LINES, read_rows
from ..errors import InputError


EMBEDDED = "embedded:questions"
HELD_OUT_FILE = "validation.jsonl"  # in the folder of a fine-tuned model
# Fields that change the rendering or the loss, and are not supported. All other fields are ignored.
_UNSUPPORTED = frozenset(
    "chat_template chat_template_kwargs documents function_call functions parallel_tool_calls system tool_choice "
    "tools train training weight".split()
)


class Conversation(NamedTuple):
    """A conversation, and its file and row for error messages. A reply with `"weight": 0` has no loss."""

    name: str
    messages: list[dict[str, Any]]


class TrainingExample(NamedTuple):
    """The tokens of a conversation. `assistant_masks` is 1 for tokens with loss. The names are those of TRL."""

    input_ids: list[int]
    assistant_masks: list[int]


def read_conversations(source: str) -> list[Conversation]:
    """Reads and checks conversations.

    Args:
        source (`str`): JSON lines (plain, `.gz`, `.zst`) with the key `messages`, a list of
            `{"role": ..., "content": ...}`, see [`read_messages`]; or `"embedded:questions"`. Other fields are
            ignored, except those that would change the loss, such as `tools`: they are an error.

    Raises:
        InputError: for an invalid row; names the file, the row and the rule.
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
            f"conversations {source}: no such file. Name a file of JSON lines ({', '.join(JSON_LINES)}), or use "
            f"{EMBEDDED}"
        )
    found = []
    for number, row in read_rows(path):
        where = f"{source}, row {number}"
        messages = read_messages(row, where)
        if unsupported := sorted(key for key in _UNSUPPORTED & row.keys() if row[key] not in (None, "", [], {})):
            raise InputError(
                f"{where}: field {unsupported[0]!r} is not supported, since it would change the loss. Write it into "
                "the messages, or remove it"
            )
        check_training_messages(messages, where)
        found.append(Conversation(where, messages))
    if not found:
        raise InputError(f"conversations {source}: the file has no rows")
    return found


def check_training_messages(messages: Sequence[dict[str, Any]], where: str) -> None:
    """Checks that a conversation can be rendered and has replies with loss, none of them empty.

    Raises:
        InputError: if not; names the rule.
    """
    check_messages(messages, where)
    replies = [(i, message) for i, message in enumerate(messages) if is_learned(message)]
    if not replies:
        raise InputError(
            f"{where} has no reply of the assistant with loss (no reply, or all with weight 0). Remove the "
            "conversation"
        )
    for number, reply in replies:
        if not reply["content"].strip():
            raise InputError(f"{where}, message {number}: the reply is empty. Fill it in, or remove the conversation")


def split_conversations(
    conversations: Sequence[Conversation], fraction: float
) -> tuple[list[Conversation], list[Conversation]]:
    """Splits conversations into training and held-out ones.

    The split uses the hash of roles and contents, so a conversation stays in its part when others are added.

    Raises:
        InputError: if one part would be empty.
    """
    parts: tuple[list[Conversation], list[Conversation]] = ([], [])
    for conversation in conversations:
        said = [{key: message[key] for key in ("content", "role")} for message in conversation.messages]
        digest = hashlib.sha256(json.dumps(said).encode()).digest()
        parts[int.from_bytes(digest[:8], "big") < fraction * 2**64].append(conversation)
    if not parts[0] or not parts[1]:
        raise InputError(
            f"data.validation_fraction: {fraction} of {len(conversations)} conversations gives {len(parts[0])} for "
            f"training and {len(parts[1])} held out. Both must be above 0: change the fraction, or add conversations"
        )
    return parts


def mark_replies(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, rendering: Rendering, where: str
) -> TrainingExample:
    """Returns a rendered conversation with its loss mask. See [`mask_replies`]."""
    ids, masks = mask_replies(tokenizer, messages, rendering, where)
    return TrainingExample(ids, masks or [])


def render_all(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    max_length: int,
    drop_overlong: bool = False,
) -> list[TrainingExample]:
    """Renders conversations for training.

    Raises:
        InputError: for a conversation without a token with loss, and for those longer than `max_length` tokens unless
            they are dropped.
    """
    examples: list[TrainingExample] = []
    overlong: list[tuple[str, int]] = []
    for conversation in conversations:
        name, messages = conversation
        rendering = render(tokenizer, messages, where=name)
        # Checked first, since finding the replies can take one rendering per reply.
        if len(rendering.input_ids) > max_length:
            overlong.append((name, len(rendering.input_ids)))
            continue
        examples.append(mark_replies(tokenizer, messages, rendering, name))
        if not any(examples[-1].assistant_masks):
            raise InputError(f"{name}: no token has loss. Check that the chat template fits the conversation")
    if overlong and not drop_overlong:
        name, length = max(overlong, key=lambda item: item[1])
        raise InputError(
            f"{len(overlong)} of {len(conversations)} conversations are longer than data.max_length {max_length}. The "
            f"longest is {name}: {length} tokens. Raise data.max_length (up to the model's context), shorten them, or "
            "set data.overlong to drop"
        )
    return examples


def write_rows(conversations: Sequence[Conversation]) -> str:
    """Returns conversations as JSON lines, in the format of [`read_conversations`]."""
    return "".join(json.dumps({"messages": c.messages}, ensure_ascii=False) + "\n" for c in conversations)
