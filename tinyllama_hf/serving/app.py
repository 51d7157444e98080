"""Serves one model through OpenAI's API, with the handlers of `transformers serve`.

The command of transformers (5.23) is not used directly, for these reasons (tests/serving/test_library.py shows them):

- it loads the tokenizer with stock transformers, and finds control tokens in the text of messages;
- it drops the space between a prompt and its continuation;
- it keeps the stop string at the end of a text;
- it ignores the temperature unless the generation settings of the model enable sampling;
- it seeds when a request arrives, not when it is generated;
- it ignores unsupported fields, and generates beyond the context;
- it loads and unloads models for any client.
"""

import copy
import json
import logging
import socket
import time
from collections.abc import AsyncGenerator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from transformers import BatchEncoding, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.cli.serving.model_manager import ModelManager

from ..errors import InputError, require
from ..inference.generation import stop_token_ids
from ..inference.options import Sampling
from .request_answers import BodyLimit, Refusal, error_body, openai_stream
from .request_fields import Limits, check_fields, prompt_ids
from .request_queue import OneQueue


if TYPE_CHECKING:
    from fastapi import FastAPI

# The app of transformers has more: for other kinds of models, for loading and unloading models, and pages of another
# server.
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health")
MAX_BODY_BYTES = 4 * 2**20
_LENGTHS = {"max_tokens", "max_completion_tokens", "max_output_tokens"}
_SECONDS_TO_END = 5  # for open connections after Ctrl-C
_PROMPT: ContextVar[list[int]] = ContextVar("prompt")  # tokens of the request that the current task handles


def check_installed() -> None:
    """Checks that the packages of the server are installed.

    Raises:
        InputError: naming the extra to install.
    """
    for package in ("fastapi", "uvicorn", "openai"):
        require(package, "serving", "serve")


