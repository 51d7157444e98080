"""Generating for many prompts, several at a time."""

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import GenerationMode, LogitsProcessor, LogitsProcessorList

from ..errors import InputError, did_you_mean
from .drafts import Draft
from .generation import Sampling, context_of


ENGINES = ("batch", "continuous")
DEFAULT_BATCH_SIZE = 8


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

    Greedy output is what each prompt gets by itself, to rounding, which depends on the shape of a batch. With a seed,
    sampled output of the engine `"batch"` is too; with a draft it depends on the rows that share a batch.

    Args:
        model (`PreTrainedModel`): a Llama.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer, for padding and end-of-sequence.
        requests (`Sequence[Request]`): with keys that differ.
        batch_size (`int`, *optional*, defaults to 8): prompts at a time.
        sampling (`Sampling`, *optional*): how tokens are drawn; its `max_new_tokens` has no effect, each request has its own.
        seed (`int`, *optional*): of the draws.
        draft (`Draft`, *optional*): proposes tokens.
        engine (`str`, *optional*, defaults to `"batch"`): `"batch"` sorts by length, pads on the left and runs each batch to
            the end of its longest row; `"continuous"` is transformers' continuous batching, where the next prompt takes the
            place of one that is done.

    Raises:
        InputError: for values out of range, a request that does not fit the context, and a model whose generation settings
            ask for beams.
    """
    sampling = sampling or Sampling()
    check_options(batch_size, sampling, seed, engine, with_draft=draft is not None)
    _check_mode(model, sampling)
    _check_lengths(requests, *context_of(model, draft))
    stop_tokens = stop_tokens_of(model, tokenizer)
    if engine == "continuous":
        from .continuous import generate_continuously

        return generate_continuously(model, requests, batch_size, sampling, stop_tokens)
    return _in_batches(model, tokenizer, requests, batch_size, sampling, seed, draft, stop_tokens)


def check_options(batch_size: int, sampling: Sampling, seed: int | None, engine: str, with_draft: bool) -> None:
    """Refuses values out of range and options that exclude each other, by the names of the command's options."""
    sampling.check()
    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size}: must be at least 1")
    if seed is not None and seed < 0:
        raise InputError(f"--seed {seed}: must be 0 or above")
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


class RowDraws(LogitsProcessor):
    """Draws every row's next tokens by numbers of its own, and leaves `generate` no other choice.

    So that what a row gets depends neither on the rows beside it nor on those before; `generate` has one generator for all.

    Args:
        numbers (`torch.Tensor`): `[rows, new tokens]`, uniform in [0, 1).
        prompt (`int`): width of the prompts.
    """

    def __init__(self, numbers: torch.Tensor, prompt: int):
        self.numbers, self.prompt = numbers, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`[rows, vocabulary]`: all but one token of each row become impossible."""
        sums = scores.double().softmax(dim=-1).cumsum(dim=-1)
        numbers = self.numbers[:, input_ids.shape[1] - self.prompt, None]
        drawn = torch.searchsorted(sums, numbers * sums[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


def _in_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    batch_size: int,
    sampling: Sampling,
    seed: int | None,
    draft: Draft | None,
    stop_tokens: list[int],
) -> Iterator[Completion]:
    context, _ = context_of(model, draft)
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id  # masked, and cut off behind the end
    entropy = np.random.SeedSequence().entropy if seed is None else seed
    for batch in _batches(requests, batch_size, context):
        budget = max(request.max_new_tokens for request in batch)
        inputs = _left_padded(batch, pad, model.device)
        width = inputs["input_ids"].shape[1]
        ends = {"max_new_tokens": budget, "pad_token_id": pad, "eos_token_id": stop_tokens or None}
        if draft:
            if seed is not None:
                torch.manual_seed(int(np.random.SeedSequence([seed, batch[0].key]).generate_state(1)[0]))
            output = draft.generate(model, seeded=seed is not None, **inputs, **ends, **sampling.arguments())
        else:
            draws = _row_draws(batch, entropy, budget, width, model.device) if sampling.temperature else None
            output = model.generate(**inputs, **ends, **sampling.arguments(), custom_generate=draws)
        for request, row in zip(batch, output[:, width:].tolist(), strict=True):
            yield finish(request, row, stop_tokens)


def _batches(requests: Sequence[Request], batch_size: int, context: int) -> Iterator[list[Request]]:
    """Neighbours in length, the longest first, so that a batch that does not fit a device is known at once.

    Where a row may go on for longer than the context leaves a neighbour, the two go apart.
    """
    batch: list[Request] = []
    for request in sorted(requests, key=lambda request: len(request.ids), reverse=True):
        if len(batch) == batch_size or (batch and len(batch[0].ids) + request.max_new_tokens > context):
            yield batch
            batch = []
        batch.append(request)
    if batch:
        yield batch


def _left_padded(batch: Sequence[Request], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, `[rows, longest prompt]`: generation goes on at the right."""
    width = max(len(request.ids) for request in batch)
    ids = torch.full((len(batch), width), pad)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(batch):
        ids[row, width - len(request.ids) :] = torch.tensor(request.ids)
        mask[row, width - len(request.ids) :] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _row_draws(
    batch: Sequence[Request], entropy: int, budget: int, width: int, device: torch.device
) -> Callable[..., torch.Tensor]:
    """The decoding method of sampling, with the draws behind all logits processors that `generate` prepares."""
    numbers = np.stack([np.random.default_rng([entropy, request.key]).random(budget) for request in batch])
    draws = RowDraws(torch.from_numpy(numbers).to(device), width)

    def sample(
        model: PreTrainedModel, input_ids: torch.Tensor, logits_processor: Any, **arguments: Any
    ) -> torch.Tensor:
        return model._sample(input_ids, logits_processor=LogitsProcessorList([*logits_processor, draws]), **arguments)

    return sample
