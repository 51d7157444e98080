"""A server of the page in this process, and one whose answers a test writes, for what no model does when asked."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


fastapi = pytest.importorskip("fastapi")
responses = pytest.importorskip("fastapi.responses")
uvicorn = pytest.importorskip("uvicorn")

PAGE = Path(__file__).parents[2] / "tinyllama_hf" / "serving" / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
MODEL = {
    "id": "my-model",
    "max_model_len": 400,
    "dtype": "float32",
    "quantization": "none",
    "draft": None,
    "is_chat": True,
}


def add_page(app: fastapi.FastAPI, model: dict) -> None:
    """Adds the files of the page and the list of models to an app."""

    def send_file(name: str = "index.html") -> responses.FileResponse:
        headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
        return responses.FileResponse(PAGE / name, headers=headers)

    app.router.routes[:] = [r for r in app.router.routes if not getattr(r, "path", "").startswith("/v1/models")]
    app.add_api_route("/v1/models", lambda: {"object": "list", "data": [model]})
    for name in ("", "page.css", "page.js"):
        app.add_api_route(f"/{name}", lambda name=name or "index.html": send_file(name), include_in_schema=False)


@contextlib.contextmanager
def serve_app(app: fastapi.FastAPI, port: int = 0) -> Iterator[str]:
    """Serves an app in a thread of this process, and yields its address."""
    config = uvicorn.Config(app, port=port, log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(timeout=60)


class ScriptedServer:
    """A server of the page that sends prepared events.

    Attributes:
        pieces (`list`): what the next reply consists of: texts, seconds to wait, and events.
        refusal (`tuple`, *optional*): status, message and headers of the answer to the next request instead.
        key (`str`, *optional*): the key without which requests are refused.
        bodies (`list[dict]`): the requests so far.
    """

    def __init__(self, **model):
        self.pieces, self.refusal, self.key, self.bodies = [], None, None, []
        self.app = fastapi.FastAPI()
        self.model = MODEL | model
        add_page(self.app, self.model)
        self.app.middleware("http")(self.check)
        for path in ("/v1/chat/completions", "/v1/completions"):
            self.app.add_api_route(path, self.answer, methods=["POST"])

    async def check(self, request: fastapi.Request, proceed):
        status, message, headers = self.refusal or (401, "a key is needed", {})
        is_allowed = not self.key or request.headers.get("Authorization") == f"Bearer {self.key}"
        if not request.url.path.startswith("/v1") or (is_allowed and not self.refusal):
            return await proceed(request)
        self.refusal = None
        return responses.JSONResponse({"error": {"message": message}}, status_code=status, headers=headers)

    async def answer(self, request: fastapi.Request) -> responses.StreamingResponse:
        self.bodies.append(await request.json())
        return responses.StreamingResponse(self.events(), media_type="text/event-stream")

    async def events(self):
        usage = {"prompt_tokens": 10, "completion_tokens": sum(isinstance(piece, str) for piece in self.pieces)}
        end = [{"choices": [{"delta": {}, "finish_reason": "stop"}]}, {"choices": [], "usage": usage}]
        for piece in [*self.pieces, *end]:
            if isinstance(piece, float):
                await asyncio.sleep(piece)
                continue
            event = {"choices": [{"delta": {"content": piece}}]} if isinstance(piece, str) else piece
            yield f"data: {json.dumps(event)}\n\n"
        yield "data: [DONE]\n\n"
