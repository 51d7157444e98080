"""Generating for many prompts, several at a time."""

import collections
import copy
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import GenerationMode

from ..decoding.engine import Decoding, prepare
from ..decoding.ragged_cache import check_full_attention
from ..decoding.rows import RowPlan
from ..decoding.speculative import check_pair
from ..errors import InputError, check_seed, did_you_mean
from ..inference.drafts import SEEDED_DRAFT_LENGTH, Draft
from ..inference.generation import Sampling, context_of


ENGINES = ("batch", "continuous")
DEFAULT_BATCH_SIZE = 8
_REFILL = (
    4  # prompts are read when a batch has room for its fourth part: a pass for each alone costs more than it brings
)


class Request(NamedTuple):
    """A prompt to continue.

    Attributes:
        key (`int`): its name; with a seed, its draws follow from seed and key.
        ids (`Sequence[int]`): the prompt.
        max_new_tokens (`int`): at most so many.
    """

    key: int
    ids: Sequence[int]
    max_new_tokens: int


class Completion(NamedTuple):
    """What was generated for a request.

    Attributes:
        key (`int`): the request's.
        ids (`list[int]`): new tokens, without the one that ended them.
        finish_reason (`str`): `"stop"` where such a token came, `"length"` where `max_new_tokens` were generated.
    """

    key: int
    ids: list[int]
    finish_reason: str


def generate_many(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    batch_size: int = DEFAULT_BATCH_SIZE,
    sampling: Sampling | None = None,
    seed: int | None = None,
    draft: Draft | None = None,
    engine: str = "batch",
) -> Iterator[Completion]:
    """Continues many prompts, and yields each when it is done: longer prompts first, not in the order of the requests.

    Greedy output is what each prompt gets alone, to rounding, which depends on the shape of a batch. With a seed, sampled
    output of the engine `"batch"` depends on the seed and the prompt's key alone, in any batch; with a draft it is another
    sample than without.

    Args:
        model (`PreTrainedModel`): a Llama.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer, for padding and end-of-sequence.
        requests (`Sequence[Request]`): with keys that differ.
        batch_size (`int`, *optional*, defaults to 8): prompts at a time.
        sampling (`Sampling`, *optional*): how tokens are drawn; its `max_new_tokens` has no effect, each request has its own.
        seed (`int`, *optional*): of the draws.
        draft (`Draft`, *optional*): proposes tokens.
        engine (`str`, *optional*, defaults to `"batch"`): `"batch"` keeps each row at its own length, and gives the places of
            rows that are done to the next prompts; `"continuous"` is transformers' continuous batching, which does the same
            over one mask of all tokens.

    Raises:
        InputError: for values out of range, a request that does not fit the context, and a model whose generation settings
            ask for beams.
    """
    sampling = sampling or Sampling()
    check_options(batch_size, sampling, seed, engine, with_draft=draft is not None)
    _check_mode(model, sampling)
    _check_lengths(requests, *context_of(model, draft))
    if len({request.key for request in requests}) < len(requests):
        raise InputError("requests: two of them have the same key; give each its own")
    stop_tokens = stop_tokens_of(model, tokenizer)
    if engine == "continuous":
        from .continuous import generate_continuously

        return generate_continuously(model, requests, batch_size, sampling, stop_tokens)
    if draft:
        check_pair(model, draft.model)
    else:
        check_full_attention(model, "model", drafts=False)
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id  # masked, and cut off behind the end
    entropy = np.random.SeedSequence().entropy if seed is None else seed
    ends = {"pad_token_id": pad, "eos_token_id": stop_tokens or None}
    setup = _Setup(model, sampling, draft, seed is not None, entropy, ends)
    return _refilled(setup, requests, batch_size, stop_tokens)


def check_options(batch_size: int, sampling: Sampling, seed: int | None, engine: str, with_draft: bool) -> None:
    """Refuses values out of range and options that exclude each other, by the names of the command's options."""
    sampling.check()
    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size}: must be at least 1")
    if seed is not None:
        check_seed(seed)
    if engine not in ENGINES:
        raise InputError(f"--engine {engine!r}: there is none of this name{did_you_mean(engine, ENGINES)}")
    if engine == "continuous" and with_draft:
        raise InputError("--engine continuous: has no place for a draft; leave out --draft, or take --engine batch")
    if engine == "continuous" and seed is not None and sampling.temperature:
        raise InputError(
            "--engine continuous: its draws depend on what shares a pass, so that --seed would not repeat them; leave it "
            "out, or take --engine batch"
        )


