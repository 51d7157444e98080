"""Text that users give: files in UTF-8 with or without a byte order mark, and strings that are not text."""

from pathlib import Path

from .errors import InputError


ENCODING = "utf-8-sig"  # UTF-8; the byte order mark that Windows programs put first is not part of the text


def read_text(file: Path, newline: str | None = None) -> str:
    """Reads a text file.

    Args:
        file (`Path`): in UTF-8, with or without a byte order mark.
        newline (`str`, *optional*): as for `open`: line ends become `"\\n"` by default, `""` keeps them.

    Raises:
        InputError: if the file cannot be read, or is not UTF-8.
    """
    try:
        with file.open(encoding=ENCODING, newline=newline) as stream:
            return stream.read()
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 ({error.reason} at byte {error.start}); convert it first") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); check the name and the permissions") from error


def check_text(text: str, where: str) -> None:
    """Refuses half of a surrogate pair, which JSON can spell and no tokenizer takes.

    Args:
        text (`str`): anything that a user wrote.
        where (`str`): names its place in the error.

    Raises:
        InputError: naming the character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: character {error.start} is {text[error.start]!a}, half of a surrogate pair, which is not text; "
            "fix or remove it"
        ) from error
