"""Publishing to the Hub: the milestones of a run as revisions, with the newest on main; or a single model folder."""

import fnmatch
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from .. import provenance
from ..errors import InputError
from .access import Unreachable, check_may_write, check_repo, explain_errors, require_hub
from .card_file import CARD_FILE, COMMIT_PREFIX, is_marked, merge_with_existing, read_card
from .model_folder import OUTDATED, PROVENANCE_FILE
from .revisions import MAIN, Revision, content_bytes, plan_revisions


_GIT_FILE = ".gitattributes"  # the Hub writes it into every repository


class Published(NamedTuple):
    """The result for one revision: its URL, and the paths that were uploaded or deleted (in a dry run: would be)."""

    revision: str
    url: str
    changed: list[str]


def publish(
    run: str | Path,
    repo: str,
    private: bool = False,
    license: str | None = None,
    dry_run: bool = False,
    note: Callable[[str], Any] = lambda line: None,
    base_model: str | None = None,
) -> list[Published]:
    """Publishes the milestones of a run, or one model folder on main: fine-tuned, converted, quantized or an adapter.

    Each revision is uploaded in one commit, so a revision is never visible in part. Files that the Hub already has are
    not uploaded again: a second call uploads nothing, and an interrupted one resumes. Files, text and metadata that
        were added
    on the Hub are kept. No uploaded file contains an absolute path or the name of the user or the host.

    Args:
        run (`str` or `Path`): folder of a run, or a model folder.
        repo (`str`): `USER/NAME`; created if it does not exist.
        private (`bool`, *optional*, defaults to `False`): create a private repository.
        license (`str`, *optional*): license identifier of the Hub, for the card; by default that of the card on the
            Hub.
        dry_run (`bool`, *optional*, defaults to `False`): check everything, print what would be uploaded, and stop.
        note (`Callable`): called with each line for the user.
        base_model (`str`, *optional*): Hub id of the base model, if the folder does not record it.

    Returns:
        `list[Published]`: in the order of upload.

    Raises:
        InputError: if something cannot be published. Raised before the first upload, except for connection errors.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    check_repo(repo)
    if base_model is not None:
        check_repo(base_model.partition("@")[0], "--base-model")
    if not dry_run:
        require_hub()
    revisions = plan_revisions(Path(run), repo, license, base_model)
    if dry_run:
        return _dry_run(api, repo, revisions, private, note)
    with explain_errors(api, repo):
        heads = _heads(api, repo, private)
        check_may_write(api, repo)
        revisions = _merge_cards(api, repo, heads, revisions)
        _check_card(revisions[-1])
        if not heads:
            api.create_repo(repo, private=private or None)  # None: the default of the account
            heads = _heads(api, repo, private)
        return [_upload(api, repo, heads, revision, note) for revision in revisions]


def _check_card(revision: Revision) -> None:
    """Has the Hub validate the metadata of a card before anything is uploaded."""
    from huggingface_hub import ModelCard

    try:
        ModelCard(revision.card).validate()
    except ValueError as error:
        raise InputError(
            f"The Hub rejects the metadata of the card ({error}). If the license is the cause, change --license"
        ) from error


def _merge_cards(api: Any, repo: str, heads: dict[str, str], revisions: Sequence[Revision]) -> list[Revision]:
    """The revisions with the text and metadata that were added to their cards on the Hub."""
    merged = []
    for revision in revisions:
        head, main_head = heads.get(revision.name), heads.get(MAIN)
        card = merge_with_existing(api, repo, revision.card, head, main_head, revision.computed)
        merged.append(replace(revision, card=card))
    return merged


def _heads(api: Any, repo: str, private: bool) -> dict[str, str]:
    """The commit of each branch; none if the repository does not exist.

    Raises:
        InputError: if it is public although `private` is set, or holds files of another origin.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repo, timeout=30)  # without it the client waits forever
    except RepositoryNotFoundError:
        return {}
    if private and not info.private:
        raise InputError(f"--private: {repo} exists and is public. Make it private in its settings, or choose another")
    present = {sibling.rfilename for sibling in info.siblings} - {_GIT_FILE, CARD_FILE}
    if present and PROVENANCE_FILE not in present and not is_marked(read_card(api, repo, info.sha) or ""):
        raise InputError(
            f"--repo {repo}: holds other files ({', '.join(sorted(present)[:3])}), which publishing would replace. "
            "Choose another repository"
        )
    return {branch.name: branch.target_commit for branch in api.list_repo_refs(repo).branches}


