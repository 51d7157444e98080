"""Generation for many prompts, several at a time."""

import collections
import copy
import functools
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from ..decoding.engine import Decoding
from ..decoding.proposals import Proposer
from ..decoding.rows import RowPlan
from ..decoding.speculative import check_pair
from ..decoding.supported import SUPPORTED_MODES
from ..errors import InputError, check_seed
from ..inference.generation import SEEDED_DRAFT_LENGTH, Context, stop_token_ids
from ..inference.options import Sampling


DEFAULT_BATCH_SIZE = 8
# New prompts are read once a quarter of the batch is free: reading each alone would cost more than idle rows do.
_REFILL = 4


class Request(NamedTuple):
    """A prompt to continue.

    Attributes:
        key (`int`): identifies the request; with a seed, its random numbers follow from seed and key.
        ids (`Sequence[int]`): tokens of the prompt.
        max_new_tokens (`int`): maximum number of new tokens.
    """

    key: int
    ids: Sequence[int]
    max_new_tokens: int


class Completion(NamedTuple):
    """The output of a request.

    Attributes:
        key (`int`): key of the request.
        ids (`list[int]`): new tokens, without the stop token.
        finish_reason (`str`): `"stop"` after a stop token or a stop string, `"length"` after `max_new_tokens`.
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
    draft: Proposer | None = None,
    stop_strings: Sequence[str] = (),
) -> Iterator[Completion]:
    """Continues many prompts and yields each when it is finished: longer prompts start first.

    Rows have their own lengths, and finished rows are replaced by the next prompts. Greedy output is that of each
    prompt alone, up to rounding, which depends on the shape of a batch. With a seed, sampled output depends on the
    seed and the key of the prompt only, not on the batch. The same seed gives different samples with and without a
    draft.

    Args:
        model (`PreTrainedModel`): a Llama.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer, for padding and end-of-sequence.
        requests (`Sequence[Request]`): prompts with unique keys.
        batch_size (`int`, *optional*, defaults to 8): number of prompts at a time.
        sampling (`Sampling`, *optional*): sampling settings; `max_new_tokens` is ignored, since each request has its
            own.
        seed (`int`, *optional*): seed of the random numbers.
        draft (`Proposer`, *optional*): proposes tokens.
        stop_strings (`Sequence[str]`, *optional*): texts that end a completion. They are part of its tokens.

    Raises:
        InputError: if a value is out of range, a request does not fit the context, or the model's generation settings
            ask for beam search.
    """
    sampling = sampling or Sampling()
    check_options(batch_size, seed)
    _check_mode(model, sampling)
    context = Context.of(model, draft)
    for request in requests:
        if request.max_new_tokens < 1:
            raise InputError(f"request {request.key}: max_new_tokens {request.max_new_tokens}; must be at least 1")
        context.new_tokens(len(request.ids), request.max_new_tokens, f"request {request.key}")
    if len({request.key for request in requests}) < len(requests):
        raise InputError("requests: two of them have the same key. Give each its own")
    check_pair(model, draft)
    stop_tokens = stop_token_ids(model, tokenizer)
    # Padding is masked in prompts, and not part of the output.
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    arguments = {"pad_token_id": pad, "eos_token_id": stop_tokens or None, **sampling.arguments()}
    entropy = secrets.randbits(128) if seed is None else seed
    length = None if seed is None else SEEDED_DRAFT_LENGTH
    stops = functools.partial(_EndsWithText, tokenizer, tuple(filter(None, stop_strings)))
    begin = functools.partial(
        _begin,
        model,
        draft,
        length,
        entropy if sampling.temperature else None,
        stops if stop_strings else None,
        **arguments,
    )
    return _refilled(begin, draft, requests, batch_size, stop_tokens)


class _EndsWithText(StoppingCriteria):
    """Ends a row whose new text has one of the stop strings. The engine calls it after each token.

    The criterion of transformers (5.23) also finds a stop string that begins in the prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: tuple[str, ...], prompt: int):
        self.tokenizer, self.texts, self.prompt = tokenizer, texts, prompt
        # Each token is at least one byte. The text before was checked with the tokens before.
        self._tail = max((len(text.encode()) for text in texts), default=0) + 1

    def __deepcopy__(self, memo: dict[int, Any]) -> "_EndsWithText":
        return self  # has no state, and the engine copies criteria for each row

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        new = input_ids[0, max(self.prompt, input_ids.shape[1] - self._tail) :]
        text = self.tokenizer.decode(new, skip_special_tokens=False)
        is_ended = any(stop in text for stop in self.texts)
        return torch.full((len(input_ids),), is_ended, device=input_ids.device)


