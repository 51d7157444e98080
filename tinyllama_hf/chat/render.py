"""From a conversation to tokens: control tokens come from the template alone, what people wrote is encoded as text.

`apply_chat_template` renders one string and lets the tokenizer look for control tokens in it, so that a literal `</s>`
in a message ends the turn. Here the same template is rendered with such text taken out of the messages and put back
after the string was cut at its control tokens. A conversation without such text gets the same tokens either way.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ..errors import InputError, did_you_mean
from ..text import check_text


ROLES = ("system", "user", "assistant")
Messages = Sequence[Mapping[str, Any]]
_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PRIVATE_USE = range(0xF0000, 0xFFFFE)  # a plane of characters without a meaning


class Rendering(NamedTuple):
    """A conversation as tokens.

    `assistant_masks` holds 1 for each token of a reply and its stop token, 0 for others; `None` where the template
    does not mark them, and with a generation prompt. The name is that of transformers and TRL.
    """

    input_ids: list[int]
    assistant_masks: list[int] | None


class _Escaped(NamedTuple):
    """Messages without control text, and the character that stands for each control token written in them."""

    messages: list[dict[str, str]]
    originals: dict[str, str]

    def restore(self, text: str) -> str:
        return "".join(self.originals.get(character, character) for character in text)


def has_generation_markers(template: str) -> bool:
    """Whether a chat template says which part of it the assistant speaks."""
    return _GENERATION_MARKER.search(template) is not None


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    add_generation_prompt: bool = False,
    where: str = "conversation",
) -> Rendering:
    """Renders a conversation with the tokenizer's chat template.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): a fast tokenizer with a chat template.
        messages (`Sequence[Mapping[str, str]]`): `{"role": ..., "content": ...}`; see [`check_messages`].
        add_generation_prompt (`bool`, *optional*, defaults to `False`): end with what the template puts before a reply.
        where (`str`, *optional*): names the conversation in errors.

    Raises:
        InputError: if the tokenizer has no template, or the template refuses the conversation.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise InputError(
            "the tokenizer has no chat template, so this is a base model: fine-tune it with recipes/sft.py, or continue "
            "text with `tinyllama-hf generate`"
        )
    check_messages(messages, where)
    control = _control_tokens(tokenizer)
    escaped = _escape(messages, control, where)
    # Only training needs the masks, and transformers (5.23) joins all text so far at each reply to find their spans.
    marked = not add_generation_prompt and has_generation_markers(template)
    try:
        rendered, spans = render_jinja_template(
            [escaped.messages],
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            return_assistant_tokens_mask=marked,
            **tokenizer.special_tokens_map,
        )
    except TemplateError as error:
        raise InputError(f"{where}: the chat template refuses it: {error}") from error
    ids, masks = _encode(tokenizer, rendered[0], spans[0] if marked else [], control, escaped)
    return Rendering(ids, masks if marked else None)


def check_messages(messages: Messages, where: str = "conversation") -> None:
    """Checks that a conversation is one: an optional system message, then user and assistant by turns.

    Raises:
        InputError: naming the message, what it is and what it has to be.
    """
    if not messages:
        raise InputError(f"{where}: is empty; it needs at least a message of the user")
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise InputError(f"{where}, message {number}: role {role!r} is not known{did_you_mean(str(role), ROLES)}")
        if not isinstance(content, str):
            raise InputError(f"{where}, message {number}: content is {type(content).__name__}, not a text")
        check_text(content, f"{where}, message {number}")
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if not turns:
        raise InputError(f"{where}: holds only a system message; it needs at least a message of the user")
    if turns[0]["role"] == "assistant":
        raise InputError(f"{where}: starts with the assistant; a reply needs a message of the user before it")
    for number, message in enumerate(turns):
        wanted = ("user", "assistant")[number % 2]
        if message["role"] != wanted:
            raise InputError(
                f"{where}: turn {number} is of role {message['role']!r} where {wanted!r} is due; user and assistant take "
                "turns, after at most one system message"
            )


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The tokens that the tokenizer would find in a rendered text."""
    found = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    trimmed = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special and (t.lstrip or t.rstrip)]
    if trimmed:
        raise InputError(
            f"the tokenizer's control token {trimmed[0]!r} swallows spaces beside it; such are not supported"
        )
    return found


def _escape(messages: Messages, control: Mapping[str, int], where: str) -> _Escaped:
    """Puts a character that no message holds in the place of each control token written in a message."""
    texts = "".join(message["content"] for message in messages)
    written = [token for token in control if token in texts]
    if not written:
        return _Escaped([dict(message) for message in messages], {})
    used = set(texts)
    free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
    originals = dict(zip(free, written, strict=False))
    if len(originals) < len(written):
        raise InputError(
            f"{where}: holds the control text {written[-1]!r} and every character of Unicode's plane 15, one of which must "
            "stand for it; leave one of them out"
        )
    characters = {token: character for character, token in originals.items()}
    pattern = _any_of(written)
    replaced = [
        {**message, "content": pattern.sub(lambda match: characters[match[0]], message["content"])}
        for message in messages
    ]
    return _Escaped(replaced, originals)


def _any_of(tokens: Sequence[str] | Mapping[str, int]) -> re.Pattern:
    """Matches the longest of the tokens that begin at a place, as the tokenizer does."""
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    rendered: str,
    spans: Sequence[tuple[int, int]],
    control: Mapping[str, int],
    escaped: _Escaped,
) -> tuple[list[int], list[int]]:
    """Encodes what is between control tokens as text; a token inside one of the spans of characters gets a 1."""
    parts = _split(rendered, control)
    pieces = [rendered[start:end] for start, end, token in parts if token is None]
    encoded: Any = iter(())
    if pieces:  # in one call, as a call costs more than a short piece
        batch: Any = tokenizer(
            [escaped.restore(piece) for piece in pieces],
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        encoded = zip(batch["input_ids"], batch["offset_mapping"], strict=True)
    ids: list[int] = []
    places: list[tuple[int, int]] = []
    for start, end, token in parts:
        if token is not None:
            ids.append(token)
            places.append((start, end))
            continue
        piece_ids, offsets = next(encoded)
        # Where a character of the restored text stands in the rendered one.
        origin = [i for i in range(start, end) for _ in escaped.originals.get(rendered[i], rendered[i])]
        origin.append(end)
        ids += piece_ids
        places += [(origin[first], max(origin[stop], origin[first] + 1)) for first, stop in offsets]
    return ids, _masks(places, spans)


def _split(rendered: str, control: Mapping[str, int]) -> list[tuple[int, int, int | None]]:
    """The stretches of a text from start to end, each with the id of the control token that it is, `None` for text."""
    parts: list[tuple[int, int, int | None]] = []
    position = 0
    for match in _any_of(control).finditer(rendered) if control else ():
        if match.start() > position:
            parts.append((position, match.start(), None))
        parts.append((match.start(), match.end(), control[match[0]]))
        position = match.end()
    if position < len(rendered):
        parts.append((position, len(rendered), None))
    return parts


def _masks(places: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """1 for each place that overlaps a span; both are in the order of the text, so that each is walked once."""
    masks = []
    current = 0
    for start, end in places:
        while current < len(spans) and spans[current][1] <= start:
            current += 1
        masks.append(int(current < len(spans) and spans[current][0] < end))
    return masks
