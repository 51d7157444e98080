"""Answers in the format of OpenAI's API: errors and streams; and the limit on the size of a request."""

import json
import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any


_STREAM_ERROR = re.compile(r'^data: {"error": "(.*)"}\n\n\Z', re.MULTILINE | re.DOTALL)
_LONGEST_MESSAGE = 1000  # characters; messages quote parts of the request
_DISCARDED = 8  # an oversized body is read up to this multiple of the limit; then the connection is closed
_TYPES = {429: "rate_limit_error"}


class Refusal(Exception):
    """An answer in place of the requested one: the server is busy or shutting down, or has no such model.

    Args:
        status_code (`int`): HTTP status of the answer.
        message (`str`): the error message.
        code (`str`, *optional*): OpenAI's code for the error.
        headers (`dict`, *optional*): headers of the answer.
    """

    def __init__(self, status_code: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status_code, self.code, self.headers = status_code, code, headers


def error_body(message: str, status: int, code: str | None = None) -> dict[str, Any]:
    """Returns an error in the format of OpenAI's API.

    Args:
        message (`str`): the message; a long one is shortened in the middle.
        status (`int`): HTTP status of the answer, or 500 within a stream.
        code (`str`, *optional*): OpenAI's code for the error.
    """
    if len(message) > _LONGEST_MESSAGE:
        message = f"{message[: _LONGEST_MESSAGE // 2]} ... {message[-_LONGEST_MESSAGE // 2 :]}"
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


async def openai_stream(parts: AsyncGenerator[str, None], with_usage: bool) -> AsyncGenerator[str, None]:
    """Yields the stream of a completion in the format of OpenAI's API.

    The server of transformers (5.23) sends errors as plain text, which clients do not show; it always sends the usage,
    and no `[DONE]`.

    Args:
        parts (`AsyncGenerator`): stream of a handler of transformers; each part contains complete events.
        with_usage (`bool`): whether the request asks for the usage.
    """
    async with aclosing(parts):  # stops the generation when the client disconnects
        async for part in parts:
            error = _STREAM_ERROR.search(part)
            events = part[: error.start()] if error else part
            chunks = (json.loads(event.removeprefix("data: ")) for event in events.split("\n\n")[:-1])
            in_order = [whole for chunk in chunks for whole in _openai_chunks(chunk, with_usage)]
            if error:
                in_order.append(error_body(error[1], 500))
            yield "".join(f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n" for chunk in in_order)
    yield "data: [DONE]\n\n"


def _openai_chunks(chunk: dict[str, Any], with_usage: bool) -> Iterator[dict[str, Any]]:
    usage = chunk.pop("usage", None)
    for choice in chunk["choices"]:
        choice.setdefault("finish_reason", None)
    yield chunk | ({"usage": None} if with_usage else {})
    if with_usage and usage:
        yield chunk | {"choices": [], "usage": usage}


class BodyLimit:
    """ASGI middleware that limits the size of request bodies, by `Content-Length` and by counting what arrives.

    The limit of Starlette (1.10) answers in plain text if `Content-Length` is too large; OpenAI's clients do not show
    that.

    Args:
        app (`Callable`): the ASGI application.
        num_bytes (`int`): the maximum size.
    """

    def __init__(self, app: Any, num_bytes: int):
        self.app, self.num_bytes = app, num_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.datastructures import Headers
        from starlette.exceptions import HTTPException

        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        declared, taken, is_refused = int(Headers(scope=scope).get("content-length", 0)), 0, False

        async def receive_within_limit() -> Any:
            nonlocal taken, is_refused
            message = await receive()
            taken += len(message.get("body", b""))
            if is_refused or max(declared, taken) <= self.num_bytes:
                return message
            # Read and discard the rest, since most clients read the answer only after they have sent the whole body.
            while message.get("more_body") and taken <= _DISCARDED * self.num_bytes:
                message = await receive()
                taken += len(message.get("body", b""))
            is_refused = True
            raise HTTPException(413, f"body: larger than {self.num_bytes} bytes; shorten it")

        await self.app(scope, receive_within_limit, send)