def check_options(batch_size: int, seed: int | None) -> None:
    """Refuses values out of range; messages name the command's options."""
    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size}: must be at least 1")
    if seed is not None:
        check_seed(seed)


def _check_mode(model: PreTrainedModel, sampling: Sampling) -> None:
    """Refuses generation settings of the model that the engine does not support, before any output."""
    config = copy.deepcopy(model.generation_config)
    config.update(**sampling.arguments())
    mode = config.get_generation_mode()
    if mode not in SUPPORTED_MODES:
        raise InputError(
            f"generation_config.json of the model: asks for {mode.value} (num_beams {config.num_beams}). Only greedy "
            "decoding and sampling are supported for many prompts. Remove it there"
        )


def _begin(
    model: PreTrainedModel,
    draft: Proposer | None,
    draft_length: int | None,
    entropy: int | None,
    stops: "Callable[[int], _EndsWithText] | None",
    requests: Sequence[Request],
    pad_token_id: int,
    **arguments: Any,
) -> Decoding:
    """Reads prompts in one pass and returns the engine with their first new tokens; samples if `entropy` is given."""
    prompts = [torch.tensor(request.ids, device=model.device) for request in requests]
    padded = functools.partial(pad_sequence, batch_first=True, padding_side="left")
    ids = padded(prompts, padding_value=pad_token_id)
    mask = padded([torch.ones_like(prompt) for prompt in prompts])
    plans = [RowPlan(request.key, request.max_new_tokens, _draws(request, entropy)) for request in requests]
    longest = max(request.max_new_tokens for request in requests)
    arguments |= {"max_new_tokens": longest, "pad_token_id": pad_token_id}
    if stops:
        arguments["stopping_criteria"] = [stops(ids.shape[1])]
    decoding = Decoding(model, draft, draft_length, ids, mask, plans, **arguments)
    decoding.start()
    return decoding


def _draws(request: Request, entropy: int | None) -> torch.Tensor | None:
    if entropy is None:
        return None
    return torch.from_numpy(np.random.default_rng([entropy, request.key]).random((3, request.max_new_tokens)))


def _refilled(
    begin: Callable[[list[Request]], Decoding],
    draft: Proposer | None,
    requests: Sequence[Request],
    batch_size: int,
    stop_tokens: list[int],
) -> Iterator[Completion]:
    """Runs rounds over up to `batch_size` rows, and replaces finished rows by the next prompts.

    The longest prompts come first, so that a batch that is too large for the device fails at once.
    """
    limits = {request.key: request.max_new_tokens for request in requests}
    waiting = collections.deque(sorted(requests, key=lambda request: len(request.ids), reverse=True))

    def begin_next(number: int) -> Decoding:
        return begin([waiting.popleft() for _ in range(min(number, len(waiting)))])

    if not waiting:
        return
    running = begin_next(batch_size)
    if draft:
        draft.statistics = running.statistics
    while True:
        for key, ids in running.rows.take_finished():
            new = ids.tolist()
            stopped = new[-1] in stop_tokens
            ended = stopped or len(new) < limits[key]
            yield Completion(key, new[: len(new) - stopped], "stop" if ended else "length")
        free = batch_size - len(running.rows)
        if waiting and free >= max(1, batch_size // _REFILL):
            running.join(begin_next(free))
        elif len(running.rows):
            running.round()
        else:
            running.close()
            return
