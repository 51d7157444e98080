"""Whether the Hub can be reached and written to, and what its refusals mean."""

import contextlib
from collections.abc import Iterator
from typing import Any

from ..errors import InputError, one_line


_TOKENS_PAGE = "https://huggingface.co/settings/tokens"
_OFFLINE = "HF_HUB_OFFLINE is set, which forbids to talk to the Hub; unset it"


class Unreachable(InputError):
    """The Hub cannot be asked: no network, offline mode, or an address where nothing answers."""


def check_repo(repo: str, option: str = "--repo") -> None:
    """Refuses what is no name of a repository.

    Raises:
        InputError: if it is not `USER/NAME`.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    reason = "it must be USER/NAME" if repo.count("/") != 1 else ""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        reason = reason or str(error).rstrip(".")
    if reason:
        raise InputError(f"{option} {repo!r}: {reason}; for example me/my-model")


def check_base(base_model: str | None) -> None:
    """Refuses a base model that is not `USER/NAME`, or `USER/NAME@REVISION`.

    Raises:
        InputError: as [`check_repo`].
    """
    if base_model is not None:
        check_repo(base_model.partition("@")[0], "--base-model")


def require_hub() -> None:
    """Refuses to go on in offline mode or without a token.

    Raises:
        InputError: naming which of the two.
    """
    from huggingface_hub import constants, get_token

    if constants.is_offline_mode():
        raise Unreachable(_OFFLINE)
    if get_token() is None:
        raise InputError(
            f"no Hub token: set HF_TOKEN or call `hf auth login`; a token that may write is made at {_TOKENS_PAGE}"
        )


def check_may_write(api: Any, repo: str) -> None:
    """Refuses, before anything is sent, a token that may not write to a repository; call it in [`explain_errors`].

    Args:
        api (`HfApi`): of the Hub in question.
        repo (`str`): `USER/NAME`.

    Raises:
        InputError: if the Hub says that the token may only read, or writes elsewhere.
    """
    account = api.whoami()
    namespace = repo.split("/")[0]
    organisations = [organisation["name"] for organisation in account.get("orgs", [])]
    if namespace not in (account["name"], *organisations):
        belongs = f"belongs to {account['name']}" + (f" of {', '.join(organisations)}" if organisations else "")
        raise InputError(f"--repo {repo}: the token {belongs}, which may not write to {namespace}; name one of these")
    token = account.get("auth", {}).get("accessToken", {})  # of other ways to log in the Hub tells no permissions
    if token.get("role") == "read":
        raise InputError(
            f"the Hub token {token.get('displayName')!r} may only read, and publishing writes to {repo}; make one with the "
            f"role write at {_TOKENS_PAGE}"
        )
    if token.get("role") == "fineGrained" and not _writes(token.get("fineGrained", {}), namespace, repo):
        raise InputError(
            f"the Hub token {token.get('displayName')!r} has no permission repo.write for {repo}; give it one for {namespace} "
            f"or this repository at {_TOKENS_PAGE}"
        )


def _writes(permissions: dict[str, Any], namespace: str, repo: str) -> bool:
    """Whether a fine-grained token writes to a repository."""
    return any(
        "repo.write" in scope.get("permissions", ()) and scope.get("entity", {}).get("name") in (namespace, repo)
        for scope in permissions.get("scoped", ())
    )


@contextlib.contextmanager
def explain_errors(api: Any, repo: str) -> Iterator[None]:
    """Turns what the client raises about the Hub or the connection into a message for the user.

    Raises:
        Unreachable: if nothing answers.
        InputError: for every refusal.
    """
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    again = "call the command again, it goes on where it stopped"
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise Unreachable(_OFFLINE) from error
    except (HTTPError, OSError, RuntimeError) as error:
        cause = error
        if type(error) is RuntimeError and error.__cause__:  # the client's wrapper around a failed upload
            cause = error.__cause__
        reason = one_line(cause)
        if not isinstance(cause, HTTPError):
            raise InputError(
                f"publishing to the Hub {api.endpoint} failed ({reason}); that repaired, {again}"
            ) from error
        if not isinstance(cause, HfHubHTTPError):
            raise Unreachable(
                f"the Hub {api.endpoint} cannot be reached ({reason}); check the connection and HF_ENDPOINT, then {again}"
            ) from error
        status, says = cause.response.status_code, cause.server_message or reason
        if status == 401:
            raise InputError(
                f"the Hub {api.endpoint} does not accept the token ({says}); set HF_TOKEN to a valid one, made at {_TOKENS_PAGE}"
            ) from error
        if status == 403:
            raise InputError(
                f"the Hub {api.endpoint} does not let this token write to {repo} ({says}); use one that may, made at "
                f"{_TOKENS_PAGE}; then {again}"
            ) from error
        if status == 412:
            raise InputError(f"{repo} was changed by somebody else meanwhile ({says}); {again}") from error
        raise InputError(f"the Hub {api.endpoint} answered with status {status} ({says}); {again}") from error
