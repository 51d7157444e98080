"""The card that a branch on the Hub has already, and what of it stays."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .markdown import inherit_metadata, is_marked, merge_card


CARD_FILE = "README.md"
COMMIT_PREFIX = "Publish "


def merge_with_existing(
    api: Any, repo: str, generated: str, head: str | None, main_head: str | None, computed: Sequence[str]
) -> str:
    """Returns the card to publish: the generated one, and what people added to that of the branch.

    Args:
        api (`HfApi`): of the Hub in question.
        repo (`str`): `USER/NAME`.
        generated (`str`): the card from the folder's files.
        head (`str`, *optional*): commit of the branch; `None` for a new one, which gets the metadata of the main branch.
        main_head (`str`, *optional*): commit of the main branch.
        computed (`Sequence[str]`): see [`merge_card`].
    """
    existing = head and read_card(api, repo, head)
    if existing:
        replace = not is_marked(existing) and existing == _last_published(api, repo, head)
        return merge_card(generated, existing, computed, replace)
    main = main_head and read_card(api, repo, main_head)
    return inherit_metadata(generated, main, computed) if main else generated


def read_card(api: Any, repo: str, commit: str) -> str | None:
    """The card at a commit, `None` if it has none."""
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        path = api.hf_hub_download(repo, CARD_FILE, revision=commit)
    except RemoteEntryNotFoundError:  # not its parent, which a broken connection raises too
        return None
    return Path(path).read_text(encoding="utf-8-sig")


def _last_published(api: Any, repo: str, head: str) -> str | None:
    """The card of this package's last commit, `None` if there is none; a card equal to it has not been edited since."""
    commits = api.list_repo_commits(repo, revision=head)
    ours = next((commit.commit_id for commit in commits if commit.title.startswith(COMMIT_PREFIX)), None)
    return ours and read_card(api, repo, ours)
