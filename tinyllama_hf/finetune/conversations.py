"""Conversations for fine-tuning: reads, checks and splits them, and renders them to tokens with loss masks."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..chat.masks import mask_replies
from ..chat.messages import is_learned
from ..chat.render import Messages, Rendering, check_messages, render
from ..errors import InputError
from ..progress import progress_bar
from .config import ConversationSource
from .conversation_sources import SourceSummary, read_items
from .row_formats import CONVERSATIONS, conversation_messages


HELD_OUT_FILE = "validation.jsonl"  # in the folder of a fine-tuned model


class Conversation(NamedTuple):
    """A conversation, its file and row for error messages, and the number of its source.

    A reply with `"weight": 0` has no loss.
    """

    name: str
    messages: list[dict[str, Any]]
    source: int = 0


@dataclass(frozen=True)
class ConversationData:
    """The conversations of all sources, and what was read from each."""

    conversations: list[Conversation]
    sources: list[SourceSummary]


class TrainingExample(NamedTuple):
    """The tokens of a conversation. `assistant_masks` is 1 for tokens with loss. The names are those of TRL."""

    input_ids: list[int]
    assistant_masks: list[int]


@dataclass
class RenderedConversations:
    """Rendered conversations, and those that were longer than the limit.

    Attributes:
        examples (`list[TrainingExample]`): the tokens.
        conversations (`list[Conversation]`): the conversation of each example.
        dropped (`Counter[int]`): number of conversations that are too long and were left out, by source.
        truncated (`Counter[int]`): number of examples that were truncated, by source.
    """

    examples: list[TrainingExample] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)
    dropped: Counter[int] = field(default_factory=Counter)
    truncated: Counter[int] = field(default_factory=Counter)

    @property
    def max_length(self) -> int:
        """Number of tokens of the longest example."""
        return max((len(example.input_ids) for example in self.examples), default=0)


def read_conversations(path: str) -> list[Conversation]:
    """Returns the conversations of one source. See [`read_sources`].

    Raises:
        InputError: for the first invalid row; names the file, the row and the rule.
    """
    return read_sources([ConversationSource(path=path)]).conversations


def read_sources(sources: Sequence[ConversationSource], invalid: str = "error") -> ConversationData:
    """Reads and checks conversations in any of the formats [`CONVERSATIONS`].

    Args:
        sources (`Sequence[ConversationSource]`): files, data sets of the Hub or `embedded:questions`; see
            [`read_items`].
        invalid (`str`, *optional*, defaults to `"error"`): `"drop"` leaves invalid rows out and counts them.

    Raises:
        InputError: if a source cannot be read or has no valid row, and for the first invalid row unless they are
            dropped; names the file, the row and the rule.
    """
    return ConversationData(*read_items(sources, CONVERSATIONS, invalid, _conversation))


def _conversation(name: str, columns: dict[str, Any], where: str, source: int) -> Conversation:
    messages = conversation_messages(name, columns, where)
    check_training_messages(messages, where)
    return Conversation(where, messages, source)


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
    too_long: str = "error",
    show: bool = True,
) -> RenderedConversations:
    """Renders conversations for training.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): a fast tokenizer with a chat template.
        conversations (`Sequence[Conversation]`): from [`read_sources`].
        max_length (`int`): the largest number of tokens.
        too_long (`str`, *optional*, defaults to `"error"`): for longer conversations: `"error"`, `"drop"`, or
            `"truncate"` to keep the first `max_length` tokens, often without the last stop token. Conversations of
            which no token with loss is left are dropped.
        show (`bool`, *optional*, defaults to `True`): show progress.

    Raises:
        InputError: for a conversation without a token with loss, and for those that are too long unless they are
            dropped or truncated.
    """
    rendered = RenderedConversations()
    longest: tuple[int, str] = (0, "")
    with progress_bar("rendering conversations", "conversations", len(conversations), show) as update:
        for conversation in conversations:
            update(advance=1)
            name, messages, source = conversation
            rendering = render(tokenizer, messages, where=name)
            is_long = len(rendering.input_ids) > max_length
            # Checked first, since finding the replies can take one rendering per reply.
            if is_long and too_long != "truncate":
                longest = max(longest, (len(rendering.input_ids), name))
                rendered.dropped[source] += 1
                continue
            example = mark_replies(tokenizer, messages, rendering, name)
            if not any(example.assistant_masks):
                raise InputError(f"{name}: no token has loss. Check that the chat template fits the conversation")
            if is_long:
                example = TrainingExample(*(tokens[:max_length] for tokens in example))
                kept = any(example.assistant_masks)
                (rendered.truncated if kept else rendered.dropped)[source] += 1
                if not kept:
                    continue
            rendered.examples.append(example)
            rendered.conversations.append(conversation)
    if rendered.dropped and too_long == "error":
        raise InputError(
            f"{rendered.dropped.total()} of {len(conversations)} conversations are longer than data.max_length "
            f"{max_length}. The longest is {longest[1]}: {longest[0]} tokens. Raise data.max_length (up to the "
            "model's context), shorten them, or set data.too_long to drop or truncate"
        )
    return rendered


def write_rows(conversations: Sequence[Conversation]) -> str:
    """Returns conversations as JSON lines, in the format of [`read_conversations`]."""
    return "".join(json.dumps({"messages": c.messages}, ensure_ascii=False) + "\n" for c in conversations)
