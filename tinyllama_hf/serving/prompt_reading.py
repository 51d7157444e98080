"""Reads and encodes the prompt of a request, in any of its forms; control tokens in it are treated as text."""

import contextlib
import reprlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..batch.prompts import chat_ids
from ..chat.messages import TEXT_PARTS, content_text
from ..chat.render import ROLES
from ..decoding.proposals import Proposer
from ..errors import InputError
from ..inference.generation import Context
from ..text import decode_text
from .call import Refusal


TOO_LONG = "context_length_exceeded"  # OpenAI's code
# `name` is not given to the template; `type`, `id` and `status` come from answers that clients send back.
_MESSAGE_FIELDS = {"role", "content", "name", "type", "id", "status"}
_FORM = 'must be a list of {"role": "...", "content": "..."}'
_LONGEST_MESSAGE = 1000  # characters
_REPR = reprlib.Repr()  # formats only a part of a large value, where `repr` takes a second
_REPR.maxstring = 200


class Limits(NamedTuple):
    """Limits on a request.

    Attributes:
        vocab_size (`int`): size of the model's vocabulary.
        context (`int`): the context in tokens, of the model or of a draft with a shorter one.
        characters (`int`): maximum number of characters that fit the context. Longer prompts are refused before they
            are encoded, since encoding megabytes takes seconds.
        messages (`int`): maximum number of messages of a conversation.
        new_tokens (`int`): maximum number of tokens of a reply; larger requests are reduced to it.
        prompts (`int`): maximum number of prompts of a completion.
        n (`int`): maximum number of replies to a prompt.
    """

    vocab_size: int
    context: int
    characters: int
    messages: int
    new_tokens: int
    prompts: int = 128
    n: int = 8

    @classmethod
    def of(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, draft: Proposer | None = None, **options: int
    ) -> "Limits":
        """Returns the limits of a model and its tokenizer; `options` replace those derived from the context."""
        context = Context.of(model, draft).tokens
        characters = context * max(map(len, tokenizer.get_vocab()))
        derived = {"characters": characters, "messages": context, "new_tokens": context}
        return cls(model.config.vocab_size, context, **derived | options)


class EncodedPrompt(NamedTuple):
    """The tokens of a prompt, and its text if it was given as text."""

    ids: list[int]
    given: str | None = None

    def text(self, tokenizer: PreTrainedTokenizerFast) -> str:
        """Returns the text of the prompt, for `echo`."""
        return decode_text(tokenizer, self.ids) if self.given is None else self.given


def quoted(value: Any) -> str:
    """Returns a value of a request for an error message, shortened if it is long."""
    return _REPR.repr(value)


def refused(field: str | None, message: str, code: str | None = None) -> Refusal:
    """Returns the refusal of a field with status 400; a long message is shortened in the middle."""
    if len(message) > _LONGEST_MESSAGE:
        message = f"{message[: _LONGEST_MESSAGE // 2]} ... {message[-_LONGEST_MESSAGE // 2 :]}"
    return Refusal(message, code=code, param=field)


@contextlib.contextmanager
def refusing(field: str) -> Iterator[None]:
    """Turns an `InputError` into the refusal of a field."""
    try:
        yield
    except InputError as error:
        raise refused(field, str(error)) from error


def encode_prompts(
    given: Any, field: str, instructions: str | None, tokenizer: PreTrainedTokenizerFast, limits: Limits
) -> list[EncodedPrompt]:
    """Encodes the prompts of a request.

    Args:
        given (`Any`): the value of the field: for `"prompt"` a string, token ids, or a list of either; for
            `"messages"` a conversation; for `"input"` a conversation, a string, or the parts of one message.
        field (`str`): the name of the field.
        instructions (`str`, *optional*): the system message.
        tokenizer (`PreTrainedTokenizerFast`): the model's tokenizer; chat needs its chat template.
        limits (`Limits`): limits on the request.

    Raises:
        Refusal: if the value is anything else, a conversation that does not end with a user message, or too long.
    """
    with refusing(field):
        if field != "prompt":
            return [EncodedPrompt(_conversation_ids(given, field, instructions, tokenizer, limits))]
        is_one = isinstance(given, str) or (isinstance(given, list) and given and type(given[0]) is int)
        prompts = [given] if is_one else given
        if not isinstance(prompts, list) or not 0 < len(prompts) <= limits.prompts:
            raise InputError(
                f"prompt {quoted(given)}: must be a string, a list of token ids, or a list of up to {limits.prompts} "
                "of these"
            )
        return [_encode(prompt, tokenizer, limits) for prompt in prompts]


def _encode(prompt: Any, tokenizer: PreTrainedTokenizerFast, limits: Limits) -> EncodedPrompt:
    if isinstance(prompt, str):
        _check_characters([prompt], "prompt", limits)
        return EncodedPrompt(tokenizer(prompt, split_special_tokens=True, verbose=False)["input_ids"], prompt)
    valid = range(limits.vocab_size)
    if not prompt or not isinstance(prompt, list) or not all(type(item) is int and item in valid for item in prompt):
        raise InputError(
            f"prompt {quoted(prompt)}: must be a string or a list of token ids from 0 to {limits.vocab_size - 1}"
        )
    return EncodedPrompt(prompt)


def _conversation_ids(
    given: Any, field: str, instructions: str | None, tokenizer: PreTrainedTokenizerFast, limits: Limits
) -> list[int]:
    if isinstance(given, str) and field == "input":
        given = [{"role": "user", "content": given}]
    messages = [{"role": "system", "content": instructions}] if instructions else []
    messages += _read_conversation(given, field, limits)
    _check_characters((message["content"] for message in messages), field, limits)
    return chat_ids(messages, tokenizer)


def _read_conversation(given: Any, field: str, limits: Limits) -> list[dict[str, Any]]:
    """Returns messages with role and text only; their order is checked when the conversation is rendered."""
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
        raise InputError(f"{field}: {_FORM}")
    if len(given) > limits.messages:
        raise InputError(f"{field}: {len(given)} messages; must be at most {limits.messages}")
    if field == "input" and given and all("role" not in item and item.get("type") in TEXT_PARTS for item in given):
        return [{"role": "user", "content": content_text(given, field)}]  # the parts of one message
    return [_read_turn(item, f"{field}, message {number}") for number, item in enumerate(given)]


def _read_turn(item: dict[str, Any], where: str) -> dict[str, Any]:
    if item.get("type", "message") != "message":
        raise InputError(f"{where}: type {quoted(item['type'])} not supported by this server; leave it out")
    if unknown := sorted(key for key, value in item.items() if value and key not in _MESSAGE_FIELDS):
        raise InputError(f"{where}: {unknown[0]} not supported by this server; leave it out")
    if "role" not in item:
        raise InputError(f"{where}: has no role; {_FORM}")
    role = "system" if item["role"] == "developer" else item["role"]  # OpenAI's newer name of the role
    if role not in ROLES:
        raise InputError(f"{where}: role {quoted(role)}; must be one of developer, {', '.join(ROLES)}")
    return {"role": role, "content": content_text(item.get("content"), where)}


def _check_characters(texts: Iterable[str], field: str, limits: Limits) -> None:
    """Refuses text that cannot fit the context, before encoding it."""
    if (length := sum(map(len, texts))) > limits.characters:
        raise refused(
            field,
            f"{field}: {length} characters; must be at most {limits.characters}, since the context has "
            f"{limits.context} tokens. Shorten it",
            TOO_LONG,
        )
