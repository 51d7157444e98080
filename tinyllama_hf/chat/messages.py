"""Reads the messages of data files and requests: valid keys, text parts, and replies that are not trained on."""

from collections.abc import Mapping
from typing import Any

from ..errors import InputError, did_you_mean


TEXT_PARTS = ("text", "input_text", "output_text")
_LIST = '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
# Keys that mark whether a message is trained on: OpenAI's, and those of other trainers; with their values.
_LEARNED = {"weight": (0, 1), "train": (False, True), "training": (False, True)}
_KEYS = ("role", "content", *_LEARNED)


def read_messages(messages: Any, where: str) -> list[dict[str, Any]]:
    """Reads the messages of a conversation; roles and their order are checked when it is rendered.

    Args:
        messages (`Any`): a list of objects. The content of a message is a string, or a list of text parts, which are
            joined with a space as by the server. `"weight": 0`, `"train": false` and `"training": false` mark a reply
            that is not trained on. Keys with null or empty values are ignored.
        where (`str`): name of the conversation in error messages.

    Returns:
        `role` and `content` of each message, and `"weight": 0` for a reply that is not trained on.

    Raises:
        InputError: if a key is unknown or has no effect, or a content is not text; the message has the place and the
            key.
    """
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise InputError(f"{where}: not a list of messages, such as {_LIST}")
    return [_message(message, f"{where}, message {number}") for number, message in enumerate(messages)]


def content_text(content: Any, where: str) -> str:
    """Returns the text of a message's content; parts are joined with a space, as by the server of transformers (5.23).

    Args:
        content (`Any`): a string, or a list of text parts.
        where (`str`): name of the message in error messages.

    Raises:
        InputError: if it is anything else.
    """
    if isinstance(content, str):
        return content
    rule = 'must be a string or a list of {"type": "text", "text": "..."}'
    if not isinstance(content, list):
        raise InputError(f"{where}: content is {'null' if content is None else type(content).__name__}; {rule}")
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if not isinstance(part, Mapping) or kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
            raise InputError(f"{where}: content part {number} (type {kind!r}) has no text; {rule}")
    return " ".join(part["text"] for part in content)


def is_learned(message: Mapping[str, Any]) -> bool:
    """Returns whether a message is a reply to train on."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    given = {key: value for key, value in message.items() if value not in (None, "", [], {})}
    if unknown := [key for key in given if key not in _KEYS]:
        raise InputError(
            f"{where}: key {unknown[0]!r} not supported{did_you_mean(unknown[0], _KEYS)}. Remove the key, or the "
            "conversation if it depends on it"
        )
    found = {"role": message.get("role"), "content": content_text(message.get("content"), where)}
    learned = _learned(given, where)
    if learned and found["role"] != "assistant":
        key = next(key for key in _LEARNED if key in given)
        raise InputError(
            f"{where}: {key!r} is {given[key]!r} for the role {found['role']!r}, but only replies of the assistant "
            "are trained on. Remove the key"
        )
    return {**found, "weight": 0} if learned is False and found["role"] == "assistant" else found


def _learned(message: Mapping[str, Any], where: str) -> bool | None:
    """Returns whether a message is marked to be trained on, `None` if it has no such key."""
    said = {}
    for key, valid in _LEARNED.items():
        if key in message:
            if message[key] not in valid or isinstance(message[key], bool) != isinstance(valid[0], bool):
                raise InputError(
                    f"{where}: {key!r} is {message[key]!r}; must be {' or '.join(map(str, valid)).lower()}"
                )
            said[key] = bool(message[key])
    if len(set(said.values())) > 1:
        raise InputError(f"{where}: {' and '.join(map(repr, said))} contradict each other; keep only one")
    return next(iter(said.values()), None)