def build_app(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> "FastAPI":
    """Builds the application of the server, with the endpoints of [`PATHS`].

    Sampling defaults to that of `generate`, and requests may change it. The answer to an invalid request has status
    400.

    Args:
        name (`str`): name of the model in requests, which may omit it.
        model (`PreTrainedModel`): from `load`; its generation settings are modified.
        tokenizer (`PreTrainedTokenizerFast`): its tokenizer; the chat endpoints need its chat template.
    """
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server

    # Its warning for each request repeats the log of the server.
    logging.getLogger("transformers.cli.serving").setLevel(logging.ERROR)
    model.generation_config.update(
        **Sampling().arguments(),
        eos_token_id=stop_token_ids(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    chat = OneModel(name, model, _for_chat(tokenizer))
    text = OneModel(name, model, _for_text(tokenizer))
    state, limits = OneQueue(), Limits.of(model, tokenizer)
    unused: dict[str, Any] = {"transcription_handler": None, "systemone_handler": None}  # their routes are removed
    app = build_server(
        chat,
        _strict(ChatCompletionHandler, "messages", tokenizer, limits)(chat, state),
        completion_handler=_strict(CompletionHandler, "prompt", tokenizer, limits)(text, state),
        response_handler=_strict(ResponseHandler, "input", tokenizer, limits)(chat, state),
        generation_state=state,
        **unused,
    )
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in PATHS]
    app.add_api_route("/v1/models/{asked:path}", chat.get_model)
    app.router.redirect_slashes = False
    # Innermost, or the middleware of transformers would wrap its exception in a group, which FastAPI reports as bad
    # JSON.
    app.user_middleware.append(Middleware(BodyLimit, num_bytes=MAX_BODY_BYTES))
    for kind in (InputError, HTTPException, RequestValidationError, Refusal, Exception):
        app.add_exception_handler(kind, _error_response)
    app.state.ending = state.manager.ending
    return app


def bind(host: str, port: int) -> socket.socket:
    """Binds a socket before the model is loaded; connections are refused until it listens.

    Args:
        host (`str`): name or address of this machine.
        port (`int`): 0 chooses a free one.

    Raises:
        InputError: if the address is invalid or not available.
    """
    if not 0 <= port < 2**16:
        raise InputError(f"--port {port}: must be between 0 (any free port) and {2**16 - 1}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise InputError(f"--host {host}: not an address of this machine ({error.strerror})") from error
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise InputError(
            f"--host {host} --port {port}: not available ({error.strerror}). Choose another port, or 0 for a free one"
        ) from error
    return bound


def run(app: "FastAPI", bound: socket.socket) -> None:
    """Serves until Ctrl-C or SIGTERM, which end running generations with an error."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            app.state.ending.set()
            super().handle_exit(sig, frame)

    Server(uvicorn.Config(app, log_level="info", timeout_graceful_shutdown=_SECONDS_TO_END)).run(sockets=[bound])


async def _error_response(request: Any, error: Exception) -> Any:
    """Returns an error in the format of OpenAI's API, so that its clients show the message."""
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    message = str(getattr(error, "detail", error))
    status = getattr(error, "status_code", 400 if isinstance(error, (InputError, RequestValidationError)) else 500)
    if isinstance(error, RequestValidationError):
        message = "body: must be a JSON object, sent with Content-Type: application/json"
        if reasons := [found["ctx"]["error"] for found in error.errors() if found["type"] == "json_invalid"]:
            message = f"body: not valid JSON ({reasons[0]})"
    elif isinstance(error, HTTPException) and status in (404, 405):
        message = f"{request.method} {request.url.path}: {message}; the endpoints are {', '.join(PATHS)}"
    elif status == 500:
        message = f"{type(error).__name__}: {message}"  # the traceback is in the log of the server
    status = 400 if status == 422 else status  # transformers answers 422 to unknown fields and types
    code, headers = getattr(error, "code", None), getattr(error, "headers", None)
    return JSONResponse(error_body(message, status, code), status_code=status, headers=headers)


# Of type `Any`, since a class that is chosen at run time has no static type.
def _strict(handler: Any, needed: str, tokenizer: PreTrainedTokenizerFast, limits: Limits) -> Any:
    """Returns a subclass of a handler of transformers that refuses what the handler (5.23) ignores or fails on.

    It also streams only on request; the handler of `/v1/responses` streams by default.
    """
    from fastapi.responses import StreamingResponse

    class Strict(handler):
        async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
            checked, ids = await self.generation_state.manager.prepare(self._prepare, body)
            _PROMPT.set(ids)
            response = await super().handle_request(checked, request_id)
            # /v1/responses streams in another format.
            if isinstance(response, StreamingResponse) and needed != "input":
                with_usage = checked.get("stream_options", {}).get("include_usage", False)
                assert isinstance(response.body_iterator, AsyncGenerator)
                response.body_iterator = openai_stream(response.body_iterator, with_usage)
            return response

        def _prepare(self, body: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
            """Returns the body for the handler of transformers, without its prompt, and the tokens of the prompt."""
            self._validate_request(body)
            try:
                checked = check_fields(body, needed, limits)
                self.model_manager.check_name(checked.get("model"))
                ids = prompt_ids(body, needed, checked.get("instructions"), tokenizer, limits)
            except RecursionError as error:
                raise InputError("body: nested too deeply") from error
            return {"stream": False, **checked, needed: [] if needed == "messages" else ""}, ids

        def _build_generation_config(
            self, body: dict[str, Any], model_generation_config: GenerationConfig, use_cb: bool = False
        ) -> GenerationConfig:
            """Combines the settings of model and request.

            The method of transformers drops the model's settings if a request has its own, and `logit_bias` in
            completions. It would also seed here, while other requests are generated.
            """
            settings = dict(body.get("generation_config", {}))
            length = settings.pop("max_new_tokens", None)
            defaults = copy.deepcopy(model_generation_config)
            defaults.update(**settings)
            fields = {name: settings[name] for name in ("temperature",) if name in settings} | body
            bias, seed = fields.pop("logit_bias", {}), fields.pop("seed", None)
            fields.pop("generation_config", None)
            config = super()._build_generation_config(fields, defaults, use_cb)
            config.sequence_bias = {(int(token),): value for token, value in bias.items()} or None
            config.seed = seed
            if length is not None and not fields.keys() & _LENGTHS:
                config.max_new_tokens = length
            return config

    return Strict


class OneModel(ModelManager):
    """The model manager of the handlers; it returns the same model for every request, and never unloads it."""

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast):
        self._name, self._model, self._tokenizer = name, model, tokenizer
        self._description = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "tinyllama_hf"}
        super().__init__(force_model=name)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """Returns the name unchanged; transformers appends `@main`."""
        return model_id

    def check_name(self, asked: str | None) -> None:
        """Checks the model's name in a request, which may omit it."""
        if asked not in (None, self._name):
            message = f"model {asked!r}: not served here; the only model is {self._name!r}"
            raise Refusal(404, message, "model_not_found")

    # transformers wraps its static method in `lru_cache`.
    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # type: ignore[override]
        """Lists the served model; transformers lists the Hub cache, and fails if there is none."""
        return [self._description]

    def get_model(self, asked: str) -> dict[str, Any]:
        """Describes the served model, for an endpoint that transformers lacks."""
        self.check_name(asked)
        return self._description

    def _load_processor(self, *_: Any, **__: Any) -> PreTrainedTokenizerFast:
        return self._tokenizer

    def _load_model(self, *_: Any, **__: Any) -> PreTrainedModel:
        return self._model


def _for_chat(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    served = copy.deepcopy(tokenizer)
    served.apply_chat_template = _prompt  # type: ignore[method-assign]  # the handlers know no other hook
    return served


def _for_text(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Returns a tokenizer that decodes continuations, and so keeps the space that a Llama text begins with."""
    served = copy.deepcopy(tokenizer)
    served.tokenizer = _prompt  # the attribute of a processor that the handler calls
    state = json.loads(served.backend_tokenizer.to_str())
    if parts := (state["decoder"] or {}).get("decoders"):
        state["decoder"]["decoders"] = [part for part in parts if part["type"] != "Strip"]
        served.backend_tokenizer.decoder = Tokenizer.from_str(json.dumps(state)).decoder
    return served


def _prompt(*_: Any, **__: Any) -> BatchEncoding:
    """Returns the tokens of the current request; the handlers would tokenize again, on the event loop."""
    ids = _PROMPT.get()
    return BatchEncoding({"input_ids": [ids], "attention_mask": [[1] * len(ids)]}, tensor_type="pt")
