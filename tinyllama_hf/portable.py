"""Removes traces of a machine from records: paths are cut to their last part, names of user and host are replaced."""

import functools
import getpass
import re
import socket
from pathlib import Path
from typing import Any


# Where a path may begin in a string: at the start, or after one of these. Not after a letter ("a/b"), a dot ("./a") or
# a closing bracket.
_BEGIN = r"(?<![^\s=:,;|@\"'`({])"
# A folder and its separator, but not a separator at the end of a path. A folder can contain spaces and punctuation but
# does not end in any, since the next path begins there. Quantifiers are possessive, so that a text without a path does
# not take time quadratic in its length.
_FOLDER = (
    r"(?:(?:[^/{0}\n\"'`\s,;:]|[,;:](?![\s/{0}])|[ ](?=[^\s/{0}]))++(?<![\s=:,;|@(\[{{<])[/{0}]++"
    r"(?=[^/{0}\s,;:\"'`)\]}}>|]))*+"
)
_POSIX_FOLDERS, _WINDOWS_FOLDERS = _FOLDER.format(""), _FOLDER.format("\\\\")
_LAST = r"[^/\\\s\"'`,;:|(){}\[\]<>]*"
_PATH = re.compile(
    rf"file:/+(?:[A-Za-z]:/+)?{_POSIX_FOLDERS}(?P<url>{_LAST})"
    # Other addresses are kept, since they do not refer to this machine.
    r"|(?P<address>(?<![\w+.-])[A-Za-z][\w+.-]++://[^\s\"'<>]*)"
    rf"|{_BEGIN}~[\w.-]*/+{_POSIX_FOLDERS}(?P<home>{_LAST})"
    rf"|(?<![\w.])(?:[A-Za-z]:[/\\]+|\\\\(?=\w)){_WINDOWS_FOLDERS}(?P<windows>{_LAST})"
    rf"|{_BEGIN}/+(?=[^\s/]){_POSIX_FOLDERS}(?P<posix>{_LAST})"
    # A single part in brackets may be a control token ("[/INST]", "</s>").
    rf"|(?<=[\[<>])/+(?=[^/\s\]>]+/){_POSIX_FOLDERS}(?P<bracketed>{_LAST})"
)
_CACHED = re.compile(r"[/\\]models--((?:(?!--)[\w.-])++)--([\w.-]++)[/\\]snapshots[/\\]([0-9a-f]+)")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(?:@[\w./-]+)?")


def portable(value: Any, names: bool = True) -> Any:
    """Returns a JSON value without traces of this machine. Equal values give equal results.

    Args:
        value (`Any`): dicts, lists, strings and numbers. Absolute paths anywhere in a string, including Windows paths,
            `~` and `file:`, are cut to their last part. Relative paths, Hub ids and addresses are kept. A folder of
            the Hub cache becomes the Hub id it was downloaded from. If keys become equal, all but the first get a
            number.
        names (`bool`, *optional*, defaults to `True`): also replace the names of the user and the host with `user` and
            `host`. Set it to `False` for files that programs read, since a name can be one of their keywords.
    """
    if isinstance(value, dict):
        return _portable_dict(value, names)
    if isinstance(value, list):
        return [portable(entry, names) for entry in value]
    return portable_text(value, names) if isinstance(value, str) else value


def portable_text(text: str, names: bool = True) -> str:
    """Returns a string without absolute paths; see [`portable`]."""
    text = _PATH.sub(_last_part, text)
    if not names or _HUB_ID.fullmatch(text):
        return text
    for pattern, word in _own_names():
        text = pattern.sub(word, text)
    return text


def hub_id(path: str) -> str | None:
    """Returns the Hub id of a folder in the cache of the Hub, or `None` for any other path."""
    match = _CACHED.search(path)
    return f"{match[1]}/{match[2]}" if match else None


def _portable_dict(value: dict[Any, Any], names: bool) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, entry in value.items():
        # Keys are field names, in which a word is not the name of a user, or paths.
        given = portable_text(key, names=False) if isinstance(key, str) else key
        number, unique = 1, given
        while unique in found:
            number += 1
            unique = f"{given} ({number})"
        found[unique] = portable(entry, names)
    return found


def _last_part(match: re.Match[str]) -> str:
    if match["address"]:
        return match["address"]
    if cached := _CACHED.search(match[0]):
        return f"{cached[1]}/{cached[2]}@{cached[3]}{match[0][cached.end() :]}"
    assert match.lastgroup  # every alternative has a group
    return match[match.lastgroup]


@functools.cache
def _own_names() -> list[tuple[re.Pattern[str], str]]:
    """Returns the names of the host and the user, longest first, each with its replacement."""
    host = socket.gethostname()
    words = {host: "host", host.partition(".")[0]: "host"}
    try:
        words[getpass.getuser()] = "user"
    except (OSError, KeyError):  # a container without an entry for the user's id
        pass
    words[Path.home().name] = "user"
    ordered = sorted(filter(None, words), key=len, reverse=True)
    return [(re.compile(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])"), words[word]) for word in ordered]
