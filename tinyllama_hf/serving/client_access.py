"""Access control of the server, and the format of its errors."""

import ipaddress
import secrets
from collections.abc import Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from .call import Refusal


class Access:
    """ASGI middleware that refuses requests without the key, and those for host names that are not this machine's.

    Another site can make its own name point to 127.0.0.1, and its pages could then read answers (DNS rebinding). An
    address instead of a name is safe.

    Args:
        app (`Callable`): the ASGI application.
        api_key (`str`, *optional*): clients must send it, except to `/health` and the page, which has nothing secret.
        names (`Sequence[str]`): names of this machine, in addition to `localhost`.
        paths (`Sequence[str]`): endpoints, to list in errors.
    """

    def __init__(self, app: Any, api_key: str | None, names: Sequence[str], paths: Sequence[str]):
        self.app, self._key, self._names, self._paths = app, api_key, {"localhost", *names}, paths

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            scope["paths"] = self._paths
            request = Request(scope)
            try:
                self._check(request)
            except Refusal as refusal:
                return await (await error_response(request, refusal))(scope, receive, send)
        await self.app(scope, receive, send)

    def _check(self, request: Request) -> None:
        host = request.url.hostname or ""
        if host not in self._names and not _is_address(host):
            raise Refusal(f"Host {host!r}: not a name of this server; start it with --allow-host {host}", 403)
        # Browsers send preflight requests without the key.
        if self._key is None or request.method == "OPTIONS" or not request.url.path.startswith(("/v1/", "/metrics")):
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if not secrets.compare_digest(given.encode(), self._key.encode()):  # in constant time
            message = "Authorization: must be 'Bearer KEY' with the key that the server was started with"
            raise Refusal(message, 401, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


async def error_response(request: Request, error: Exception) -> JSONResponse:
    """Returns an error in the format of OpenAI's API, so that its clients show the message."""
    if isinstance(error, HTTPException):
        message = f"{request.method} {request.url.path}: {error.detail}"
        if error.status_code in (404, 405):
            message += f"; the endpoints are {', '.join(request.scope['paths'])}"
        error = Refusal(message, error.status_code, headers=dict(error.headers or {}))
    elif not isinstance(error, Refusal):
        error = Refusal(f"{type(error).__name__}: {error}", 500)  # the traceback is in the log of the server
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)
