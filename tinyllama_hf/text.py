"""Text from users: files in UTF-8 with or without a byte order mark, and strings that are not valid text."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import InputError


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENCODING = "utf-8-sig"  # UTF-8; a byte order mark, which Windows programs write, is not part of the text


def read_text(file: Path, newline: str | None = None) -> str:
    """Reads a text file.

    Args:
        file (`Path`): in UTF-8, with or without a byte order mark.
        newline (`str`, *optional*): as in `open`. By default line ends become `"\\n"`; `""` keeps them.

    Raises:
        InputError: if the file cannot be read, or is not UTF-8.
    """
    try:
        with file.open(encoding=ENCODING, newline=newline) as stream:
            return stream.read()
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 ({error.reason} at byte {error.start}); convert it to UTF-8") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); check the name and the permissions") from error


def check_text(text: str, where: str) -> None:
    """Checks that a string has no half of a surrogate pair, which JSON can contain and tokenizers reject.

    Args:
        text (`str`): any text from a user.
        where (`str`): its place, which starts the error message.

    Raises:
        InputError: if it has one; names the character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: character {error.start} is {text[error.start]!a}, half of a surrogate pair. Fix or remove it"
        ) from error


def decode_text(
    tokenizer: "PreTrainedTokenizerBase", ids: int | Sequence[int], skip_special_tokens: bool = True
) -> str:
    """Returns the text of one sequence of token ids, by default without control tokens."""
    text = tokenizer.decode(ids if isinstance(ids, int) else list(ids), skip_special_tokens=skip_special_tokens)
    assert isinstance(text, str)  # a list only for a batch of sequences
    return text
