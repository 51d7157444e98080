"""Requests to servers with OpenAI's API and what they answer, for serving_load.py and serving_hours.py."""

import contextlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp


PATHS = {"chat": "chat/completions", "completion": "completions", "response": "responses"}
# No limit, since requests that wait in the client would not show how the server handles them; and a connection per
# request, since a server may close an idle one at the moment when the next request is sent.
_CONNECTIONS = {"limit": 0, "force_close": True}
_LINE_BYTES = 2**22  # a line of a stream with log-probabilities is longer than aiohttp's default of 64 KiB
_ENDS = {"response.completed", "response.incomplete"}
_HEADERS = {"Content-Type": "application/json"}


@dataclass
class Reply:
    """What a server answered to one request.

    Attributes:
        status (`int`): HTTP status; 0 if there was no answer.
        texts (`dict[int, str]`): generated text of each choice.
        finish_reasons (`dict[int, str]`): of each choice.
        logprobs (`list[float]`): log-probabilities of the generated tokens.
        tokens (`int`, *optional*): number of generated tokens by the server's usage.
        arrivals (`list[float]`): seconds from the request to each piece of text of a stream.
        seconds (`float`): from the request to the end of the answer.
        whole_text (`str`, *optional*): of the last event of a stream of responses.
        is_complete (`bool`): the answer was a JSON object, or the stream ended as the API specifies.
        has_left (`bool`): the client closed the connection.
        retry_after (`str`, *optional*): header of the answer.
        error (`str`, *optional*): the server's error, or that of the connection.
        was_refused_connection (`bool`): the server did not accept the connection.
        is_refusal (`bool`): the error has the form of OpenAI's API.
    """

    status: int = 0
    texts: dict[int, str] = field(default_factory=dict)
    finish_reasons: dict[int, str] = field(default_factory=dict)
    logprobs: list[float] = field(default_factory=list)
    tokens: int | None = None
    arrivals: list[float] = field(default_factory=list)
    seconds: float = 0.0
    whole_text: str | None = None
    is_complete: bool = False
    has_left: bool = False
    retry_after: str | None = None
    error: str | None = None
    was_refused_connection: bool = False
    is_refusal: bool = False

    @property
    def is_answered(self) -> bool:
        """Whether the generation came to its end; a stream may still lack `[DONE]`, see `is_complete`."""
        return self.status == 200 and bool(self.finish_reasons) and self.error is None

    @property
    def num_tokens(self) -> int:
        """By the server's usage, else the number of pieces."""
        return len(self.arrivals) if self.tokens is None else self.tokens


def session(seconds: float = 600) -> aiohttp.ClientSession:
    """Returns a client that waits up to `seconds` for an answer, and up to `seconds` for its next bytes."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(**_CONNECTIONS),
        timeout=aiohttp.ClientTimeout(total=None, sock_read=seconds, sock_connect=seconds),
        headers=_HEADERS,
        read_bufsize=_LINE_BYTES,
    )


async def send(client: aiohttp.ClientSession, url: str, body: Any, leave_after: int | None = None) -> Reply:
    """Sends a request and reads the answer.

    Args:
        client (`ClientSession`): from [`session`].
        url (`str`): of the endpoint.
        body (`Any`): a JSON value, or bytes.
        leave_after (`int`, *optional*): close the connection after this number of pieces of a stream.
    """
    reply, began = Reply(), time.perf_counter()
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        async with client.post(url, data=data) as response:
            reply.status, reply.retry_after = response.status, response.headers.get("Retry-After")
            if response.content_type == "text/event-stream":
                await _read_stream(response, reply, began, leave_after)
            else:
                _read_answer(json.loads(await response.read()), reply)
                reply.is_complete = True
    except (aiohttp.ClientError, ConnectionError, TimeoutError, ValueError) as error:
        reply.error = f"{type(error).__name__}: {error}"
        reply.was_refused_connection = isinstance(error, aiohttp.ClientConnectorError)
    reply.seconds = time.perf_counter() - began
    return reply


async def model_name(client: aiohttp.ClientSession, url: str) -> str:
    """Returns the name of the first model that a server lists."""
    async with client.get(f"{url}/models") as response:
        return (await response.json())["data"][0]["id"]


def percentile(values: Sequence[float], share: float) -> float:
    """Returns the value below which a share of the values is; not-a-number without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


async def _read_stream(response: aiohttp.ClientResponse, reply: Reply, began: float, leave_after: int | None) -> None:
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            reply.is_complete = True
            continue
        event = json.loads(data)
        if _read_answer(event, reply):
            reply.arrivals.append(time.perf_counter() - began)
        reply.is_complete |= event.get("type") in _ENDS
        if leave_after is not None and len(reply.arrivals) >= leave_after:
            reply.has_left = True
            return  # aiohttp closes the connection of an answer that was not read to its end


def _read_answer(answer: Any, reply: Reply) -> bool:
    """Adds an answer, or an event of a stream, to a reply; returns whether it has text."""
    if not isinstance(answer, dict):
        raise ValueError(f"the answer is not a JSON object: {str(answer)[:200]}")
    if error := _error_of(answer):
        reply.error = json.dumps(error)[:1000]
        reply.is_refusal = isinstance(error, dict) and isinstance(error.get("message"), str)
        return False
    if answer.get("type") == "response.output_text.delta":
        return _add(reply, 0, answer["delta"])
    if answer.get("type") in _ENDS:
        answer = answer["response"]
        reply.whole_text = "".join(part["text"] for item in answer["output"] for part in item["content"])
        reply.texts.setdefault(0, "")  # a reply without text has no deltas
        answer = {**answer, "output": []}
    has_text = False
    for choice in answer.get("choices") or ():
        message = choice.get("delta") or choice.get("message") or choice
        index = choice.get("index", 0)
        has_text |= _add(reply, index, message.get("content") or message.get("text") or "")
        if choice.get("finish_reason"):
            reply.finish_reasons[index] = choice["finish_reason"]
        _add_logprobs(reply, choice.get("logprobs") or {})
    if "output" in answer and answer.get("status") in ("completed", "incomplete"):
        reply.finish_reasons[0] = {"completed": "stop", "incomplete": "length"}[answer["status"]]
        for part in (part for item in answer["output"] for part in item["content"]):
            _add(reply, 0, part["text"])
    usage = answer.get("usage") or {}
    with contextlib.suppress(KeyError):
        reply.tokens = usage["output_tokens" if "output_tokens" in usage else "completion_tokens"]
    return has_text


def _error_of(answer: dict[str, Any]) -> Any:
    """Returns the error of an answer or an event: of the older endpoints, and both forms of responses."""
    kind = answer.get("type")
    if kind == "response.failed":
        return answer["response"]["error"]
    return answer if kind == "error" else answer.get("error")


def _add(reply: Reply, index: int, text: str) -> bool:
    reply.texts[index] = reply.texts.get(index, "") + text
    return bool(text)


def _add_logprobs(reply: Reply, logprobs: dict[str, Any]) -> None:
    tokens = [entry["logprob"] for entry in logprobs.get("content") or ()]
    reply.logprobs += tokens or logprobs.get("token_logprobs") or []
