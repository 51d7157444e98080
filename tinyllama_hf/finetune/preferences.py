"""Preferences: pairs of a chosen and a rejected reply to the same prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..chat.messages import read_messages
from ..data.row_files import JSON_LINES, read_rows
from ..errors import InputError
from .conversations import check_training_messages


class PreferencePair(NamedTuple):
    """Two replies to the same prompt, and the file and row for error messages.

    The prompt ends with the user. `chosen` and `rejected` contain one message of the assistant each, so the two
    conversations are `prompt + chosen` and `prompt + rejected`. The keys are those of TRL's conversational format.
    """

    name: str
    prompt: list[dict[str, Any]]
    chosen: list[dict[str, Any]]
    rejected: list[dict[str, Any]]


@dataclass(frozen=True)
class PreferenceData:
    """The pairs of all sources."""

    pairs: list[PreferencePair]


def read_preferences(sources: Sequence[str]) -> PreferenceData:
    """Reads and checks preferences.

    Args:
        sources (`Sequence[str]`): JSON lines (plain, `.gz`, `.zst`) with the keys `prompt`, `chosen` and `rejected`,
            lists of messages.

    Raises:
        InputError: for the first invalid row; names the file, the row and the rule.
    """
    pairs = []
    for source in sources:
        path = Path(source)
        if not path.is_file() or not path.name.endswith(JSON_LINES):
            raise InputError(
                f"preferences {source}: no such file. Name a file of JSON lines ({', '.join(JSON_LINES)})"
            )
        pairs += [_pair(f"{source}, row {number}", row) for number, row in read_rows(path)]
    if not pairs:
        raise InputError(f"preferences {', '.join(sources)}: no rows")
    return PreferenceData(pairs)


def _pair(where: str, row: Any) -> PreferencePair:
    if not isinstance(row, dict) or not {"prompt", "chosen", "rejected"} <= row.keys():
        raise InputError(f"{where}: not an object with prompt, chosen and rejected")
    prompt, chosen, rejected = (
        read_messages({"messages": row[column]}, f"{where}, {column}") for column in ("prompt", "chosen", "rejected")
    )
    for column, reply in (("chosen", chosen), ("rejected", rejected)):
        if [message["role"] for message in reply] != ["assistant"]:
            raise InputError(f"{where}, {column}: must be one reply of the assistant")
        check_training_messages(prompt + reply, f"{where}, {column}")
    if chosen == rejected:
        raise InputError(f"{where}: chosen and rejected are identical. Remove the row")
    return PreferencePair(where, prompt, chosen, rejected)
