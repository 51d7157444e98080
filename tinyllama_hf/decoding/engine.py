"""The rounds of generation for rows of different lengths: draft, one pass of the target, accept; rows leave and join."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.generation import GenerationConfig, GenerationMode, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList

from ..errors import InputError
from .acceptance import Proposal, RowProcessors, accept_greedy, accept_sampled
from .draft_length import AdaptiveDraftLength, DraftLength, FixedDraftLength
from .grouped_attention import packed_attention
from .proposals import ModelProposer, NoDraft, Proposer
from .ragged_cache import RaggedModel
from .rows import RowPlan, Rows
from .token_scores import TokenScores


LONGEST_DRAFT = 8
_PREPARED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
_OUTPUTS = ("output_attentions", "output_hidden_states")


@dataclasses.dataclass
class SpeculationStatistics:
    """What was counted and timed in one generation.

    Attributes:
        rows (`int`): sequences that were generated.
        new_tokens (`int`): in all of them.
        drafted (`int`): tokens that were proposed.
        accepted (`int`): proposed tokens that stand in the output.
        judged (`int`): proposed tokens up to the first rejected one of each round and row; `accepted / judged` estimates the
            probability that a token is accepted where all before it are.
        target_passes (`int`): forward passes of the target, those over the prompts included.
        row_passes (`int`): the same summed over the rows that were in each pass; every one adds a token of the
            target's own, unless an accepted one ends the row.
        draft_passes (`int`): forward passes of the draft model.
        plain_rounds (`int`): rounds in which nothing was to be drafted, since it did not pay or a plain pass was to be timed.
        prefill_seconds (`float`): of the passes over the prompts.
        target_seconds (`float`): of the other ones, with choosing what is accepted.
        draft_seconds (`float`): of drafting, the draft's own reading of the prompts included.
    """

    rows: int
    new_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    judged: int = 0
    target_passes: int = 0
    row_passes: int = 0
    draft_passes: int = 0
    plain_rounds: int = 0
    prefill_seconds: float = 0.0
    target_seconds: float = 0.0
    draft_seconds: float = 0.0

    @property
    def acceptance(self) -> float:
        """Share of the drafted tokens that stand in the output."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a row gains in a pass of the target, 1 in plain decoding."""
        return self.new_tokens / self.row_passes if self.row_passes else 0.0

    @property
    def seconds(self) -> float:
        """Of the passes together."""
        return self.prefill_seconds + self.target_seconds + self.draft_seconds

    def add(self, other: "SpeculationStatistics") -> None:
        """Adds what was counted of rows that join; passes are counted by those who make them."""
        for name in ("rows", "new_tokens", "row_passes", "prefill_seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def __str__(self) -> str:
        line = (
            f"draft: {self.acceptance * 100:.0f} % of {self.drafted} drafted tokens accepted, {self.target_passes} target "
            f"passes for {self.new_tokens} tokens, {self.seconds:.1f} s"
        )
        gave_up = self.plain_rounds > 1 + self.target_passes // 10  # one is plain in any case, and timed
        return line + (f"; {self.plain_rounds} passes without drafting, which did not pay" if gave_up else "")


class Decoding:
    """Rows under way, from [`prepare`].

    Attributes:
        input_ids (`torch.Tensor`): `[rows, prompt]`, padded on the left, on the target's device.
        config (`GenerationConfig`): as `generate` resolved it.
        rows (`Rows`): that are not done.
        statistics (`SpeculationStatistics`): up to the last round.
        token_scores (`TokenScores`): is told what every new token was chosen by.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        draft: PreTrainedModel | Proposer | None,
        draft_length: int | None,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        plans: Sequence[RowPlan] | None = None,
    ):
        num_rows = input_ids.shape[0]
        self.input_ids, self.config = input_ids.to(target.device), config
        self._models = [target, *([draft] if isinstance(draft, nn.Module) else [])]
        self._target = RaggedModel(target, drafts=draft is not None)
        self.rows = Rows(self.input_ids, attention_mask, criteria, self._target.context, plans)
        self._target.check_length(max(map(sum, zip(self.rows.lengths, self.rows.remaining, strict=True))))
        self._processors = RowProcessors(processors, self.rows.paddings, self.rows.limits)
        self._accept: Callable = accept_sampled if config.do_sample else accept_greedy
        self._draft: Proposer = NoDraft() if draft is None else draft
        if isinstance(draft, nn.Module):
            self._draft = ModelProposer(draft, num_rows)
        if draft is None:
            draft_length = 0
        self._length: DraftLength = (
            AdaptiveDraftLength(num_rows, LONGEST_DRAFT) if draft_length is None else FixedDraftLength(draft_length)
        )
        self.statistics = SpeculationStatistics(num_rows)
        self.token_scores = TokenScores()

    @torch.no_grad()
    def start(self) -> list[list[int]]:
        """Reads the prompts; returns the first token of each row."""
        began = time.perf_counter()
        with packed_attention(*self._models):
            logits = self._target.read(self.input_ids, self.rows.lengths)
        nothing = NoDraft().propose(self.rows, 0, self._processors, self.config.do_sample)
        _, going_on, appended = self._finish_round(nothing, logits)
        self._length.keep(going_on)
        self.statistics.prefill_seconds = time.perf_counter() - began
        return appended

    @torch.no_grad()
    def round(self) -> list[list[int]]:
        """Drafts, and lets the target choose; returns what was appended to each row. Rows that end leave."""
        with packed_attention(*self._models):
            return self._round()

    @torch.no_grad()
    def join(self, other: "Decoding") -> None:
        """Takes in the rows of another one that was prepared with the same arguments and has started."""
        self.statistics.add(other.statistics)
        end = max([*self.rows.lengths, *other.rows.lengths], default=0)
        self._target.join(other._target, end)
        began = time.perf_counter()
        with packed_attention(*self._models):
            self._draft.join(self.rows, other._draft, other.rows)
        _wait_for(self.rows.tokens)
        self.statistics.draft_seconds += time.perf_counter() - began
        self._processors.join(other._processors)
        self._length.join(len(other.rows))
        self.rows.join(other.rows)
        self._count_passes()

    def _round(self) -> list[list[int]]:
        rows, draft = self.rows, self._draft
        # Beyond its context a draft is of no use, and beyond a row's end no token is.
        limits = [
            max(0, min(remaining - 1, draft.context - length))
            for remaining, length in zip(rows.remaining, rows.lengths, strict=True)
        ]
        chosen = self._length.choose()
        wanted = min(chosen, max(limits))
        started = time.perf_counter()
        if wanted:
            draft.catch_up(rows)
            _wait_for(rows.tokens)
        began = time.perf_counter()
        proposal = (draft if wanted else NoDraft()).propose(rows, wanted, self._processors, self.config.do_sample)
        proposal = proposal._replace(counts=proposal.counts.minimum(torch.tensor(limits, device=rows.tokens.device)))
        _wait_for(proposal.tokens)
        drafted = time.perf_counter()
        width = proposal.tokens.shape[1]
        ends = [length + width for length in rows.lengths]
        logits = self._target.read(rows.last_tokens(1, proposal.tokens), ends, width + 1)
        accepted, going_on, appended = self._finish_round(proposal, logits)
        finished = time.perf_counter()
        self.statistics.plain_rounds += not chosen
        self.statistics.draft_seconds += drafted - started
        self.statistics.target_seconds += finished - drafted
        self._length.observe(width, limits, accepted, drafted - began, finished - drafted)
        self._length.keep(going_on)
        return appended

    def _finish_round(self, proposal: Proposal, logits: torch.Tensor) -> tuple[list[int], list[int], list[list[int]]]:
        """Appends what is accepted, lets finished rows go: (accepted by row, rows that go on, appended to each)."""
        rows, statistics = self.rows, self.statistics
        scores = self._processors(logits, rows.tokens, rows.lengths)
        tokens, accepted = self._accept(scores, proposal, rows)
        counts, accepted = torch.stack([proposal.counts, accepted]).tolist()
        appended, going_on = rows.append(tokens, [count + 1 for count in accepted])
        statistics.row_passes += len(accepted)
        statistics.drafted += sum(counts)
        statistics.accepted += sum(min(count, len(new)) for count, new in zip(accepted, appended, strict=True))
        statistics.judged += sum(min(taken + 1, count) for taken, count in zip(accepted, counts, strict=True))
        statistics.new_tokens += sum(map(len, appended))
        self.token_scores.add(rows.keys, [len(new) for new in appended], scores=scores, logits=logits)
        if len(going_on) < len(accepted):
            for part in (rows, self._target, self._draft, self._processors):
                part.keep(going_on)
        self._count_passes()
        return accepted, going_on, appended

    def _count_passes(self) -> None:
        self.statistics.target_passes, self.statistics.draft_passes = self._target.passes, self._draft.passes


def prepare(
    target: PreTrainedModel,
    draft: PreTrainedModel | Proposer | None,
    draft_length: int | None,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    then: Callable[[Decoding], Any],
    plans: Sequence[RowPlan] | None = None,
    **arguments: Any,
) -> Any:
    """Lets `generate` prepare processors, criteria and settings, and calls `then` in the place of its decoding method.

    Args:
        target (`PreTrainedModel`): decides.
        draft (`PreTrainedModel` or `Proposer`, *optional*): proposes; `None` is plain decoding.
        draft_length (`int`, *optional*): see [`~decoding.speculative.speculative_generate`].
        input_ids (`torch.Tensor`): `[rows, prompt]`, padded on the left.
        attention_mask (`torch.Tensor`, *optional*): `[rows, prompt]`.
        then (`Callable`): is given the rows before their first pass; what it returns is returned.
        plans (`Sequence[RowPlan]`, *optional*): see [`Rows`].
        **arguments: of `generate`.

    Raises:
        InputError: if the models or options are not supported, or a prompt fills the context.
    """

    def begin(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        _check_options(generation_config, model_kwargs)
        return then(Decoding(model, draft, draft_length, input_ids, model_kwargs.get("attention_mask"), logits_processor,
                             stopping_criteria, generation_config, plans))  # fmt: skip

    return target.generate(input_ids, attention_mask=attention_mask, custom_generate=begin, **arguments)


def _wait_for(tokens: torch.Tensor) -> None:
    if tokens.is_cuda:  # so that the draft's time is not counted as the target's
        torch.cuda.synchronize(tokens.device)


def _check_options(config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """Refuses what other decoding methods have and this one would ignore."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise InputError(f"{mode.value}: a draft helps greedy decoding and sampling only; generate without it")
    if not config.use_cache:
        raise InputError("use_cache=False: rows of different lengths are generated over a cache; leave it on")
    for name in _OUTPUTS:
        if getattr(config, name):
            raise InputError(f"{name}: is not collected for rows of different lengths; leave it out")
    if config.prefill_chunk_size is not None:
        raise InputError(
            f"prefill_chunk_size={config.prefill_chunk_size}: prompts are read at once here; leave it out"
        )
    cache = model_kwargs.get("past_key_values")
    if cache is not None and getattr(cache, "_is_user_defined", False):
        raise InputError("past_key_values: rows of different lengths need a cache of their own; leave it out")
    if config.cache_implementation not in (None, "dynamic"):
        raise InputError(
            f"cache_implementation {config.cache_implementation!r}: rows of different lengths need a cache of their own kind; "
            "leave it out"
        )
    if unknown := sorted(set(model_kwargs) - _PREPARED):
        raise InputError(f"{unknown[0]}: is not supported while a draft helps; generate without it")
