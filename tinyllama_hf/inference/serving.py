"""`transformers serve` for one of our models: the endpoints of OpenAI's interface, with our tokens and limits.

The library's handlers do the work. Its own command (5.23) would take the tokenizer that stock transformers makes of a folder,
look for control tokens in what people wrote, drop the space between a prompt and its continuation, ignore a temperature unless
the model's folder says that it samples, seed when a request comes and not when it is generated, ignore what it does not support,
generate beyond the context, and load or drop models for whoever asks; tests/inference/test_serving_library.py shows it.
"""

import copy
import json
import logging
import re
import socket
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from transformers import BatchEncoding, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import BaseHandler

from ..errors import InputError, require
from .batch import stop_tokens_of
from .generation import Sampling
from .prompts import chat_ids
from .request_fields import Limits, check_fields, check_length, check_messages
from .request_queue import Ending, OneQueue


if TYPE_CHECKING:
    from fastapi import FastAPI

# The library's app has others, for models that this is none of, to load and drop models, and pages from another server.
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health")
_STREAM_ERROR = re.compile(r'^data: {"error": "(.*)"}\n\n\Z', re.MULTILINE | re.DOTALL)
_LONGEST_MESSAGE = 1000  # characters of an error, which quotes what was sent
_LENGTHS = {"max_tokens", "max_completion_tokens", "max_output_tokens"}
_SECONDS_TO_END = 5  # that connections get after Ctrl-C


def check_installed() -> None:
    """Refuses to go on without the packages of the server.

    Raises:
        InputError: naming the extra that has them.
    """
    for package in ("fastapi", "uvicorn", "openai"):
        require(package, "serving", "serve")