def _check_lengths(requests: Sequence[Request], context: int, whose: str) -> None:
    for request in requests:
        if not request.ids or len(request.ids) + request.max_new_tokens > context or request.max_new_tokens < 1:
            raise InputError(
                f"request {request.key}: {len(request.ids)} tokens and {request.max_new_tokens} new ones; both must be at "
                f"least 1, and together at most {context}, the {whose} context"
            )


def _check_mode(model: PreTrainedModel, sampling: Sampling) -> None:
    """Refuses what the engines would leave out of the model's generation settings."""
    config = copy.deepcopy(model.generation_config)
    config.update(**sampling.arguments())
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise InputError(
            f"generation_config.json of the model: asks for {mode.value} (num_beams {config.num_beams}), and many prompts are "
            "generated greedily or by sampling; take it out there"
        )


def stop_tokens_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end-of-sequence of the tokenizer and those that the model's folder names."""
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return sorted({tokenizer.eos_token_id, *named} - {None})


def finish(request: Request, new: list[int], stop_tokens: Collection[int]) -> Completion:
    """Cuts new tokens before the first that stops, or where there are enough of them."""
    new = new[: request.max_new_tokens]
    end = next((i for i, token in enumerate(new) if token in stop_tokens), None)
    return Completion(request.key, new[:end], "length" if end is None else "stop")


class _Setup(NamedTuple):
    """What all prompts are continued with."""

    model: PreTrainedModel
    sampling: Sampling
    draft: Draft | None
    is_seeded: bool
    entropy: int
    ends: dict[str, Any]  # arguments of `generate`

    def begin(self, requests: Sequence[Request]) -> Decoding:
        """Reads prompts in one pass, which draws their first tokens."""
        plans = [RowPlan(request.key, request.max_new_tokens, self._draws(request)) for request in requests]
        decoding = prepare(
            self.model,
            self.draft.model if self.draft else None,
            SEEDED_DRAFT_LENGTH if self.is_seeded else None,
            **_left_padded(requests, self.ends["pad_token_id"], self.model.device),
            then=lambda decoding: decoding,
            plans=plans,
            max_new_tokens=max(request.max_new_tokens for request in requests),
            **self.ends,
            **self.sampling.arguments(),
        )
        decoding.start()
        return decoding

    def _draws(self, request: Request) -> torch.Tensor | None:
        if not self.sampling.temperature:
            return None
        return torch.from_numpy(np.random.default_rng([self.entropy, request.key]).random((3, request.max_new_tokens)))


def _refilled(
    setup: _Setup, requests: Sequence[Request], batch_size: int, stop_tokens: list[int]
) -> Iterator[Completion]:
    """Rounds over up to `batch_size` rows: who is done leaves, and the next prompts take the free places.

    The longest come first, so that a batch that does not fit a device is known at once.
    """
    waiting = collections.deque(sorted(requests, key=lambda request: len(request.ids), reverse=True))
    by_key = {request.key: request for request in requests}
    running: Decoding | None = None
    while waiting or (running and len(running.rows)):
        free = batch_size - (len(running.rows) if running else 0)
        if waiting and free >= max(1, batch_size // _REFILL):
            joining = setup.begin([waiting.popleft() for _ in range(min(free, len(waiting)))])
            if running is None:
                running = joining
            else:
                running.join(joining)
        else:
            running.round()
        if setup.draft:
            setup.draft.statistics = running.statistics
        for key, ids in running.rows.take_finished():
            yield finish(by_key[key], ids.tolist(), stop_tokens)


def _left_padded(batch: Sequence[Request], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, `[rows, longest prompt]`: generation goes on at the right."""
    width = max(len(request.ids) for request in batch)
    ids = torch.full((len(batch), width), pad)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(batch):
        ids[row, width - len(request.ids) :] = torch.tensor(request.ids)
        mask[row, width - len(request.ids) :] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
