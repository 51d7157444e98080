"""Shared by the parts of run.py: models with random weights, calls that are measured in turns, recorded steps."""

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM
from tinyllama_hf.decoding import fixed_memory, graphs
from tinyllama_hf.decoding.timing import mark, seconds_between, wait_for
from tinyllama_hf.errors import InputError, one_line


PRESET, PROMPT_TOKENS, NEW_TOKENS, ROUNDS = "1.1b", 128, 128, 3
SWITCH = "TINYLLAMA_HF_GRAPHS"
Call = Callable[[], Any]
Figures = dict[str, Any]


class Bench:
    """Models, and calls that are measured, on one device.

    Args:
        device (`str`): `cuda` or `cpu`. On a CPU a stand-in records the steps, so that the same code runs.
        tiny (`bool`): small models and few tokens, to see that all parts run.
    """

    def __init__(self, device: str, tiny: bool):
        self.device, self.tiny = device, tiny
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.preset, self.rounds = ("micro", 1) if tiny else (PRESET, ROUNDS)
        self.prompt_tokens, self.new_tokens = (16, 8) if tiny else (PROMPT_TOKENS, NEW_TOKENS)
        if device == "cpu":
            use_stand_in()

    def size(self, full: Any, tiny: Any) -> Any:
        """Returns a number or list for the size of this run."""
        return tiny if self.tiny else full

    def model(self, **overrides: Any) -> TinyLlamaForCausalLM:
        """Returns a model with random weights that stops nowhere."""
        config = TinyLlamaConfig.preset(self.preset, **overrides)
        with torch.device(self.device):
            model = TinyLlamaForCausalLM(config).to(self.dtype).eval()
        return endless(model)

    def prompts(self, rows: int) -> torch.Tensor:
        """Returns `[rows, prompt_tokens]`."""
        ids = torch.randint(3, 32000, (rows, self.prompt_tokens), generator=torch.Generator().manual_seed(rows))
        return ids.to(self.device)

    def call(self, model: Any, rows: int, new_tokens: int | None = None, **options: Any) -> Call:
        """Returns a call of `generate`, greedy unless the options say otherwise."""
        ids, number = self.prompts(rows), new_tokens or self.new_tokens

        def run() -> None:
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=number,
                           **{"do_sample": False, "pad_token_id": 0, **options})  # fmt: skip

        return run

    def seconds(self, call: Call) -> float:
        """Returns the seconds of a call, the device's work included."""
        self._wait()
        began = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - began

    def measure(self, calls: dict[str, Call], tokens: int, rounds: int | None = None) -> dict[str, Figures]:
        """Measures each call once per round, in turns. The first round, which allocates and records, is left out.

        Args:
            calls (`dict`): the variants by name.
            tokens (`int`): new tokens of a call, all rows together.
            rounds (`int`, *optional*): number of rounds that count.
        """
        found: dict[str, list[float]] = {name: [] for name in calls}
        errors: dict[str, str] = {}
        for number in range((rounds or self.rounds) + 1):
            for name, call in calls.items():
                if name in errors:
                    continue
                try:
                    seconds = self.seconds(call)
                except (torch.OutOfMemoryError, InputError) as error:  # while it is recorded, or in advance
                    release()
                    errors[name] = one_line(error)[:300]
                    continue
                if number:
                    found[name].append(seconds)
        return {name: {"error": errors[name]} if name in errors else _figures(found[name], tokens) for name in calls}

    def replayed_seconds(self, model: Any, kind: str, repeats: int = 30) -> float | None:
        """Returns the device's time of the last recorded step of a kind, or `None` if there is none.

        Args:
            model (`PreTrainedModel`): the target of the last generation.
            kind (`str`): `"pass"`, a pass of the target over one token, or `"draft"`, a whole proposal per token.
        """
        memory = fixed_memory._kept.get(model)
        for key in reversed(memory.graphs._steps if memory else ()):
            is_pass = isinstance(key[0], int) and key[2] == 1
            if is_pass if kind == "pass" else key[0] == "draft":
                replay, _ = memory.graphs._steps[key]
                replay()
                began = mark(memory.state.tokens)
                for _ in range(self.size(repeats, 2)):
                    replay()
                ended = mark(memory.state.tokens)
                wait_for(ended)
                steps = self.size(repeats, 2) * (1 if kind == "pass" else key[2])
                return seconds_between(began, ended) / steps
        return None

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def _figures(seconds: list[float], tokens: int) -> Figures:
    middle = statistics.median(seconds)
    return {"tokens_per_second": rounded(tokens / middle), "seconds": rounded(middle)}


def rounded(value: float | None) -> float | None:
    """Returns a number with four digits."""
    return None if value is None else float(f"{value:.4g}")


def graphs_of(model: Any) -> str:
    """Returns number, memory and time of the graphs that are kept for a target."""
    memory = fixed_memory._kept.get(model)
    return "none" if memory is None else str(memory.graphs)


def recorded(model: Any) -> tuple[object, int]:
    """Returns the memory that is kept for a target, and the number of steps that were recorded in it."""
    memory = fixed_memory._kept.get(model)
    return memory, 0 if memory is None else memory.graphs.recorded


@contextlib.contextmanager
def without_graphs() -> Iterator[None]:
    """Generates without recorded steps, in transformers' own loop if there is no draft."""
    os.environ[SWITCH] = "off"
    try:
        yield
    finally:
        del os.environ[SWITCH]


def off(call: Call) -> Call:
    """Returns the call without recorded steps."""

    def run() -> None:
        with without_graphs():
            call()

    return run


def use_stand_in() -> None:
    """Records steps on a CPU, for rehearsals: the stand-in of the tests repeats the recorded device calls."""
    from tests.decoding.replay import Replay

    graphs.recorder_for = lambda device: None if os.environ.get(SWITCH) == "off" else Replay()


def endless(model: Any) -> Any:
    """Removes the end of sequence, so that every run has the same length."""
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def release() -> None:
    """Frees the memory of models that are gone and of failed calls."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
