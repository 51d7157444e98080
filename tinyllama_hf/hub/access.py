"""Access to the Hub: checks of the repository name and the token, and clear messages for the errors of the client."""

import contextlib
from collections.abc import Iterator
from typing import Any

from ..errors import InputError, one_line


_TOKENS_PAGE = "https://huggingface.co/settings/tokens"
_OFFLINE = "HF_HUB_OFFLINE is set, so the Hub cannot be used. Unset it"


class Unreachable(InputError):
    """The Hub cannot be reached: no network, offline mode, or no server at the address."""


def check_repo(repo: str, option: str = "--repo") -> None:
    """Checks that a repository name has the form `USER/NAME`.

    Args:
        repo (`str`): the name.
        option (`str`, *optional*, defaults to `"--repo"`): the option that is named in the error.

    Raises:
        InputError: if it has another form.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    reason = "the name must have the form USER/NAME" if repo.count("/") != 1 else ""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        reason = reason or str(error).rstrip(".")
    if reason:
        raise InputError(f"{option} {repo!r}: {reason}, for example me/my-model")


def require_hub() -> None:
    """Checks that the client is online and has a token.

    Raises:
        InputError: if it is offline or has no token.
    """
    from huggingface_hub import constants, get_token

    if constants.is_offline_mode():
        raise Unreachable(_OFFLINE)
    if get_token() is None:
        raise InputError(
            "No Hub token was found. Set HF_TOKEN or run `hf auth login`; create a token with write permission at "
            f"{_TOKENS_PAGE}"
        )


def check_may_write(api: Any, repo: str) -> None:
    """Checks that the token may write to a repository, before anything is uploaded. Call it within [`explain_errors`].

    Args:
        api (`HfApi`): client of the Hub.
        repo (`str`): `USER/NAME`.

    Raises:
        InputError: if the token is read-only or belongs to another account.
    """
    account = api.whoami()
    namespace = repo.split("/")[0]
    organizations = [organization["name"] for organization in account.get("orgs", [])]
    if namespace not in (account["name"], *organizations):
        members = f" (member of {', '.join(organizations)})" if organizations else ""
        raise InputError(
            f"--repo {repo}: the token belongs to {account['name']}{members}, which may not write to {namespace}. "
            "Use one of these accounts as USER"
        )
    token = account.get("auth", {}).get("accessToken", {})  # the Hub reports permissions for access tokens only
    if token.get("role") == "read":
        raise InputError(
            f"The Hub token {token.get('displayName')!r} is read-only, and publishing writes to {repo}. Create one "
            f"with the role write at {_TOKENS_PAGE}"
        )
    scopes = token.get("fineGrained", {}).get("scoped", ())
    writable = [
        scope.get("entity", {}).get("name") for scope in scopes if "repo.write" in scope.get("permissions", ())
    ]
    if token.get("role") == "fineGrained" and not {namespace, repo} & set(writable):
        raise InputError(
            f"The Hub token {token.get('displayName')!r} lacks the permission repo.write for {repo}. Grant it for "
            f"{namespace} or for this repository at {_TOKENS_PAGE}"
        )


@contextlib.contextmanager
def explain_errors(api: Any, repo: str) -> Iterator[None]:
    """Translates errors of the Hub client into messages for the user.

    Raises:
        Unreachable: if the Hub cannot be reached.
        InputError: if the Hub rejects a request.
    """
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    again = "run the command again; it resumes where it stopped"
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise Unreachable(_OFFLINE) from error
    except (HTTPError, OSError, RuntimeError) as error:
        cause: BaseException = error
        if type(error) is RuntimeError and error.__cause__:  # the client's wrapper around a failed upload
            cause = error.__cause__
        reason, hub = one_line(cause), f"The Hub {api.endpoint}"
        if isinstance(cause, HfHubHTTPError):
            message = cause.server_message or reason
            others = f"{hub} answered with status {cause.response.status_code} ({message}); {again}"
            explained = {
                401: f"{hub} rejects the token ({message}). Set HF_TOKEN to a valid one from {_TOKENS_PAGE}",
                403: f"{hub} denies this token write access to {repo} ({message}). Use a token with write permission "
                f"from {_TOKENS_PAGE}, then {again}",
                412: f"{repo} was changed on the Hub in the meantime ({message}); {again}",
            }
            raise InputError(explained.get(cause.response.status_code, others)) from error
        if isinstance(cause, HTTPError):
            raise Unreachable(
                f"{hub} cannot be reached ({reason}). Check the connection and HF_ENDPOINT, then {again}"
            ) from error
        raise InputError(
            f"Publishing to the Hub {api.endpoint} failed ({reason}). Fix the cause, then {again}"
        ) from error
