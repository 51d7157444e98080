"""Preferences: pairs of a chosen and a rejected reply to the same prompt."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import InputError
from .config import ConversationSource
from .conversation_sources import SourceSummary, read_items
from .conversations import check_training_messages
from .row_formats import PREFERENCES, as_messages


class PreferencePair(NamedTuple):
    """Two replies to the same prompt, the file and row for error messages, and the number of the source.

    The prompt ends with the user. `chosen` and `rejected` contain one message of the assistant each, so the two
    conversations are `prompt + chosen` and `prompt + rejected`. The keys are those of TRL's conversational format.
    """

    name: str
    prompt: list[dict[str, Any]]
    chosen: list[dict[str, Any]]
    rejected: list[dict[str, Any]]
    source: int = 0


@dataclass(frozen=True)
class PreferenceData:
    """The pairs of all sources, and what was read from each."""

    pairs: list[PreferencePair]
    sources: list[SourceSummary]


def read_preferences(sources: Sequence[ConversationSource], invalid: str = "error") -> PreferenceData:
    """Reads and checks preferences.

    Args:
        sources (`Sequence[ConversationSource]`): files or data sets of the Hub with `chosen` and `rejected`, either
            replies to `prompt` (all three as strings or lists of messages), or whole conversations that differ in the
            last reply only.
        invalid (`str`, *optional*, defaults to `"error"`): `"drop"` leaves invalid rows out and counts them.

    Raises:
        InputError: if a source cannot be read or has no valid row, and for the first invalid row unless they are
            dropped; names the file, the row and the rule.
    """
    return PreferenceData(*read_items(sources, PREFERENCES, invalid, _pair))


def _pair(name: str, columns: dict[str, Any], where: str, source: int) -> PreferencePair:
    chosen, rejected = (
        _plain(as_messages(columns[column], "assistant", f"{where}, {column}"), f"{where}, {column}")
        for column in ("chosen", "rejected")
    )
    given = columns["prompt"]
    prompt = [] if given is None else _plain(as_messages(given, "user", f"{where}, prompt"), f"{where}, prompt")
    if not all(messages and messages[0]["role"] == "assistant" for messages in (chosen, rejected)):
        prompt, chosen, rejected = _without_prompt(prompt, chosen, rejected, where)
    elif not prompt:
        raise InputError(f"{where}: chosen and rejected are replies, but there is no prompt")
    for column, reply in (("chosen", chosen), ("rejected", rejected)):
        if (roles := [message["role"] for message in reply]) != ["assistant"]:
            raise InputError(
                f"{where}, {column}: after the prompt, which chosen and rejected share, come the roles {roles}; must "
                "be one reply of the assistant"
            )
        check_training_messages(prompt + reply, f"{where}, {column}")
    if chosen == rejected:
        raise InputError(f"{where}: chosen and rejected are identical. Remove the row")
    return PreferencePair(where, prompt, chosen, rejected, source)


def _without_prompt(
    prompt: list[dict[str, Any]], chosen: list[dict[str, Any]], rejected: list[dict[str, Any]], where: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Splits two whole conversations into the messages that they share, without the last reply, and the others."""
    pairs = zip(chosen[:-1], rejected[:-1], strict=False)
    found = [message for message, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    if any(message not in found for message in prompt):
        raise InputError(
            f"{where}: chosen and rejected are whole conversations, which do not begin with the prompt. Remove the "
            "column prompt, or the row"
        )
    return found, chosen[len(found) :], rejected[len(found) :]


def _plain(messages: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """Returns messages of which none has a weight, which preferences do not have."""
    if any("weight" in message for message in messages):
        raise InputError(f"{where}: a reply has weight 0, which preferences do not support. Remove the key")
    return messages
