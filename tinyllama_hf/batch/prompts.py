"""Prompts from a JSON Lines file; all lines are checked before anything is generated."""

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
from ..text import check_text, decode_text


GENERATED = ("generated", "finish_reason", "new_tokens")
ERROR = "error"


class Prompt(NamedTuple):
    """A line with a valid prompt.

    Attributes:
        line (`int`): line number, from 1.
        fields (`dict`): the fields of the line.
        ids (`list[int]`): tokens of the prompt, or of the conversation up to the reply.
        max_new_tokens (`int`): maximum number of new tokens.
    """

    line: int
    fields: dict[str, Any]
    ids: list[int]
    max_new_tokens: int

    def result(self, tokenizer: PreTrainedTokenizerBase, new: list[int], finish_reason: str) -> dict[str, Any]:
        """Returns the output row: the fields of the line, and the generated text."""
        if "prompt" in self.fields:
            # Decoded alone, the new tokens would lose a leading space.
            text = decode_text(tokenizer, [*self.ids, *new])[len(decode_text(tokenizer, self.ids)) :]
        else:
            text = decode_text(tokenizer, new).strip()
        return {**self.fields, **dict(zip(GENERATED, (text, finish_reason, len(new)), strict=True))}


class BadLine(NamedTuple):
    """A line without a valid prompt; `fields` is empty if the line is not a JSON object."""

    line: int
    fields: dict[str, Any]
    error: str

    def result(self) -> dict[str, Any]:
        """Returns the output row."""
        return {**self.fields, ERROR: self.error}


class PromptFile(NamedTuple):
    """The valid and invalid lines of a file, without empty lines."""

    prompts: list[Prompt]
    bad: list[BadLine]


def read_prompts(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    context: Context,
    max_new_tokens: int | None = None,
) -> PromptFile:
    """Reads and checks a JSON Lines file.

    Args:
        path (`Path`): a file with lines `{"prompt": "..."}`, or `{"messages": [...]}` for a chat model, and any other
            fields.
        tokenizer (`PreTrainedTokenizerBase`): the model's tokenizer.
        context (`Context`): of the model, or of a draft with a shorter one.
        max_new_tokens (`int`, *optional*): tokens to generate per prompt; by default 256 or what is left of the
            context.

    Raises:
        InputError: if the file cannot be read, or no line has a valid prompt.
    """
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise InputError(f"--input {path}: cannot be read ({error.strerror}). Give a JSON Lines file") from error
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
        first = f". The first error: {bad[0].error}" if bad else ""
        raise InputError(f"--input {path}: none of its {len(bad)} lines has a valid prompt{first}")
    return PromptFile(prompts, bad)


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
        whole = json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError) as error:  # RecursionError: brackets nested deeper than Python's stack
        raise InputError(f"not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f'type {type(value).__name__}: must be an object, such as {{"prompt": "..."}}')
    # Checked here, since the output row repeats all fields.
    messages = value.get("messages")
    for number, message in enumerate(messages if isinstance(messages, list) else ()):
        check_text(json.dumps(message, ensure_ascii=False), f"message {number}")
    check_text(whole, "the line")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _ids(fields: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens of a prompt; text that spells a control token stays text."""
    if taken := [name for name in (*GENERATED, ERROR) if name in fields]:
        raise InputError(f"field {taken[0]!r}: is a field of the output. Rename it")
    if ("prompt" in fields) == ("messages" in fields):
        raise InputError(f"fields {sorted(fields)}: must include either 'prompt' or 'messages'")
    if "messages" in fields:
        return chat_ids(read_messages(fields["messages"], "messages"), tokenizer)
    if not isinstance(fields["prompt"], str):
        raise InputError(f"prompt: has type {type(fields['prompt']).__name__}, and must be a string")
    return tokenizer(fields["prompt"], split_special_tokens=True, verbose=False)["input_ids"]


def chat_ids(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens of a conversation up to the reply.

    Raises:
        InputError: if the messages are not a conversation that ends with a user message.
    """
    ids = render(tokenizer, messages, add_generation_prompt=True, where="messages").input_ids
    if messages[-1]["role"] != "user":
        raise InputError(f"messages end with the role {messages[-1]['role']!r}. The last role must be 'user'")
    return ids
