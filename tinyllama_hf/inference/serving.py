"""`transformers serve` for one of our models: the endpoints of OpenAI's interface, with our tokens and limits.

The library's handlers do the work. Its own command (5.23) would take the tokenizer that stock transformers makes of a folder,
look for control tokens in what people wrote, drop the space between a prompt and its continuation, ignore a temperature unless
the model's folder says that it samples, ignore what it does not support, and generate beyond the context;
`TestTheLibrary` in tests/inference/test_serving.py shows it.
"""

import copy
import json
import logging
import socket
import time
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from transformers import BatchEncoding, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import BaseHandler

from ..errors import InputError, require
from .batch import stop_tokens_of
from .generation import Sampling
from .prompts import chat_ids
from .request_fields import check_fields, check_messages
from .request_queue import Ending, OneQueue


if TYPE_CHECKING:
    from fastapi import FastAPI

_OTHER_MODELS = ("/v1/audio/transcriptions", "/v1/systemone")  # paths that need one
# What the handlers ignore, and may: answers are the same without.
_HARMLESS = {"stream_options", "user", "metadata", "store", "service_tier", "parallel_tool_calls"}
_IGNORED = {"chat_template_kwargs"}  # by our template, besides what the handlers say they ignore
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
    """The server's application: `/v1/chat/completions`, `/v1/completions`, `/v1/responses`, `/v1/models`, `/health`.

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
    state, vocab_size = OneQueue(), model.config.vocab_size
    app = build_server(
        chat,
        _strict(ChatCompletionHandler, "messages", vocab_size)(chat, state),
        completion_handler=_strict(CompletionHandler, "prompt", vocab_size)(text, state),
        response_handler=_strict(ResponseHandler, "input", vocab_size)(chat, state),
        transcription_handler=None,
        systemone_handler=None,
        generation_state=state,
    )
    app.router.routes[:] = [route for route in app.router.routes if route.path not in _OTHER_MODELS]
    for kind in (InputError, HTTPException, RequestValidationError, Ending):
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


async def _say(_: Any, error: Exception) -> Any:
    """An error in the form that OpenAI's clients show."""
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse

    message = str(getattr(error, "detail", error))
    if isinstance(error, RequestValidationError):
        message = "body: must be a JSON object, sent with Content-Type: application/json"
        if reasons := [found["ctx"]["error"] for found in error.errors() if found["type"] == "json_invalid"]:
            message = f"body: is no JSON ({reasons[0]})"
    status = getattr(error, "status_code", 400)
    status = 400 if status == 422 else status  # the library's for fields and forms that it does not know
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind}}, status_code=status)


def _strict(handler: type[BaseHandler], needed: str, vocab_size: int) -> type[BaseHandler]:
    """A handler that refuses what the library's (5.23) ignores, or fails at, and streams only when asked.

    (That of `/v1/responses` streams unless it is told not to.)
    """

    class Strict(handler):
        def _validate_request(self, body: dict[str, Any]) -> None:
            super()._validate_request(body)
            if body.get(needed) is None:
                raise InputError(f"{needed}: is missing")
            for name in sorted(body.keys() & (self._unused_fields | _IGNORED) - _HARMLESS):
                if body[name] and not (name in ("n", "best_of") and body[name] == 1):
                    raise InputError(f"{name}: is not supported by this server; leave it out")
            given = body[needed]
            if needed == "messages" or (needed == "input" and not isinstance(given, str)):
                check_messages(given, needed)
            checked = {"stream": False, **check_fields(body, vocab_size), needed: given}
            body.clear()
            body.update(checked)

        def _build_generation_config(
            self, body: dict[str, Any], model_generation_config: GenerationConfig, use_cb: bool = False
        ) -> GenerationConfig:
            """The library's leaves the model's settings out where a request has its own, and a bias out of completions."""
            settings = dict(body.get("generation_config", {}))
            length = settings.pop("max_new_tokens", None)
            defaults = copy.deepcopy(model_generation_config)
            defaults.update(**settings)
            fields = {name: settings[name] for name in ("temperature",) if name in settings} | body
            bias = fields.pop("logit_bias", {})
            fields.pop("generation_config", None)
            config = super()._build_generation_config(fields, defaults, use_cb)
            config.sequence_bias = {(int(token),): value for token, value in bias.items()} or None
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

    def apply_chat_template(messages: Any, tools: Any = None, **_: Any) -> BatchEncoding:
        if tools:
            raise InputError("tools: are not supported; leave them out")
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
