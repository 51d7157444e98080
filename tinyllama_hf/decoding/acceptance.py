"""Acceptance of drafted tokens: the target's scores per row, and the rules for greedy decoding and for sampling."""

import copy
import math
from collections.abc import Callable, Hashable, Sequence

import torch
from transformers import generation
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from ..errors import InputError
from .row_state import ACCEPTING, CHOOSING, RowState
from .rows import Rows


class MostLikelyToken(LogitsProcessor):
    """Leaves the most likely token only: sampling is then greedy, so that one batch can have rows of both kinds."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        nothing = torch.full_like(scores, -math.inf)
        return nothing.scatter(-1, scores.argmax(dim=-1, keepdim=True), 0.0)


# These look at the scores of one position only, so all rows and positions can be processed in one call.
_WITHOUT_CONTEXT = (
    generation.TemperatureLogitsWarper,
    generation.TopKLogitsWarper,
    generation.TopPLogitsWarper,
    generation.MinPLogitsWarper,
    generation.TypicalLogitsWarper,
    generation.EpsilonLogitsWarper,
    generation.EtaLogitsWarper,
    generation.LogitNormalization,
    generation.InfNanRemoveLogitsProcessor,
    generation.SuppressTokensLogitsProcessor,
    MostLikelyToken,
)
# Of these, the ones that never read from the device.
_RECORDABLE = (
    generation.TemperatureLogitsWarper,
    generation.TopKLogitsWarper,
    generation.TopPLogitsWarper,
    generation.MinPLogitsWarper,
    generation.LogitNormalization,
    MostLikelyToken,
)
# These count tokens from the left edge of the padded batch. The attribute is shifted to the start of the row.
_COUNTING = {
    generation.MinLengthLogitsProcessor: "min_length",
    generation.MinNewTokensLengthLogitsProcessor: "prompt_length_to_skip",
    generation.ExponentialDecayLengthPenalty: "regulation_start",
    generation.SuppressTokensAtBeginLogitsProcessor: "begin_index",
    generation.RepetitionPenaltyLogitsProcessor: "prompt_ignore_length",
}
# These keep state between calls, run the model themselves, or read all prompts of the batch.
_REFUSED = (
    generation.ClassifierFreeGuidanceLogitsProcessor,
    generation.UnbatchedClassifierFreeGuidanceLogitsProcessor,
    generation.SynthIDTextWatermarkLogitsProcessor,
    generation.EncoderRepetitionPenaltyLogitsProcessor,
    generation.EncoderNoRepeatNGramLogitsProcessor,
)


class RowProcessors:
    """Logits processors that are applied to each row's own tokens, without its padding.

    Args:
        processors (`LogitsProcessorList`): as `generate` prepares them for the padded batch.
        paddings (`Sequence[int]`): number of padding tokens of each row.
        limits (`Sequence[int]`): maximum length of each row.

    Raises:
        InputError: for a processor that cannot be called for one row at a time.
    """

    def __init__(self, processors: LogitsProcessorList, paddings: Sequence[int], limits: Sequence[int]):
        for processor in processors:
            if isinstance(processor, _REFUSED):
                raise InputError(
                    f"logits processor {type(processor).__name__}: cannot be applied to rows of different lengths. "
                    "Generate one prompt at a time without a draft"
                )
        # The kinds of processors that run in Python, after the target's pass.
        self.not_recordable = [type(each).__name__ for each in processors if type(each) not in _RECORDABLE]
        # Rows with equal settings share one call.
        settings: Hashable = None
        if not self.not_recordable:
            settings = tuple((type(each).__name__, *sorted(vars(each).items())) for each in processors)
        elif all(isinstance(processor, _WITHOUT_CONTEXT) for processor in processors):
            settings = object()  # not compared with those of other batches
        self._settings = [settings] * len(paddings)
        # `generate` derives a minimum length from `min_new_tokens` for the padded batch, which has to be shifted. A
        # `min_length` that the caller gave counts from the left edge of the padded batch, as in stock `generate`.
        counts_new = any(
            isinstance(processor, generation.MinNewTokensLengthLogitsProcessor) for processor in processors
        )
        self._rows: list[Callable[..., torch.Tensor]] = [
            LogitsProcessorList(
                processor
                if isinstance(processor, generation.MinLengthLogitsProcessor) and not counts_new
                else _for_row(processor, row, padding, limit)
                for processor in processors
            )
            for row, (padding, limit) in enumerate(zip(paddings, limits, strict=True))
        ]

    @property
    def recordable(self) -> tuple[Hashable, ...] | None:
        """What a recorded step depends on; `None` if the processors cannot be a part of one, or rows differ."""
        settings = self._settings[0] if self._are_shared else None
        return settings if isinstance(settings, tuple) else None

    @property
    def _are_shared(self) -> bool:
        return None not in self._settings and len(set(self._settings)) == 1

    def __call__(self, logits: torch.Tensor, rows: Rows, offset: int = 0) -> torch.Tensor:
        """Returns the scores of consecutive positions.

        Args:
            logits (`torch.Tensor`): `[rows, positions, vocab_size]` in fp32.
            rows (`Rows`): the rows, with the drafted tokens before each position.
            offset (`int`, *optional*, defaults to 0): number of drafted tokens before the first position.

        Returns:
            `[rows, positions, vocab_size]`.
        """
        if self._are_shared:
            return self._rows[0](None, logits.flatten(0, 1)).view_as(logits)
        scores = logits.clone()
        for row, (processors, length) in enumerate(zip(self._rows, rows.lengths, strict=True)):
            for position in range(logits.shape[1]):
                prefix = rows.state.tokens[row : row + 1, : length + offset + position]
                scores[row, position] = processors(prefix, logits[row : row + 1, position].clone())[0]
        return scores

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps the rows with these indices."""
        self._rows = [self._rows[row] for row in rows]
        self._settings = [self._settings[row] for row in rows]

    def join(self, other: "RowProcessors") -> None:
        """Adds the rows of another batch."""
        self._rows += other._rows
        self._settings += other._settings


