"""The server with its page in this process; on request it sends prepared events in place of the model's reply."""

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Iterator

import pytest


fastapi = pytest.importorskip("fastapi")
responses = pytest.importorskip("fastapi.responses")
uvicorn = pytest.importorskip("uvicorn")


class PageServer:
    """`serve --page` for a model.

    Args:
        model (`PreTrainedModel`), tokenizer (`PreTrainedTokenizerFast`), proposer (`Proposer`, *optional*): as loaded.
        api_key (`str`, *optional*): clients must send it.
        summary: what `/v1/models` tells of the model.

    Attributes:
        pieces (`list`, *optional*): what the next replies consist of, in place of the model's: texts, seconds to wait,
            and events.
        refusal (`tuple`, *optional*): status, message and headers of the answer to the next request.
        bodies (`list[dict]`): the requests that got prepared replies.
    """

    def __init__(self, model, tokenizer, proposer=None, api_key=None, **summary):
        from tinyllama_hf.serving.app import ServerOptions, build_app

        options = ServerOptions(page=True, api_key=api_key)
        summary = {"dtype": "float32", "quantization": "none", "draft": None} | summary
        self.app = build_app("my-model", model, tokenizer, proposer, options, summary)
        self.app.add_middleware(_Prepared, server=self)
        self.reset()

    def reset(self) -> None:
        self.pieces, self.refusal, self.bodies = None, None, []

    @contextlib.contextmanager
    def running(self, port: int = 0) -> Iterator[str]:
        """Serves in a thread, and yields the address of the page."""
        server = uvicorn.Server(uvicorn.Config(self.app, port=port, log_level="warning", timeout_graceful_shutdown=1))
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

    def refuse(self) -> "responses.Response":
        status, message, headers = self.refusal
        self.refusal = None
        return responses.JSONResponse({"error": {"message": message}}, status_code=status, headers=headers)

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


class _Prepared:
    def __init__(self, app, server: PageServer):
        self.app, self.server = app, server

    async def __call__(self, scope, receive, send) -> None:
        server, app = self.server, self.app
        if scope["type"] == "http" and scope["method"] == "POST":
            if server.refusal is not None:
                app = server.refuse()
            elif server.pieces is not None:
                server.bodies.append(await fastapi.Request(scope, receive).json())
                app = responses.StreamingResponse(server.events(), media_type="text/event-stream")
        await app(scope, receive, send)
