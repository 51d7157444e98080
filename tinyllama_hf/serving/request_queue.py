"""Generating for the requests of a server: one at a time, within the model's context, and no longer than the server runs.

All of them draw from torch's one generator, in the one thread that generates; it is seeded there, before each of them.
"""

import asyncio
import functools
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.cli.serving.utils import GenerateManager, GenerationState, _StreamError

from ..inference.generation import Context, ExactTextStreamer


MAX_WAITING = 64  # requests, not counting the one that is generated
_RETRY_SECONDS = 5
_Prepared = TypeVar("_Prepared")


class OneQueue(GenerationState):
    """Generates for one request at a time, whichever endpoint it came through."""

    def __init__(self):
        super().__init__()
        self.manager = Generation()

    def get_manager(self, model_id: str, use_cb: bool = False) -> GenerateManager:
        return self.manager


class Generation(GenerateManager):
    """Generates within the model's context, streams exactly what the whole text would be, and stops when the server does.

    A `GenerationConfig` comes with a `seed` of ours, or `None`. With `MAX_WAITING` requests waiting, new ones are refused.
    """

    def __init__(self):
        super().__init__()
        self.ending = threading.Event()
        self._places = threading.Semaphore(1 + MAX_WAITING)
        # One thread, since calls of a tokenizer change its settings.
        self._preparing = ThreadPoolExecutor(1, "prepare")

    async def prepare(self, function: Callable[..., _Prepared], *arguments: Any) -> _Prepared:
        """Runs the checks and the tokenization of a request in a thread, while the event loop answers others.

        Raises:
            Busy: if the queue is full.
        """
        self._enter()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._preparing, function, *arguments)
        finally:
            self._places.release()

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> tuple[asyncio.Queue, "_QueueStreamer"]:
        arguments = self._arguments(model, processor, inputs, gen_config)
        queue: asyncio.Queue = asyncio.Queue()
        put = functools.partial(asyncio.get_running_loop().call_soon_threadsafe, queue.put_nowait)
        streamer = _QueueStreamer(processor, put)

        def generate() -> None:
            try:
                self._generate(model, streamer=streamer, **arguments)
            except _Cancelled:
                put(None)
            except Exception as error:  # whatever it is, somebody waits for the end of the stream
                put(_StreamError(str(getattr(error, "detail", error))))

        self.submit(self._in_place(generate))
        return queue, streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, torch.Tensor]:
        arguments = self._arguments(model, processor, inputs, gen_config)
        sequences = await self.async_submit(self._in_place(self._generate), model, **arguments)
        length = inputs["input_ids"].shape[-1]
        return processor.decode(sequences[0, length:], skip_special_tokens=True), length, sequences[0, length:]

    def _enter(self) -> None:
        if not self._places.acquire(blocking=False):
            raise Busy

    def _in_place(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a function so that it holds a place in the queue until it has run."""
        self._enter()

        def run(*arguments: Any, **options: Any) -> Any:
            try:
                return function(*arguments, **options)
            finally:
                self._places.release()

        return run

    def _arguments(self, model: Any, processor: Any, inputs: Any, gen_config: Any) -> dict[str, Any]:
        _limit(model, inputs, gen_config)
        return {**inputs, "generation_config": gen_config, "tokenizer": processor, "stopping_criteria": [self._go_on]}

    def _generate(self, model: Any, generation_config: GenerationConfig, **arguments: Any) -> torch.Tensor:
        self._check_ending()
        if generation_config.seed is None:
            torch.seed()  # what was seeded before would go on, and repeat
        else:
            torch.manual_seed(generation_config.seed)
        return model.generate(generation_config=generation_config, **arguments)

    def _go_on(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self._check_ending()
        return torch.zeros_like(input_ids[:, 0], dtype=torch.bool)

    def _check_ending(self) -> None:
        if self.ending.is_set():
            raise Ending


class _Cancelled(Exception):
    """Nobody listens to the stream any more."""


class Ending(Exception):
    """The server was asked to end."""

    status_code, detail = 503, "the server is shutting down"


class Busy(Exception):
    """The queue is full."""

    status_code, code = 429, "rate_limit_exceeded"
    headers = {"Retry-After": str(_RETRY_SECONDS)}
    detail = f"{MAX_WAITING} requests are waiting; try again in {_RETRY_SECONDS} seconds"


class _QueueStreamer(ExactTextStreamer):
    """Puts pieces of the text into a queue, and `None` at its end.

    The library's streamer (5.23) raises at bytes that are no UTF-8.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, put: Callable[[Any], Any]):
        super().__init__(tokenizer, put, skip_prompt=True)
        self.total_tokens, self._cancelled = 0, threading.Event()

    def put(self, value: torch.Tensor) -> None:
        """Takes the ids of the prompt, then of each new token."""
        if self._cancelled.is_set():
            raise _Cancelled
        self.total_tokens += 0 if self.next_tokens_are_prompt else value.numel()
        super().put(value)

    def end(self) -> None:
        """Shows what was held back."""
        super().end()
        self._write(None)

    def cancel(self) -> None:
        """Stops the generation at its next token."""
        self._cancelled.set()


def _limit(model: PreTrainedModel, inputs: Mapping[str, Any], config: GenerationConfig) -> None:
    """Checks the length of a prompt, and lowers its number of new tokens to what there is room for."""
    length, context = inputs["input_ids"].shape[-1], Context.of(model)
    context.new_tokens(length)
    config.max_new_tokens = min(config.max_new_tokens or context.tokens, context.tokens - length)
    if not config.do_sample:
        config.update(temperature=1.0, top_p=1.0, top_k=50)  # the library's defaults; of others it warns
