"""A card as a file: metadata, and a marked region of generated text, around which people may write."""

import re
from collections.abc import Sequence
from typing import Any

import yaml

from ..errors import InputError


BEGIN = "<!-- tinyllama_hf: generated. Text outside these two comments is kept, text between them is replaced. -->"
END = "<!-- tinyllama_hf: end of the generated text -->"
# The last begin before an end, so that a comment that lost its partner does not swallow what people wrote.
_REGION = re.compile(rf"{re.escape(BEGIN)}(?:(?!{re.escape(BEGIN)}).)*?{re.escape(END)}", re.DOTALL)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_card(metadata: dict[str, Any], parts: Sequence[str]) -> str:
    """A whole card: metadata, and the parts that are not empty between the two comments."""
    body = "\n\n".join(part for part in parts if part)
    return f"---\n{_dump(metadata)}---\n\n{BEGIN}\n{body}\n{END}\n"


def is_marked(card: str) -> bool:
    """Whether a card has a region that this package wrote."""
    return _REGION.search(card) is not None


def merge_card(generated: str, existing: str, computed: Sequence[str] = (), replace: bool = False) -> str:
    """Puts a generated card in the place of an earlier one, and keeps what people added to that.

    Args:
        generated (`str`): from [`write_card`].
        existing (`str`): the card on the Hub.
        computed (`Sequence[str]`, *optional*): fields of the metadata that the earlier card may have from us: without a
            value in the generated card they are removed. Of all others the earlier value stays where we have none.
        replace (`bool`, *optional*, defaults to `False`): the earlier text is ours, although no comments mark it.

    Returns:
        The card to publish. A card without comments keeps its whole text, and gets ours at the end.

    Raises:
        InputError: if the metadata of the earlier card cannot be read.
    """
    front, theirs, text = _split(existing)
    _, ours, body = _split(generated)
    metadata = {**{key: value for key, value in theirs.items() if key in ours or key not in computed}, **ours}
    if tags := [*_list(theirs.get("tags")), *(ours.get("tags") or ())]:
        metadata["tags"] = list(dict.fromkeys(tags))
    region = _REGION.search(body)[0]
    if _REGION.search(text):
        text = _REGION.sub(lambda _: region, text, count=1)
    elif replace or not text.strip():
        text = body
    else:
        kept = text.replace(BEGIN, "").replace(END, "").rstrip()
        text = f"{kept}\n\n{region}\n"
    return (front if metadata == theirs else f"---\n{_dump(metadata)}---\n") + text


def inherit_metadata(generated: str, main: str, computed: Sequence[str]) -> str:
    """A generated card of a new branch, with the metadata that people gave to the card of the main branch."""
    front, _, _ = _split(main)
    return merge_card(generated, front, computed)


def _split(card: str) -> tuple[str, dict[str, Any], str]:
    """The block of metadata as it is written, its fields, and the text after it."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    match = REGEX_YAML_BLOCK.search(card)
    if match is None:
        return "", {}, card
    try:
        fields = yaml.safe_load(match[2]) or {}
    except yaml.YAMLError as error:
        raise InputError(
            f"README.md on the Hub: its metadata is not valid YAML ({error}); correct it there"
        ) from error
    if not isinstance(fields, dict):
        raise InputError("README.md on the Hub: its metadata is not a mapping of fields; correct it there")
    return card[: match.end()], fields, card[match.end() :]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _dump(metadata: dict[str, Any]) -> str:
    return yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1000)