def build_app(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> "FastAPI":
    """The server's application, with [`PATHS`] alone.

    Sampling defaults to that of `generate`; requests replace it. Bad requests are answered with status 400.

    Args:
        name (`str`): that requests call the model by, or leave out.
        model (`PreTrainedModel`): from `load`; its generation settings are changed.
        tokenizer (`PreTrainedTokenizerFast`): its tokenizer, with a template for the chat endpoints.
    """
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server

    # It warns of each request, which the server's own log has.
    logging.getLogger("transformers.cli.serving").setLevel(logging.ERROR)
    model.generation_config.update(
        **Sampling().arguments(),
        eos_token_id=stop_tokens_of(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    chat = OneModel(name, model, _for_chat(tokenizer))
    text = OneModel(name, model, _for_text(tokenizer))
    state, limits = OneQueue(), Limits.of(model, tokenizer)
    app = build_server(
        chat,
        _strict(ChatCompletionHandler, "messages", limits)(chat, state),
        completion_handler=_strict(CompletionHandler, "prompt", limits)(text, state),
        response_handler=_strict(ResponseHandler, "input", limits)(chat, state),
        transcription_handler=None,
        systemone_handler=None,
        generation_state=state,
    )
    app.router.routes[:] = [route for route in app.router.routes if route.path in PATHS]
    app.router.redirect_slashes = False
    for kind in (InputError, HTTPException, RequestValidationError, Ending, Exception):
        app.add_exception_handler(kind, _say)
    app.state.ending = state.manager.ending
    return app


def bind(host: str, port: int) -> socket.socket:
    """Takes an address before a model is loaded; connections are refused until [`run`].

    Args:
        host (`str`): name or address of this machine.
        port (`int`): 0 takes a free one.

    Raises:
        InputError: if it is taken, or not to be had.
    """
    if not 0 <= port < 2**16:
        raise InputError(f"--port {port}: must lie between 0, for any that is free, and {2**16 - 1}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise InputError(f"--host {host}: no address of this machine ({error.strerror})") from error
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise InputError(
            f"--host {host} --port {port}: cannot be had ({error.strerror}); choose another port, or 0 for any that is free"
        ) from error
    return bound


def run(app: "FastAPI", bound: socket.socket) -> None:
    """Serves until Ctrl-C or SIGTERM; what is being generated then ends with an error."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            app.state.ending.set()
            super().handle_exit(sig, frame)

    Server(uvicorn.Config(app, log_level="info", timeout_graceful_shutdown=_SECONDS_TO_END)).run(sockets=[bound])


async def _say(request: Any, error: Exception) -> Any:
    """An error in the form that OpenAI's clients show."""
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse

    message = str(getattr(error, "detail", error))
    status = getattr(error, "status_code", 400 if isinstance(error, (InputError, RequestValidationError)) else 500)
    if isinstance(error, RequestValidationError):
        message = "body: must be a JSON object, sent with Content-Type: application/json"
        if reasons := [found["ctx"]["error"] for found in error.errors() if found["type"] == "json_invalid"]:
            message = f"body: is no JSON ({reasons[0]})"
    elif status in (404, 405):
        message = f"{request.method} {request.url.path}: {message}; this server has {', '.join(PATHS)}"
    elif status == 500:
        message = f"{type(error).__name__}: {message}"  # its traceback is in the server's log
    status = 400 if status == 422 else status  # the library's for fields and forms that it does not know
    return JSONResponse(_in_form(message, status), status_code=status)


def _in_form(message: str, status: int) -> dict[str, Any]:
    if len(message) > _LONGEST_MESSAGE:
        message = f"{message[: _LONGEST_MESSAGE // 2]} ... {message[-_LONGEST_MESSAGE // 2 :]}"
    return {"error": {"message": message, "type": "invalid_request_error" if status < 500 else "server_error"}}


async def _with_error_in_form(parts: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """A stream whose error is as OpenAI's; of the library's (5.23), a text alone, clients show nothing."""
    async with aclosing(parts):  # it ends the generation when the client is gone
        async for part in parts:
            yield _STREAM_ERROR.sub(lambda found: f"data: {json.dumps(_in_form(found[1], 500))}\n\n", part)


def _strict(handler: type[BaseHandler], needed: str, limits: Limits) -> type[BaseHandler]:
    """A handler that refuses what the library's (5.23) ignores, or fails at, and streams only when asked.

    (That of `/v1/responses` streams unless it is told not to.)
    """
    from fastapi.responses import StreamingResponse

    class Strict(handler):
        async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
            response = await super().handle_request(body, request_id)
            if isinstance(response, StreamingResponse):
                response.body_iterator = _with_error_in_form(response.body_iterator)
            return response

        def _validate_request(self, body: dict[str, Any]) -> None:
            super()._validate_request(body)
            given = body.get(needed)
            if given is None:
                raise InputError(f"{needed}: is missing")
            try:
                if needed == "messages" or (needed == "input" and not isinstance(given, str)):
                    check_messages(given, needed)
                checked = {"stream": False, **check_fields(body, needed, limits), needed: given}
                check_length([given, checked.get("instructions")], limits)
            except RecursionError as error:
                raise InputError("body: is nested too deeply") from error
            body.clear()
            body.update(checked)

        def _build_generation_config(
            self, body: dict[str, Any], model_generation_config: GenerationConfig, use_cb: bool = False
        ) -> GenerationConfig:
            """The library's leaves the model's settings out where a request has its own, and a bias out of completions.

            It would seed here, while others generate.
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
    """What the handlers ask for a model: always the same one, which is neither looked for nor unloaded."""

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast):
        self._name, self._model, self._tokenizer = name, model, tokenizer
        super().__init__(force_model=name)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """A name is a name; the library appends `@main`."""
        return model_id

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:
        """The model alone; the library lists the Hub's cache, and fails where there is none."""
        return [{"id": self._name, "object": "model", "created": int(time.time()), "owned_by": "tinyllama_hf"}]

    def _load_processor(self, model_id_and_revision: str, gguf_file: str | None = None) -> PreTrainedTokenizerFast:
        if model_id_and_revision != self._name or gguf_file:
            raise InputError(f"model {model_id_and_revision!r}: this server has {self._name!r} alone")
        return self._tokenizer

    def _load_model(self, *_: Any, **__: Any) -> PreTrainedModel:
        return self._model


def _for_chat(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Renders conversations as `chat` does: control tokens come from the template alone."""
    served = copy.deepcopy(tokenizer)

    def apply_chat_template(messages: Any, **_: Any) -> BatchEncoding:
        ids = chat_ids(messages, tokenizer)
        return BatchEncoding({"input_ids": [ids], "attention_mask": [[1] * len(ids)]}, tensor_type="pt")

    served.apply_chat_template = apply_chat_template
    return served


def _for_text(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Takes prompts as text, and decodes what comes after one: with the space that a Llama text begins with."""
    served = copy.deepcopy(tokenizer)
    served.split_special_tokens = True
    state = json.loads(served.backend_tokenizer.to_str())
    if parts := (state["decoder"] or {}).get("decoders"):
        state["decoder"]["decoders"] = [part for part in parts if part["type"] != "Strip"]
        served.backend_tokenizer.decoder = Tokenizer.from_str(json.dumps(state)).decoder
    return served
