"""The application of the server: OpenAI's API for one model and many clients."""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..decoding.proposals import Proposer
from ..inference.options import Sampling
from .answers import Answer, ChatAnswer, TextAnswer
from .call import Refusal
from .client_access import Access, error_response
from .request_fields import Kind, Limits, RequestReader
from .response_answer import ResponseAnswer
from .response_formats import grammar_tokenizer
from .row_text import Piece
from .scheduler import Row, Scheduler, queue_full
from .server_metrics import ServerMetrics


_ANSWERS: dict[Kind, type[Answer]] = {"chat": ChatAnswer, "completion": TextAnswer, "response": ResponseAnswer}
_PATHS: dict[str, Kind] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completion",
    "/v1/responses": "response",
}
_BODY_SECONDS = 60  # to send the body of a request
_DISCARDED = 8  # a body that is too large is read up to this multiple of the limit; then the connection is closed
_PAGE = Path(__file__).with_name("page")
_PAGE_FILES = {"/": "index.html", **{f"/{name}": name for name in ("page.css", "page.js", "markdown.js")}}
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """Limits and access of a server; the fields are options of `serve`.

    Attributes:
        rows (`int`): maximum number of replies generated together.
        waiting (`int`): maximum number of waiting replies.
        max_tokens (`int`, *optional*): maximum number of tokens of a reply; by default the rest of the context.
        max_messages (`int`, *optional*): maximum number of messages; by default the context in tokens.
        max_body_bytes (`int`): maximum size of a request.
        row_seconds (`float`): maximum time of a reply, waiting included.
        api_key (`str`, *optional*): clients must send it.
        page (`bool`): whether to serve the chat page.
        allow_origins (`Sequence[str]`): other origins whose pages may use the server.
        allow_hosts (`Sequence[str]`): host names that clients may use, in addition to addresses and `localhost`.
    """

    rows: int = 16
    waiting: int = 64
    max_tokens: int | None = None
    max_messages: int | None = None
    max_body_bytes: int = 2**20
    row_seconds: float = 600
    api_key: str | None = None
    page: bool = False
    allow_origins: Sequence[str] = ()
    allow_hosts: Sequence[str] = ()


class Service:
    """One model behind the endpoints.

    Args:
        name (`str`): name of the model in requests, which may omit it.
        model (`PreTrainedModel`): from `load`.
        tokenizer (`PreTrainedTokenizerFast`): its tokenizer; the chat endpoints need its chat template.
        draft (`Proposer`, *optional*): proposes tokens for all rows.
        options (`ServerOptions`): limits.
        described (`dict`): fields of the model in `/v1/models`, in addition to OpenAI's.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        draft: Proposer | None,
        options: ServerOptions,
        described: Mapping[str, Any],
    ):
        self._vocabulary = grammar_tokenizer(model, tokenizer)
        given = {"new_tokens": options.max_tokens, "messages": options.max_messages}
        limits = Limits.of(model, tokenizer, draft, **{key: value for key, value in given.items() if value})
        self._max_body_bytes = options.max_body_bytes
        self._name, self._reader = name, RequestReader(name, tokenizer, limits)
        self._reading = ThreadPoolExecutor(1, "read")  # calling a tokenizer changes its settings
        self._num_reading, self._most_reading = 0, options.rows + options.waiting
        self.scheduler = Scheduler(
            model, tokenizer, draft, options.rows, options.waiting, options.row_seconds, self._vocabulary
        )
        self.metrics = ServerMetrics(self.scheduler)
        basics = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "tinyllama_hf"}
        defaults = {"temperature": Sampling.temperature, "top_p": Sampling.top_p, "max_tokens": limits.new_tokens}
        own = {"max_model_len": limits.context, "is_chat": bool(tokenizer.chat_template), "defaults": defaults}
        self._model = {**basics, **own, **described}

    async def models(self) -> dict[str, Any]:
        """Lists the model."""
        return {"object": "list", "data": [self._model]}

    async def model(self, asked: str) -> dict[str, Any]:
        """Describes the model."""
        if asked != self._name:
            raise Refusal(
                f"model {asked!r}: not served here; the only model is {self._name!r}", 404, "model_not_found"
            )
        return self._model

    async def show_metrics(self) -> Response:
        """Returns the metrics of the server in Prometheus' format."""
        return PlainTextResponse(self.metrics.text())

    async def generate(self, request: Request) -> Response:
        """Answers a request for generation."""
        began, kind = time.monotonic(), _PATHS[request.url.path]
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal("body: must be a JSON object, sent with Content-Type: application/json")
        body = await _body(request, self._max_body_bytes)
        if self._num_reading >= self._most_reading:
            raise queue_full(self._num_reading)
        loop = asyncio.get_running_loop()
        self._num_reading += 1
        try:
            call = await loop.run_in_executor(self._reading, self._reader.read, kind, body)
        finally:
            self._num_reading -= 1
        pieces: asyncio.Queue[Piece] = asyncio.Queue()

        def deliver(piece: Piece) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, as in an immediate shutdown
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        rows = self.scheduler.submit(call.rows, deliver)
        answer = _ANSWERS[kind](call, self._name, self._vocabulary)
        followed = self._follow(pieces, rows, answer, began)
        if call.is_streamed:
            return _Stream(self._stream(answer, followed), lambda: self.scheduler.cancel(rows))
        whole = asyncio.create_task(_last(followed))
        gone = asyncio.create_task(_disconnect(request))
        try:
            await asyncio.wait((whole, gone), return_when=asyncio.FIRST_COMPLETED)
            if whole.done():
                whole.result()
        finally:
            for task in (whole, gone):
                task.cancel()
            self.scheduler.cancel(rows)
        return JSONResponse(answer.whole())

    async def _follow(
        self, pieces: "asyncio.Queue[Piece]", rows: Sequence[Row], answer: Answer, began: float
    ) -> AsyncIterator[Piece]:
        """Yields the pieces of a call until all rows have ended. Cancels the rows if the iteration stops early."""
        left, first = len(rows), True
        try:
            while left:
                piece = await pieces.get()
                answer.add(piece)
                if first and piece.text:
                    self.metrics.first_token.observe(time.monotonic() - began)
                    first = False
                left -= piece.is_last
                yield piece
            self.metrics.finished(answer, time.monotonic() - began)
        finally:
            self.scheduler.cancel(rows)

    async def _stream(self, answer: Answer, followed: AsyncIterator[Piece]) -> AsyncIterator[str]:
        for event in answer.begin():
            yield event
        try:
            async for piece in followed:
                for event in answer.events(piece):
                    yield event
            for event in answer.end():
                yield event
        except Refusal as refusal:
            for event in answer.failed(refusal):
                yield event


