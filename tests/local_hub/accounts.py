"""Accounts and permissions of the local Hub: one user, two organizations, and a token of each kind of the Hub."""

from typing import Any

from .storage import HubError


USER = "demo"
ORGANIZATION = "demo-lab"
READ_ORGANIZATION = "demo-readers"  # the user has read permission in it
# These are not secrets: the server listens on localhost only.
WRITE_TOKEN = "hf_local_write"
READ_TOKEN = "hf_local_read"
# Fine-grained: may write to one repository of the user only.
FINE_TOKEN = "hf_local_fine_grained"
FINE_REPOSITORY = f"{USER}/only-this"

_FINE_GRAINED = {
    "canReadGatedRepos": False,
    "global": [],
    "scoped": [
        {
            "entity": {"type": "model", "name": FINE_REPOSITORY},
            "permissions": ["repo.content.read", "repo.write"],
        }
    ],
}
_TOKENS: dict[str, dict[str, Any]] = {
    WRITE_TOKEN: {"displayName": "write", "role": "write"},
    READ_TOKEN: {"displayName": "read", "role": "read"},
    FINE_TOKEN: {"displayName": "fine", "role": "fineGrained", "fineGrained": _FINE_GRAINED},
}


def authenticate(authorization: str | None) -> str | None:
    """The token of a request, `None` for an anonymous one.

    Raises:
        HubError: if the token is unknown.
    """
    if authorization is None:
        return None
    token = authorization.removeprefix("Bearer ")
    if token not in _TOKENS:
        raise HubError(401, "Invalid credentials in Authorization header")
    return token


def whoami(token: str | None) -> dict[str, Any]:
    """The account of a token, as the endpoint `whoami` returns it."""
    if token is None:
        raise HubError(401, "Invalid username or password.")
    return {
        "type": "user",
        "id": "0",
        "name": USER,
        "orgs": [
            {"type": "org", "name": ORGANIZATION, "roleInOrg": "write"},
            {"type": "org", "name": READ_ORGANIZATION, "roleInOrg": "read"},
        ],
        "auth": {"type": "access_token", "accessToken": _TOKENS[token]},
    }


def check_write(token: str | None, repository: str) -> None:
    """Checks that a token may write to a repository, with the errors of the Hub."""
    if token is None:
        raise HubError(401, "Invalid username or password.")
    namespace = repository.split("/")[0]
    known = _TOKENS[token]
    if known["role"] == "read" or namespace not in (USER, ORGANIZATION):
        raise HubError(403, f"You don't have the rights to create or change a model under the namespace {namespace!r}")
    if known["role"] == "fineGrained" and repository != FINE_REPOSITORY:
        raise HubError(403, "This token does not have the permission repo.write for this repository")


def check_read(token: str | None, private: bool) -> None:
    """Hides a private repository from anonymous requests. All tokens belong to the one user, who may read
    everything."""
    if private and token is None:
        # The client recognizes a hidden repository by the status alone only at https URLs.
        raise HubError(401, "Invalid username or password.", "RepoNotFound")
