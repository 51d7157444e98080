"""Generates for the requests of a server, one at a time, within the model's context.

A single thread generates, since sampling uses torch's global random generator. It is seeded in that thread before each
request.
"""

import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.cli.serving.utils import GenerateManager, GenerationState, _StreamError

from ..inference.generation import Context, ExactTextStreamer
from .request_answers import Refusal
from .stop_strings import StopStrings


MAX_WAITING = 64  # requests in the queue, without the one that is being generated
_RETRY_SECONDS = 5
_Prepared = TypeVar("_Prepared")


class OneQueue(GenerationState):
    """Generates for one request at a time, across all endpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = Generation()

    def get_manager(self, model_id: str, use_cb: bool = False) -> GenerateManager:
        return self.manager


class Generation(GenerateManager):
    """Generates within the model's context, streams the exact text, and stops when the server shuts down.

    Each `GenerationConfig` has an additional attribute `seed`, which may be `None`. New requests are refused while
    `MAX_WAITING` others are waiting.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ending = threading.Event()
        self._places = threading.Semaphore(1 + MAX_WAITING)
        # One thread, since calling a tokenizer changes its settings.
        self._preparing = ThreadPoolExecutor(1, "prepare")

    async def prepare(self, function: Callable[..., _Prepared], *arguments: Any) -> _Prepared:
        """Checks and encodes a request in a thread, so that the event loop can answer others.

        Raises:
            Refusal: if the queue is full.
        """
        self._enter()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._preparing, function, *arguments)
        finally:
            self._places.release()

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> tuple[asyncio.Queue, Any]:  # with a streamer of another class than that of transformers
        queue: asyncio.Queue = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(item: Any) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, item)

        reply = _Reply(model, processor, inputs, gen_config, put)

        def generate() -> None:
            try:
                self._generate(model, inputs, gen_config, reply)
                put(None)
            except _Cancelled:
                put(None)
            except Exception as error:  # of any kind: the client waits for the end of the stream
                put(_StreamError(str(error)))

        self.submit(self._in_place(generate))
        return queue, reply

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, Any]:  # a tensor, as in the class of transformers, although its base class has a list
        parts: list[str] = []
        reply = _Reply(model, processor, inputs, gen_config, parts.append)
        sequences = await self.async_submit(self._in_place(self._generate), model, inputs, gen_config, reply)
        length = inputs["input_ids"].shape[-1]
        return "".join(parts), length, sequences[0, length:]

    def _enter(self) -> None:
        if not self._places.acquire(blocking=False):
            message = f"{MAX_WAITING} requests are waiting; try again in {_RETRY_SECONDS} seconds"
            raise Refusal(429, message, "rate_limit_exceeded", {"Retry-After": str(_RETRY_SECONDS)})

    def _in_place(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a function so that it occupies a place in the queue until it has finished."""
        self._enter()

        def run(*arguments: Any, **options: Any) -> Any:
            try:
                return function(*arguments, **options)
            finally:
                self._places.release()

        return run

    def _generate(
        self, model: Any, inputs: Mapping[str, Any], config: GenerationConfig, reply: "_Reply"
    ) -> torch.Tensor:
        self._check_ending()
        reply.check_cancelled()
        seed = getattr(config, "seed", None)
        if seed is None:
            torch.seed()  # or the sequence of the last seed would continue, and repeat earlier answers
        else:
            torch.manual_seed(seed)
        sequences = model.generate(**inputs, generation_config=config, stopping_criteria=[self._check_shutdown, reply])
        reply.end()
        if reply.stops.is_found:
            config.max_new_tokens = None  # or a stop string in the last token would be reported as "length"
        return sequences

    def _check_shutdown(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._check_ending()
        return torch.zeros_like(input_ids[:, 0], dtype=torch.bool)

    def _check_ending(self) -> None:
        if self.ending.is_set():
            raise Refusal(503, "the server is shutting down")


class _Cancelled(Exception):
    """The client has closed the stream."""


class _Reply(ExactTextStreamer):
    """Writes the text of a reply up to the first stop string. It is a stopping criterion of `generate`.

    The streamer of transformers (5.23) raises an error for bytes that are not valid UTF-8, and its criterion for stop
    strings keeps them in the text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        inputs: Mapping[str, Any],
        config: GenerationConfig,
        write: Callable[[str], Any],
    ):
        _limit(model, inputs, config)
        texts, config.stop_strings = config.stop_strings or [], None
        self.stops = StopStrings([texts] if isinstance(texts, str) else texts, write)
        super().__init__(tokenizer, self.stops.put)
        self.total_tokens, self._cancelled = 0, threading.Event()
        self._num_prompt_tokens = inputs["input_ids"].shape[-1]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Receives the prompt and all tokens so far; returns whether the reply has ended, `[1]`."""
        self.check_cancelled()
        new = input_ids[0, self._num_prompt_tokens + self.total_tokens :]
        self.total_tokens += len(new)
        self.put(new)
        has_ended = bool(self.stops.texts) and self.stops.is_complete_with(self.held_back())
        return torch.full_like(input_ids[:, 0], has_ended, dtype=torch.bool)

    def end(self) -> None:
        """Writes the text that was held back."""
        super().end()
        self.stops.end()

    def cancel(self) -> None:
        """Stops the generation at the next token."""
        self._cancelled.set()

    def check_cancelled(self) -> None:
        """Raises an exception that ends the generation, if the client has closed the stream."""
        if self._cancelled.is_set():
            raise _Cancelled


def _limit(model: PreTrainedModel, inputs: Mapping[str, Any], config: GenerationConfig) -> None:
    """Checks the length of a prompt, and limits the number of new tokens to the rest of the context."""
    length, context = inputs["input_ids"].shape[-1], Context.of(model)
    context.new_tokens(length)
    config.max_new_tokens = min(config.max_new_tokens or context.tokens, context.tokens - length)
    if not config.do_sample:
        config.update(temperature=1.0, top_p=1.0, top_k=50)  # defaults; transformers warns about other values