class _Stream(StreamingResponse):
    """A stream of events; calls a function when it has ended or the client has disconnected."""

    def __init__(self, events: AsyncIterator[str], at_end: Callable[[], None]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._at_end = at_end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._at_end()


async def _last(followed: AsyncIterator[Piece]) -> None:
    async for _ in followed:
        pass


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request, num_bytes: int) -> bytes:
    """Returns the body of a request.

    A body that is too large is read up to a multiple of the limit and discarded, since most clients read the answer
    only after they have sent the whole body.
    """
    parts, taken = [], 0
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                taken += len(part)
                if taken <= num_bytes:
                    parts.append(part)
                elif taken > _DISCARDED * num_bytes:
                    break
    except TimeoutError as error:
        raise Refusal(f"body: was not complete after {_BODY_SECONDS} seconds", 408) from error
    if taken > num_bytes:
        raise Refusal(f"body: larger than {num_bytes} bytes; shorten it", 413)
    return b"".join(parts)


def build_app(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    draft: Proposer | None = None,
    options: ServerOptions | None = None,
    described: Mapping[str, Any] | None = None,
) -> FastAPI:
    """Builds the application of the server; the arguments are those of [`Service`]."""
    options = options or ServerOptions()
    service = Service(name, model, tokenizer, draft, options, described or {})
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.state.service = service
    for path in _PATHS:
        app.add_route(path, service.generate, methods=["POST"])
    app.add_api_route("/v1/models", service.models)
    app.add_api_route("/v1/models/{asked:path}", service.model)
    app.add_api_route("/health", _health)
    app.add_api_route("/metrics", service.show_metrics)
    for path, file in _PAGE_FILES.items() if options.page else ():
        app.add_route(path, _page_file(file))
    app.add_middleware(
        Access,
        api_key=options.api_key,
        names=options.allow_hosts,
        paths=[*_PATHS, "/v1/models", "/health", "/metrics"],
    )
    if options.allow_origins:
        allowed: dict[str, Any] = {"allow_methods": ["*"], "allow_headers": ["*"]}
        app.add_middleware(CORSMiddleware, allow_origins=[*options.allow_origins], **allowed)
    for kind in (Refusal, HTTPException, Exception):
        app.add_exception_handler(kind, error_response)
    return app


async def _health() -> dict[str, str]:
    return {"status": "ok"}


def _page_file(name: str) -> Callable[[Request], FileResponse]:
    headers = {
        "Content-Security-Policy": _PAGE_POLICY,
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }
    return lambda request: FileResponse(_PAGE / name, headers=headers)