def _for_row(processor: LogitsProcessor, row: int, padding: int, limit: int) -> LogitsProcessor:
    """Returns the processor that `generate` would create for this row alone."""
    attribute = _COUNTING.get(type(processor))
    if isinstance(processor, generation.PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        processor = copy.copy(processor)
        processor._prefix_allowed_tokens_fn = lambda _, tokens: allowed(row, tokens)
    elif isinstance(processor, generation.ForcedEOSTokenLogitsProcessor):
        processor = copy.copy(processor)
        processor.max_length = limit
    elif attribute and getattr(processor, attribute) is not None:
        counted = getattr(processor, attribute)
        if isinstance(counted, torch.Tensor) and counted.dim():  # one value per row of the batch
            counted = counted[row].item()
        processor = copy.copy(processor)
        setattr(processor, attribute, max(counted - padding, 0))
    return processor


def accept_greedy(scores: torch.Tensor, state: RowState) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Accepts the drafted tokens up to the first that differs from the target's own choice.

    Args:
        scores (`torch.Tensor`): the target's scores, `[rows, width + 1, vocab_size]`.
        state (`RowState`): the rows with `width` drafted tokens; supplies random numbers for sampling.

    Returns:
        The tokens `[rows, width + 1]`, of which the first `accepted + 1` are the output of the round; `accepted`
        `[rows]`; and whether the probabilities of each row are finite, `[rows]`.
    """
    chosen = scores.argmax(dim=-1)
    width = chosen.shape[1] - 1
    if not width:
        return chosen, torch.zeros_like(state.ends), torch.ones_like(state.active)
    accepted = _count_leading(chosen[:, :width] == state.drafted_tokens(width), state.drafted)
    return chosen, accepted, torch.ones_like(state.active)


def accept_sampled(scores: torch.Tensor, state: RowState) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Accepts drafted tokens by rejection sampling, so that the output follows the target's distribution.

    A token sampled from q is accepted with probability min(1, p / q). After a rejection the row's next token is
    sampled from the positive part of p - q; if all tokens are accepted, from p (Leviathan et al. 2023,
    arXiv:2211.17192, algorithm 1). A drafted token that was not sampled has q = 1. Arguments and results are those of
    [`accept_greedy`].
    """
    width = scores.shape[1] - 1
    p = scores.softmax(dim=-1)  # [rows, width + 1, vocab_size]
    tokens = state.drafted_tokens(width)
    drafted = tokens[..., None]
    q = state.probabilities
    p_drafted = p[:, :width].gather(-1, drafted)[..., 0]  # [rows, width]
    q_drafted = torch.ones_like(p_drafted) if q is None else q[:, :width].gather(-1, drafted)[..., 0]
    # u < p / q, written as a product, since q may be 0 after rounding.
    accepted = _count_leading(state.uniform(ACCEPTING, width) * q_drafted < p_drafted, state.drafted)
    each = torch.arange(len(scores), device=scores.device)
    last = p[each, accepted]  # [rows, vocab_size], the distribution of the token after the accepted ones
    if width:
        # In rows that accept all tokens nothing was rejected at this position; `rejected` leaves them out below.
        place = accepted.clamp(max=width - 1)
        if q is None:
            removed = torch.zeros_like(last).scatter_(-1, drafted[each, place], 1.0)
        else:
            removed = q[each, place]
        residual = (last - removed).clamp(min=0)
        # An empty residual means that p and q are equal up to rounding. A rejection then has probability zero.
        rejected = (accepted < state.drafted) & (residual.sum(-1) > 0)
        last = torch.where(rejected[:, None], residual, last)
    drawn = draw(last[:, None], state.uniform(CHOOSING, width + 1).gather(1, accepted[:, None]))
    chosen = torch.cat([tokens, drawn], dim=1).scatter(1, accepted[:, None], drawn)
    return chosen, accepted, last.isfinite().all(dim=-1)


def draw(weights: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Samples one token per number, by inverting the cumulative distribution.

    Args:
        weights (`torch.Tensor`): `[rows, tokens, vocab_size]`, not negative; they need not sum to one.
        numbers (`torch.Tensor`): `[rows, tokens]` in [0, 1).

    Returns:
        `[rows, tokens]`.
    """
    sums = weights.to(numbers.dtype).cumsum(dim=-1)
    # The product may round up to the last sum. No token lies above that, so it is capped just below.
    wanted = (numbers[..., None] * sums[..., -1:]).minimum(sums[..., -1:].nextafter(torch.zeros_like(sums[..., -1:])))
    # With nan weights the search returns vocab_size. Any valid token will do: the target then reports the nan.
    return torch.searchsorted(sums, wanted, right=True)[..., 0].clamp(max=weights.shape[-1] - 1)


def _count_leading(accepted: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Returns how many tokens of each row are accepted before the first rejected one, `[rows]`."""
    is_drafted = torch.arange(accepted.shape[1], device=accepted.device) < counts[:, None]
    return (accepted & is_drafted).long().cumprod(dim=1).sum(dim=1)