def _upload(api: Any, repo: str, heads: dict[str, str], revision: Revision, note: Callable[[str], Any]) -> Published:
    """Updates a branch to a revision in one commit. Files that were added on the Hub are kept."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    head = heads.get(revision.name)
    if head is None:
        # From the first commit, which holds no model: a branch from main would expose the weights of another
        # milestone.
        head = api.list_repo_commits(repo)[-1].commit_id
        api.create_branch(repo, branch=revision.name, revision=head)
    added, removed = _difference(api, repo, head, revision)
    result = Published(revision.name, _url(api, repo, revision), [*added, *removed])
    if not result.changed:
        note(f"{result.url}  up to date")
        return result
    note(f"uploading {revision.name}: {_amount(revision, added)}")
    additions = [CommitOperationAdd(path, revision.files[path]) for path in added]
    operations = [*additions, *(CommitOperationDelete(path) for path in removed)]
    title = "card" if set(result.changed) == {CARD_FILE} else revision.source
    api.create_commit(
        repo, operations, commit_message=f"{COMMIT_PREFIX}{title}", revision=revision.name, parent_commit=head
    )
    note(f"{result.url}  uploaded")
    return result


def _dry_run(
    api: Any, repo: str, revisions: Sequence[Revision], private: bool, note: Callable[[str], Any]
) -> list[Published]:
    """Prints what would be uploaded, compared with the Hub if it can be reached."""
    note(f"{repo}{', private' if private else ''}: {len(revisions)} revision{'s' * (len(revisions) > 1)}")
    heads = _ask(api, repo, private, note)
    results, contents = [], set()
    with explain_errors(api, repo):
        revisions = _merge_cards(api, repo, heads, revisions)
        changes = [_difference(api, repo, heads.get(revision.name), revision) for revision in revisions]
    for revision, (added, removed) in zip(revisions, changes, strict=True):
        results.append(Published(revision.name, _url(api, repo, revision), [*added, *removed]))
        state = f"to upload: {_amount(revision, added)}" if results[-1].changed else "up to date"
        origin = "" if revision.name == revision.source else f"from {revision.source}, "
        num_bytes = sum(map(content_bytes, revision.files.values()))
        note(f"{revision.name}  {origin}{num_bytes:,} bytes; {state}")
        for path, content in sorted(revision.files.items()):
            note(f"  {content_bytes(content):>14,}  {path}{'' if path in added else '  up to date'}")
        for path in removed:
            note(f"  {'':>14}  {path}  to delete")
        contents |= {revision.files[path] for path in added}
    total = sum(map(content_bytes, contents))
    note(f"at most {total:,} bytes to upload; files shared by several revisions are uploaded once")
    note("dry run: nothing was uploaded")
    return results


def _ask(api: Any, repo: str, private: bool, note: Callable[[str], Any]) -> dict[str, str]:
    """The commit of each branch on the Hub; empty if it cannot be reached or the repository does not exist."""
    from huggingface_hub import get_token

    try:
        with explain_errors(api, repo):
            heads = _heads(api, repo, private)
            if get_token():
                check_may_write(api, repo)
    except Unreachable as error:
        note(f"not compared with the Hub: {error}")
        return {}
    note("the repository exists" if heads else "the repository does not exist, or this token has no access to it")
    return heads


def _difference(api: Any, repo: str, commit: str | None, revision: Revision) -> tuple[list[str], list[str]]:
    """The paths to add or replace, and those to delete, to get from a commit, if there is one, to a revision."""
    from huggingface_hub import RepoFile

    entries = api.list_repo_tree(repo, revision=commit, recursive=True) if commit else ()
    existing = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    added = [path for path, content in revision.files.items() if not _equal(content, existing.get(path))]
    ours = [path for path in existing if "/" not in path and any(fnmatch.fnmatch(path, name) for name in OUTDATED)]
    return added, sorted(set(ours) - revision.files.keys())


def _equal(content: Path | bytes, existing: Any) -> bool:
    """Whether a file on the Hub has this content, by size and SHA-256, or by the git hash of a small file."""
    from huggingface_hub.utils.sha import git_hash

    if existing is None or existing.size != content_bytes(content):
        return False
    if existing.lfs is None:
        return git_hash(content if isinstance(content, bytes) else content.read_bytes()) == existing.blob_id
    sha256 = provenance.file_sha256(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
    return sha256 == existing.lfs.sha256


def _amount(revision: Revision, paths: Sequence[str]) -> str:
    total = sum(content_bytes(revision.files[path]) for path in paths)
    return f"{len(paths)} file{'s' * (len(paths) != 1)}, {total:,} bytes"


def _url(api: Any, repo: str, revision: Revision) -> str:
    return f"{api.endpoint}/{repo}" + ("" if revision.name == MAIN else f"/tree/{revision.name}")
