"""Requests to an OpenAI-compatible server, with a message for each kind of failure."""

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ...errors import InputError, one_line


if TYPE_CHECKING:
    from aiohttp import ClientSession


TIMEOUT = 600  # seconds for a request, which may spend most of them in the queue of a busy server
_CONNECT_TIMEOUT = 20
_LONGEST_QUOTE = 200  # characters of a server's answer in a message
_LATER = (408, 429)  # like 5xx, statuses after which the same request may succeed later


class ServerFailure(InputError):
    """A request that failed.

    Attributes:
        status (`int`, *optional*): HTTP status, if the server answered.
        may_pass (`bool`): whether the same request may succeed later.
    """

    def __init__(self, message: str, status: int | None = None, may_pass: bool = True):
        super().__init__(message)
        self.status, self.may_pass = status, may_pass


def api_address(server: str) -> str:
    """Returns the address of the API for `http://host:8000`, with or without `/v1` and `/v1/completions`.

    Raises:
        InputError: if it is not an HTTP address.
    """
    parts = urlsplit(server)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise InputError(f"--server {server}: not the address of a server. Use http://HOST:PORT")
    if parts.username is not None:
        raise InputError("--server: remove user and password. The key is read from the variable OPENAI_API_KEY")
    address = server.rstrip("/").removesuffix("/completions").removesuffix("/models").rstrip("/")
    return address if address.endswith("/v1") else f"{address}/v1"


@contextlib.asynccontextmanager
async def open_session(num_concurrent: int) -> AsyncIterator["ClientSession"]:
    """Opens connections to a server. The key in `OPENAI_API_KEY`, if it is set, is sent with each request."""
    from aiohttp import ClientSession, ClientTimeout, TCPConnector

    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = ClientTimeout(total=TIMEOUT, sock_connect=_CONNECT_TIMEOUT)
    async with ClientSession(connector=TCPConnector(limit=num_concurrent), timeout=timeout, headers=headers) as opened:
        yield opened


async def request_json(session: "ClientSession", url: str, payload: dict[str, Any] | None = None) -> dict[str, Any]:
    """Sends a request, POST if there is a payload, and returns the JSON object of the answer.

    Raises:
        ServerFailure: if the server cannot be reached, stops, or returns an error or anything but a JSON object.
    """
    from aiohttp import ClientConnectorError, ClientError, InvalidURL

    try:
        async with session.request("GET" if payload is None else "POST", url, json=payload) as response:
            status, reason, body = response.status, response.reason, await response.text(errors="replace")
    except (ClientConnectorError, InvalidURL) as error:
        raise ServerFailure(
            f"{url}: cannot be reached ({one_line(getattr(error, 'os_error', error))}). Start the server, or correct "
            "--server"
        ) from error
    except TimeoutError as error:
        raise ServerFailure(
            f"{url}: no answer within {TIMEOUT} seconds. Check the log of the server, and restart it"
        ) from error
    except (ClientError, OSError, asyncio.IncompleteReadError) as error:
        raise ServerFailure(
            f"{url}: the connection was closed during a request ({one_line(error)}). Check the log of the server, and "
            "restart it"
        ) from error
    quote = _first_line(body)
    if status >= 400:
        may_pass = status >= 500 or status in _LATER
        raise ServerFailure(f"{url}: status {status} {reason} ({quote}). {_fix(status)}", status, may_pass)
    return _parse(url, body, quote)


def single_completion(url: str, answer: dict[str, Any]) -> dict[str, Any]:
    """Returns the completion in the answer to a request with one prompt.

    Raises:
        ServerFailure: if there is not exactly one.
    """
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise ServerFailure(
            f"{url}: the answer does not have one completion ({_first_line(json.dumps(answer))}). --server must be "
            "the address of an OpenAI-compatible API",
            may_pass=False,
        )
    return choices[0]


def _parse(url: str, body: str, quote: str) -> dict[str, Any]:
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise ServerFailure(
            f"{url}: the answer is not a JSON object ({quote}). --server must be the address of an OpenAI-compatible "
            "API"
        )
    if answer.get("error"):  # some servers return errors with status 200
        raise ServerFailure(f"{url}: error {json.dumps(answer['error'])[:_LONGEST_QUOTE]}. {_fix(500)}", 200)
    return answer


def _fix(status: int) -> str:
    if status in (401, 403):
        return "Set the variable OPENAI_API_KEY to the key of the server"
    if status == 404:
        return "Correct --server, or --server-model if the server does not have this model"
    if status >= 500 or status in _LATER:
        return "Check the log of the server, and restart it if it has stopped"
    return "The server does not accept this request; check its log"


def _first_line(body: str) -> str:
    line = next((line.strip() for line in body.splitlines() if line.strip()), "empty answer")
    return line if len(line) <= _LONGEST_QUOTE else f"{line[: _LONGEST_QUOTE - 3]}..."
