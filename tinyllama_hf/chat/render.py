"""Renders conversations to tokens: control tokens come only from the template, and messages are encoded as text.

`apply_chat_template` renders one string, in which the tokenizer finds control tokens, so a literal `</s>` in a message
ends the turn. Here such text is replaced by placeholders before the template is rendered, and restored after the
string was split at its control tokens. Conversations without such text get the same tokens from both.
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
_PRIVATE_USE = range(0xF0000, 0xFFFFE)  # Unicode's plane 15: characters without a meaning


class Rendering(NamedTuple):
    """The tokens of a conversation.

    Attributes:
        input_ids (`list[int]`): the tokens.
        assistant_masks (`list[int]`, *optional*): 1 for each token of a reply and its stop token, else 0; the name is
            that of transformers and TRL. `None` if the template does not mark them, and with a generation prompt.
    """

    input_ids: list[int]
    assistant_masks: list[int] | None


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
        add_generation_prompt (`bool`, *optional*, defaults to `False`): add the tokens that precede a reply.
        where (`str`, *optional*): name of the conversation in error messages.

    Raises:
        InputError: if the tokenizer has no template, or the template refuses the conversation.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise InputError(
            "the tokenizer has no chat template, so this is a base model. Fine-tune it with recipes/sft.py, or "
            "continue text with `tinyllama-hf generate`"
        )
    check_messages(messages, where)
    control = _control_tokens(tokenizer)
    escaped, originals = _escape(messages, control, where)
    # Only training needs the masks, and finding them is slow: transformers (5.23) joins the text so far at each reply.
    marked = not add_generation_prompt and _GENERATION_MARKER.search(template) is not None
    named: Any = tokenizer.special_tokens_map
    options = {"add_generation_prompt": add_generation_prompt, "return_assistant_tokens_mask": marked, **named}
    try:
        # Annotated as a string, but it returns two lists: texts, and spans of replies.
        output: Any = render_jinja_template([escaped], chat_template=template, **options)
    except TemplateError as error:
        raise InputError(f"{where}: refused by the chat template: {error}") from error
    texts, spans = output
    ids, masks = _encode(tokenizer, texts[0], spans[0] if marked else [], control, originals, where)
    return Rendering(ids, masks if marked else None)


def check_messages(messages: Messages, where: str = "conversation") -> None:
    """Checks the roles of a conversation: an optional system message, then alternating user and assistant.

    Raises:
        InputError: naming the message, its role or content, and the rule.
    """
    if not messages:
        raise InputError(f"{where}: empty; at least one user message is needed")
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise InputError(f"{where}, message {number}: unknown role {role!r}{did_you_mean(str(role), ROLES)}")
        if not isinstance(content, str):
            raise InputError(f"{where}, message {number}: content is {type(content).__name__}; must be a string")
        check_text(content, f"{where}, message {number}")
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if not turns:
        raise InputError(f"{where}: only a system message; at least one user message is needed")
    if turns[0]["role"] == "assistant":
        raise InputError(f"{where}: starts with the assistant; a reply must follow a user message")
    for number, message in enumerate(turns):
        wanted = ("user", "assistant")[number % 2]
        if message["role"] != wanted:
            raise InputError(
                f"{where}: turn {number} has the role {message['role']!r}, expected {wanted!r}. After at most one "
                "system message, user and assistant must alternate"
            )


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Returns the tokens that the tokenizer would find in a rendered text, with their ids."""
    special = {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if trimmed := [token.content for token in special.values() if token.lstrip or token.rstrip]:
        raise InputError(
            f"the tokenizer's control token {trimmed[0]!r} strips the spaces next to it (lstrip, rstrip), which is "
            "not supported"
        )
    return {token.content: i for i, token in special.items()}


def _escape(messages: Messages, control: Mapping[str, int], where: str) -> tuple[list[dict[str, str]], dict[int, str]]:
    """Replaces each control token in the text of messages by a character that occurs in none of them.

    Returns:
        The messages, and the replaced token by character code.
    """
    texts = "".join(message["content"] for message in messages)
    written = [token for token in control if token in texts]
    if not written:
        return [dict(message) for message in messages], {}
    used = set(texts)
    free = (code for code in _PRIVATE_USE if chr(code) not in used)
    originals = dict(zip(free, written, strict=False))
    if len(originals) < len(written):
        raise InputError(
            f"{where}: contains the control token {written[-1]!r} as text, and all characters of Unicode's plane 15, "
            "of which one is needed as its placeholder. Remove one of them"
        )
    characters = {token: chr(code) for code, token in originals.items()}
    pattern = _any_of(written)
    replaced = [
        {**message, "content": pattern.sub(lambda match: characters[match[0]], message["content"])}
        for message in messages
    ]
    return replaced, originals


def _any_of(tokens: Sequence[str] | Mapping[str, int]) -> re.Pattern:
    """Returns a pattern that matches the longest token at each position, as the tokenizer does, in a group."""
    return re.compile(f"({'|'.join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))})")


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    rendered: str,
    spans: Sequence[tuple[int, int]],
    control: Mapping[str, int],
    originals: Mapping[int, str],
    where: str,
) -> tuple[list[int], list[int]]:
    """Encodes a rendered text; returns ids, and a mask with 1 for tokens in the character spans."""
    pieces = [piece for piece in (_any_of(control).split(rendered) if control else [rendered]) if piece]
    texts = [piece.translate(originals) for piece in pieces if piece not in control]
    encoded: Any = iter(())
    if texts:  # in one call, since the overhead of a call exceeds the cost of a short text
        options = {"add_special_tokens": False, "split_special_tokens": True, "return_offsets_mapping": True}
        batch: Any = tokenizer(texts, verbose=False, **options)
        encoded = zip(batch["input_ids"], batch["offset_mapping"], strict=True)
    marked = bytearray(len(rendered))  # whether a character is in a span
    for start, end in spans:
        marked[start:end] = b"\1" * (end - start)
    ids: list[int] = []
    masks: list[int] = []
    start = 0
    for piece in pieces:
        end = start + len(piece)
        if piece in control:
            ids.append(control[piece])
            masks.append(int(any(marked[start:end])))
        else:
            piece_ids, offsets = next(encoded)
            # Position in the rendered text of each character of the restored text, which is longer than its
            # placeholders.
            origin = [i for i in range(start, end) for _ in originals.get(ord(rendered[i]), rendered[i])]
            origin.append(end)
            places = [(origin[first], max(origin[stop], origin[first] + 1)) for first, stop in offsets]
            if joined := [piece_ids[i] for i, (a, b) in enumerate(places) if marked[a] != marked[b - 1]]:
                raise InputError(
                    f"{where}: the token {tokenizer.decode(joined[0])!r} is part of both the prompt and a reply, so a "
                    "model would be prompted with other tokens than in training. Remove white space at the start of "
                    "the reply, or trim it in the template"
                )
            ids += piece_ids
            masks += [marked[first] for first, _ in places]
        start = end
    return ids, masks
