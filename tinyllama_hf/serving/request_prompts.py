"""The prompt of a server's request as tokens, from each form that OpenAI's interface has for it."""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerFast

from ..batch.prompts import chat_ids
from ..chat.messages import TEXT_PARTS, content_text
from ..errors import InputError
from .request_fields import Limits


# `name` does not reach the template; `type`, `id` and `status` come from answers that clients send back.
_MESSAGE_FIELDS = {"role", "content", "name", "type", "id", "status"}
_FORM = 'must be a list of {"role": "...", "content": "..."}'


def prompt_ids(
    body: dict[str, Any], field: str, instructions: str | None, tokenizer: PreTrainedTokenizerFast, limits: Limits
) -> list[int]:
    """Returns the tokens that a request asks to continue; text that spells a control token stays text.

    Args:
        body (`dict`): the request.
        field (`str`): that holds the prompt: `"prompt"`, `"messages"` or `"input"`.
        instructions (`str`, *optional*): become the system message.
        tokenizer (`PreTrainedTokenizerFast`): the model's tokenizer.
        limits (`Limits`): of the model.

    Raises:
        InputError: if the field is missing, has another form, or more than the context can hold.
    """
    given = body.get(field)
    if given is None:
        raise InputError(f"{field}: is missing")
    if field == "prompt":
        return _ids_of_text(given, tokenizer, limits)
    if isinstance(given, str) and field == "input":
        messages = [{"role": "user", "content": given}]
    else:
        messages = _conversation(given, field, limits)
    if instructions:
        messages.insert(0, {"role": "system", "content": instructions})
    _check_length((message["content"] for message in messages), limits)
    return chat_ids(messages, tokenizer)


def _ids_of_text(prompt: Any, tokenizer: PreTrainedTokenizerFast, limits: Limits) -> list[int]:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, str):
        _check_length([prompt], limits)
        return tokenizer(prompt, split_special_tokens=True, verbose=False)["input_ids"]
    if not prompt or not isinstance(prompt, list) or not all(_is_id(item, limits) for item in prompt):
        raise InputError(
            f"prompt: must be one text, or the ids of its tokens, 0 to {limits.vocab_size - 1}; send several prompts one by "
            "one"
        )
    return prompt


def _is_id(value: Any, limits: Limits) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < limits.vocab_size


def _check_length(texts: Iterable[str], limits: Limits) -> None:
    """Refuses what cannot fit the context, before its tokens are read."""
    if (length := sum(map(len, texts))) > limits.characters:
        raise InputError(
            f"a prompt of {length} characters; must be at most {limits.characters}, as the model's context of "
            f"{limits.context} tokens holds no more"
        )


def _conversation(given: Any, field: str, limits: Limits) -> list[dict[str, Any]]:
    """Messages with only role and text; roles are checked when the conversation is rendered."""
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
        raise InputError(f"{field}: {_FORM}")
    if len(given) > limits.context:  # each message has at least one token
        raise InputError(
            f"{field}: {len(given)} messages; must be at most {limits.context}, the model's context in tokens"
        )
    if field == "input" and given and all("role" not in item and item.get("type") in TEXT_PARTS for item in given):
        return [{"role": "user", "content": content_text(given, field)}]  # the parts of one message
    return [_message(item, f"{field}, message {number}") for number, item in enumerate(given)]


def _message(item: dict[str, Any], where: str) -> dict[str, Any]:
    if item.get("type", "message") != "message":
        raise InputError(f"{where}: type {item['type']!r} is not supported by this server; leave it out")
    if unknown := sorted(key for key, value in item.items() if value and key not in _MESSAGE_FIELDS):
        raise InputError(f"{where}: {unknown[0]} is not supported by this server; leave it out")
    if "role" not in item:
        raise InputError(f"{where}: has no role; {_FORM}")
    role = "system" if item["role"] == "developer" else item["role"]  # its newer name at OpenAI
    return {"role": role, "content": content_text(item.get("content"), where)}
