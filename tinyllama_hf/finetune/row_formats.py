"""The formats of fine-tuning data: which one a row has, and the messages in it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..chat.messages import content_text, read_messages
from ..errors import InputError


class RowFormat(NamedTuple):
    """The columns of a format. All but the optional ones must have a value."""

    name: str
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()


CONVERSATIONS = (
    RowFormat("messages", ("messages",)),
    RowFormat("prompt/completion", ("prompt", "completion")),
    RowFormat("ShareGPT", ("conversations",)),
    RowFormat("Alpaca", ("instruction", "output"), ("input",)),
)
PREFERENCES = (RowFormat("preferences", ("chosen", "rejected"), ("prompt",)),)
_RECIPES = {CONVERSATIONS: "recipes/sft.py", PREFERENCES: "recipes/dpo.py"}
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "model"), "assistant"),
    "system": "system",
}
# Fields that change the conversation or the loss, and are not supported. All other fields are ignored.
_UNSUPPORTED = frozenset(
    "chat_template chat_template_kwargs documents function_call functions history parallel_tool_calls system "
    "tool_choice tools train training weight".split()
)


def find_format(
    row: Any, formats: tuple[RowFormat, ...], columns: Mapping[str, str], where: str
) -> tuple[str, dict[str, Any]]:
    """Recognizes the format of a row by its columns.

    Args:
        row (`Any`): from a file.
        formats (`tuple[RowFormat, ...]`): [`CONVERSATIONS`] or [`PREFERENCES`].
        columns (`Mapping[str, str]`): the name in the file of each column that has another one. Only formats with
            these columns are considered.
        where (`str`): name of the row in error messages.

    Returns:
        The name of the format, and its columns. Other columns are ignored, except those that would change the
        conversation or the loss.

    Raises:
        InputError: if the row has the columns of no format or of several, or a column that would change the loss.
    """
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: type {type(row).__name__}; must be an object with columns")
    given = {name: value for name, value in row.items() if value not in (None, "", [], {})}
    if missing := [(key, name) for key, name in columns.items() if name not in row]:
        key, name = missing[0]
        raise InputError(f"{where}: no column {name!r} (columns.{key} of the recipe), only: {', '.join(sorted(row))}")
    named = {**row, **{key: row[name] for key, name in columns.items()}}
    found = _matching(named, formats, columns)
    if len(found) != 1:
        raise InputError(f"{where}: {_not_one(given, named, formats, found)}")
    if unsupported := sorted(_UNSUPPORTED & given.keys() - set(columns.values())):
        raise InputError(
            f"{where}: field {unsupported[0]!r} is not supported, since it would change the conversation or the loss. "
            "Write it into the messages, or remove it"
        )
    return found[0].name, {name: named.get(name) for name in found[0].columns + found[0].optional}


def _matching(row: Mapping[str, Any], formats: tuple[RowFormat, ...], columns: Mapping[str, str]) -> list[RowFormat]:
    return [
        kind
        for kind in formats
        if all(row.get(name) is not None for name in kind.columns) and {*columns} <= {*kind.columns, *kind.optional}
    ]


def _not_one(
    given: Mapping[str, Any], named: Mapping[str, Any], formats: tuple[RowFormat, ...], found: list[RowFormat]
) -> str:
    if found:
        names = " and of ".join(kind.name for kind in found)
        return f"has the columns of {names}. Name the columns to read in the recipe, under columns of the source"
    others = next(other for other in _RECIPES if other != formats)
    if wrong := _matching(named, others, {}):
        return (
            f"has the columns of {wrong[0].name} ({', '.join(wrong[0].columns)}), which {_RECIPES[others]} reads, not "
            f"{_RECIPES[formats]}. Use that recipe or other data"
        )
    known = "; ".join(f"{', '.join(kind.columns)} ({kind.name})" for kind in formats)
    return (
        f"no known format: the columns with a value are {', '.join(sorted(given))}. Known are {known}. Name other "
        "columns in the recipe, under columns of the source"
    )


def conversation_messages(name: str, columns: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Returns the messages of a conversation in one of the formats [`CONVERSATIONS`].

    In `prompt/completion`, replies in the prompt have no loss, as in TRL. `Alpaca` has the columns of Stanford
    Alpaca; its input is put below the instruction, after an empty line, as in the prompt of that project. The prompt's
    headings are left out, since the chat template marks where turns begin.

    Args:
        name (`str`): the format, from [`find_format`].
        columns (`Mapping[str, Any]`): the columns, from [`find_format`].
        where (`str`): name of the row in error messages.

    Raises:
        InputError: see [`read_messages`].
    """
    if name == "messages":
        return read_messages(columns["messages"], where)
    if name == "ShareGPT":
        return read_messages(_renamed(columns["conversations"], where), where)
    if name == "prompt/completion":
        prompt = as_messages(columns["prompt"], "user", f"{where}, prompt")
        without_loss = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in prompt]
        return without_loss + as_messages(columns["completion"], "assistant", f"{where}, completion")
    asked, given, answer = (
        content_text(columns[column] or "", f"{where}, {column}") for column in ("instruction", "input", "output")
    )
    return [
        {"role": "user", "content": f"{asked}\n\n{given}" if given else asked},
        {"role": "assistant", "content": answer},
    ]


def as_messages(value: Any, role: str, where: str) -> list[dict[str, Any]]:
    """Returns a string as one message of a role, and a list of messages as [`read_messages`] reads it."""
    return [{"role": role, "content": value}] if isinstance(value, str) else read_messages(value, where)


def _renamed(turns: Any, where: str) -> Any:
    """Replaces the names of ShareGPT by those of messages, where they are as expected."""
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise InputError(f'{where}: conversations is not a list such as [{{"from": "human", "value": "..."}}]')
    messages = []
    for number, turn in enumerate(turns):
        if "from" not in turn or "value" not in turn:
            hint = ". Name the column in the recipe: columns: {messages: conversations}" * ("role" in turn)
            raise InputError(f"{where}, message {number}: no 'from' and 'value', only: {', '.join(turn)}{hint}")
        if str(turn["from"]) not in _ROLES:
            raise InputError(f"{where}, message {number}: unknown 'from' {turn['from']!r}; valid: {', '.join(_ROLES)}")
        rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
        messages.append({**rest, "role": _ROLES[turn["from"]], "content": turn["value"]})
    return messages
