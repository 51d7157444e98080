"""A server's answers in the form of OpenAI's interface: errors, streams, and the limit of a body."""

import json
import re
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any


_STREAM_ERROR = re.compile(r'^data: {"error": "(.*)"}\n\n\Z', re.MULTILINE | re.DOTALL)
_LONGEST_MESSAGE = 1000  # characters of an error, which quotes what was sent
_DISCARDED = 8  # limits of a body, after which the connection is closed instead
_TYPES = {429: "rate_limit_error"}


class UnknownModel(Exception):
    """A request names a model that the server does not have."""

    status_code, code = 404, "model_not_found"

    def __init__(self, asked: str, served: str):
        super().__init__(f"model {asked!r}: this server has only {served!r}")


def in_form(message: str, status: int, code: str | None = None) -> dict[str, Any]:
    """Returns an error as OpenAI's interface has it.

    Args:
        message (`str`): a long one is shortened in the middle.
        status (`int`): of the answer; 500 within a stream.
        code (`str`, *optional*): OpenAI's name of the error.
    """
    if len(message) > _LONGEST_MESSAGE:
        message = f"{message[: _LONGEST_MESSAGE // 2]} ... {message[-_LONGEST_MESSAGE // 2 :]}"
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


async def stream_in_form(parts: AsyncGenerator[str, None], with_usage: bool) -> AsyncGenerator[str, None]:
    """Yields the stream of a completion with the errors, usage and end of OpenAI's interface.

    transformers' server (5.23) sends an error as a bare text, which clients do not show, sends the usage unasked, and sends no
    `[DONE]`.

    Args:
        parts (`AsyncGenerator`): of the library's handler; each holds whole events.
        with_usage (`bool`): whether the request asks for it.
    """
    async with aclosing(parts):  # it ends the generation when the client is gone
        async for part in parts:
            error = _STREAM_ERROR.search(part)
            events = part[: error.start()] if error else part
            chunks = (json.loads(event.removeprefix("data: ")) for event in events.split("\n\n")[:-1])
            in_order = [whole for chunk in chunks for whole in _chunks_in_form(chunk, with_usage)]
            if error:
                in_order.append(in_form(error[1], 500))
            yield "".join(f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n" for chunk in in_order)
    yield "data: [DONE]\n\n"


def _chunks_in_form(chunk: dict[str, Any], with_usage: bool) -> Iterator[dict[str, Any]]:
    usage = chunk.pop("usage", None)
    for choice in chunk["choices"]:
        choice.setdefault("finish_reason", None)
    yield chunk | ({"usage": None} if with_usage else {})
    if with_usage and usage:
        yield chunk | {"choices": [], "usage": usage}


class BodyLimit:
    """ASGI middleware that refuses bodies above a size, declared by `Content-Length` or counted as they arrive.

    Starlette's own limit (1.10) answers a declared size in plain text, which OpenAI's clients do not show.

    Args:
        app (`Callable`): the ASGI application.
        num_bytes (`int`): size of the largest body.
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
            # The rest is read and discarded, since most clients read no answer before they have sent everything.
            while message.get("more_body") and taken <= _DISCARDED * self.num_bytes:
                message = await receive()
                taken += len(message.get("body", b""))
            is_refused = True
            raise HTTPException(413, f"body: must have at most {self.num_bytes} bytes; shorten it")

        await self.app(scope, receive_within_limit, send)
