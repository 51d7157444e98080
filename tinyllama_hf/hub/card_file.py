"""The file of a card, README.md: metadata and a marked region of generated text. Text outside the region is kept when
the card is published again."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError


CARD_FILE = "README.md"
COMMIT_PREFIX = "Publish "
BEGIN = "<!-- tinyllama_hf: generated. Text outside these two comments is kept, text between them is replaced. -->"
END = "<!-- tinyllama_hf: end of the generated text -->"
# The last BEGIN before an END: a comment without its counterpart must not swallow text that was added around it.
_REGION = re.compile(rf"{re.escape(BEGIN)}(?:(?!{re.escape(BEGIN)}).)*?{re.escape(END)}", re.DOTALL)


def write_card(metadata: dict[str, Any], text: str) -> str:
    """The content of a card: metadata, and the text between the two comments."""
    return f"---\n{_dump(metadata)}---\n\n{BEGIN}\n{text.strip()}\n{END}\n"


def is_marked(card: str) -> bool:
    """Whether a card has a region of generated text."""
    return _REGION.search(card) is not None


def merge_with_existing(
    api: Any, repo: str, generated: str, head: str | None, main_head: str | None, computed: Sequence[str]
) -> str:
    """Returns the card to publish: the generated one, merged with the card of the branch on the Hub.

    Args:
        api (`HfApi`): client of the Hub.
        repo (`str`): `USER/NAME`.
        generated (`str`): the card generated from the folder.
        head (`str`, *optional*): commit of the branch; `None` for a new one, which gets the metadata of the main
            branch.
        main_head (`str`, *optional*): commit of the main branch.
        computed (`Sequence[str]`): see [`merge_card`].
    """
    if head and (existing := read_card(api, repo, head)):
        replace = not is_marked(existing) and existing == _last_published(api, repo, head)
        return merge_card(generated, existing, computed, replace)
    main = main_head and read_card(api, repo, main_head)
    return merge_card(generated, _split(main)[0], computed) if main else generated  # the metadata only


def read_card(api: Any, repo: str, commit: str) -> str | None:
    """The card at a commit, `None` if there is none."""
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        path = api.hf_hub_download(repo, CARD_FILE, revision=commit)
    except RemoteEntryNotFoundError:  # its parent class also covers connection errors
        return None
    return Path(path).read_text(encoding="utf-8-sig")


def _last_published(api: Any, repo: str, head: str) -> str | None:
    """The card of the last commit by this package, `None` if there is none. A card equal to it was not edited
    since."""
    commits = api.list_repo_commits(repo, revision=head)
    ours = next((commit.commit_id for commit in commits if commit.title.startswith(COMMIT_PREFIX)), None)
    return ours and read_card(api, repo, ours)


def merge_card(generated: str, existing: str, computed: Sequence[str] = (), replace: bool = False) -> str:
    """Merges a generated card into an existing one, and keeps text and metadata that were added to that.

    Args:
        generated (`str`): from [`write_card`].
        existing (`str`): the card on the Hub.
        computed (`Sequence[str]`, *optional*): fields of the metadata that are computed. They are removed if the
            generated card has no value for them; other fields keep the existing value if the generated card has none.
        replace (`bool`, *optional*, defaults to `False`): the existing text was generated too, although not marked.

    Returns:
        The card to publish. An existing card without the two comments keeps its whole text, followed by the generated
        one.

    Raises:
        InputError: if the metadata of the existing card cannot be read.
    """
    front, theirs, text = _split(existing)
    _, ours, body = _split(generated)
    metadata = {**{key: value for key, value in theirs.items() if key in ours or key not in computed}, **ours}
    if tags := [*_list(theirs.get("tags")), *(ours.get("tags") or ())]:
        metadata["tags"] = list(dict.fromkeys(tags))
    if _REGION.search(text):
        text = _REGION.sub(lambda _: body.strip(), text, count=1)
    elif replace or not text.strip():
        text = body
    else:
        kept = text.replace(BEGIN, "").replace(END, "").rstrip()
        text = f"{kept}\n\n{body.strip()}\n"
    return (front if metadata == theirs else f"---\n{_dump(metadata)}---\n") + text


def _split(card: str) -> tuple[str, dict[str, Any], str]:
    """The metadata block as written, its fields, and the text after it."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    match = REGEX_YAML_BLOCK.search(card)
    if match is None:
        return "", {}, card
    try:
        fields = yaml.safe_load(match[2]) or {}
    except yaml.YAMLError as error:
        raise InputError(
            f"README.md on the Hub: the metadata is not valid YAML ({error}). Correct it on the Hub"
        ) from error
    if not isinstance(fields, dict):
        raise InputError("README.md on the Hub: the metadata is not a YAML mapping. Correct it on the Hub")
    return card[: match.end()], fields, card[match.end() :]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _dump(metadata: dict[str, Any]) -> str:
    return yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1000)
