"""Prompts from a file of JSON lines, each checked before anything is generated."""

import codecs
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from transformers import PreTrainedTokenizerBase

from ..chat.messages import read_messages
from ..chat.render import Messages, render
from ..errors import InputError
from ..inference.generation import Context
from ..text import check_text


GENERATED = ("generated", "finish_reason", "new_tokens")
ERROR = "error"


class Prompt(NamedTuple):
    """A line that can be continued.

    Attributes:
        line (`int`): its number in the file, from 1.
        fields (`dict`): what the line holds.
        ids (`list[int]`): the prompt, or the conversation up to the reply.
        max_new_tokens (`int`): as asked for, or by default 256 or what is left of the context.
    """

    line: int
    fields: dict[str, Any]
    ids: list[int]
    max_new_tokens: int

    def result(self, tokenizer: PreTrainedTokenizerBase, new: list[int], finish_reason: str) -> dict[str, Any]:
        """The row of the output: the fields of the line, and what was generated."""
        text = tokenizer.decode(new, skip_special_tokens=True).strip()
        if "prompt" in self.fields:
            # Decoded by themselves the new tokens would lose the space that a Llama text begins with.
            both, begin = (tokenizer.decode(ids, skip_special_tokens=True) for ids in ([*self.ids, *new], self.ids))
            text = both[len(begin) :]
        return {**self.fields, **dict(zip(GENERATED, (text, finish_reason, len(new)), strict=True))}


class BadLine(NamedTuple):
    """A line that cannot be continued; `fields` is empty where it holds no object."""

    line: int
    fields: dict[str, Any]
    error: str

    def result(self) -> dict[str, Any]:
        """The row of the output."""
        return {**self.fields, ERROR: self.error}


class PromptFile(NamedTuple):
    """The lines of a file by kind; empty lines are passed over."""

    prompts: list[Prompt]
    bad: list[BadLine]


def read_prompts(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    context: Context,
    max_new_tokens: int | None = None,
) -> PromptFile:
    """Reads and checks a file of JSON lines.

    Args:
        path (`Path`): each line `{"prompt": "..."}`, or `{"messages": [...]}` for a chat model, with any other fields.
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
        context (`Context`): of the model, or of a draft.
        max_new_tokens (`int`, *optional*): tokens to generate for each.

    Raises:
        InputError: if the file cannot be read, or none of its lines can be continued.
    """
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise InputError(f"--input {path}: cannot be read ({error.strerror}); name a file of JSON lines") from error
    prompts, bad = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        fields: dict[str, Any] = {}
        try:
            fields = _object(line)
            ids = _ids(fields, tokenizer)
            prompts.append(Prompt(number, fields, ids, context.new_tokens(len(ids), max_new_tokens)))
        except InputError as error:
            bad.append(BadLine(number, fields, f"line {number}: {error}"))
    if not prompts:
        first = f"; the first: {bad[0].error}" if bad else ""
        raise InputError(f"--input {path}: none of its {len(bad)} lines can be continued{first}")
    return PromptFile(prompts, bad)


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
        whole = json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError) as error:  # the latter for brackets deeper than Python's stack
        raise InputError(f"no JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f'is of type {type(value).__name__}; must be an object: {{"prompt": "..."}}')
    # Here, since it could not be written again with the other fields.
    messages = value.get("messages")
    for number, message in enumerate(messages if isinstance(messages, list) else ()):
        check_text(json.dumps(message, ensure_ascii=False), f"message {number}")
    check_text(whole, "the line")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is none")


def _ids(fields: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens to continue; text that spells a control token stays text."""
    if taken := [name for name in (*GENERATED, ERROR) if name in fields]:
        raise InputError(f"has a field {taken[0]!r}, which the output has too; rename it")
    if ("prompt" in fields) == ("messages" in fields):
        raise InputError(f"must have 'prompt' or 'messages', and has {sorted(fields)}")
    if "messages" in fields:
        return chat_ids(read_messages(fields, "messages"), tokenizer)
    if not isinstance(fields["prompt"], str):
        raise InputError(f"prompt is of type {type(fields['prompt']).__name__}; must be a text")
    return tokenizer(fields["prompt"], split_special_tokens=True, verbose=False)["input_ids"]


def chat_ids(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a conversation up to the reply that is due.

    Raises:
        InputError: as `render`; or if no reply belongs to it.
    """
    ids = render(tokenizer, messages, add_generation_prompt=True, where="messages").input_ids
    if messages[-1]["role"] != "user":
        raise InputError(f"messages end with the role {messages[-1]['role']!r}; a reply needs a message of the user")
    return ids
