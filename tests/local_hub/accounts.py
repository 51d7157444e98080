"""Who may do what on the local Hub: one user, two organisations, and a token of each kind that the Hub has."""

from typing import Any

from .storage import HubError


USER = "demo"
ORGANISATION = "demo-lab"
READ_ORGANISATION = "demo-readers"  # the user is in it and may only read
# Nothing is secret about them: the server listens on this machine only.
WRITE_TOKEN = "hf_local_write"
READ_TOKEN = "hf_local_read"
# Fine-grained: writes to one repository of the user, and nowhere else.
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
        HubError: if there is no such token.
    """
    if authorization is None:
        return None
    token = authorization.removeprefix("Bearer ")
    if token not in _TOKENS:
        raise HubError(401, "Invalid credentials in Authorization header")
    return token


def whoami(token: str | None) -> dict[str, Any]:
    """The Hub's answer to the question who one is."""
    if token is None:
        raise HubError(401, "Invalid username or password.")
    return {
        "type": "user",
        "id": "0",
        "name": USER,
        "orgs": [
            {"type": "org", "name": ORGANISATION, "roleInOrg": "write"},
            {"type": "org", "name": READ_ORGANISATION, "roleInOrg": "read"},
        ],
        "auth": {"type": "access_token", "accessToken": _TOKENS[token]},
    }


def check_write(token: str | None, repository: str) -> None:
    """Refuses, as the Hub does, a token that may not write to a repository."""
    if token is None:
        raise HubError(401, "Invalid username or password.")
    namespace = repository.split("/")[0]
    known = _TOKENS[token]
    if known["role"] == "read" or namespace not in (USER, ORGANISATION):
        raise HubError(403, f"You don't have the rights to create or change a model under the namespace {namespace!r}")
    if known["role"] == "fineGrained" and repository != FINE_REPOSITORY:
        raise HubError(403, "This token does not have the permission repo.write for this repository")


def check_read(token: str | None, private: bool) -> None:
    """Hides a private repository from anonymous requests; every token is of the one user, who sees all."""
    if private and token is None:
        # By the status alone the client tells a hidden repository only at addresses with https.
        raise HubError(401, "Invalid username or password.", "RepoNotFound")
