"""The generation engine: rounds of drafting, one target pass and acceptance, over rows that may finish and join."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation import GenerationConfig, GenerationMixin, GenerationMode

from ..errors import InputError
from .acceptance import Proposal, RowProcessors, accept_greedy, accept_sampled
from .draft_length import DraftLength
from .proposals import Proposer, SpeculationStatistics, empty_proposal
from .ragged_cache import RaggedModel
from .rows import RowPlan, Rows


LONGEST_DRAFT = 8
_PREPARED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
SUPPORTED_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


class Decoding:
    """A batch of prompts that is being continued, with the processors, criteria and settings that `generate` prepares.

    Rows have their own lengths and limits. A round adds one or more tokens to each row; finished rows are removed at
    its end, and the rows of another `Decoding` can be added between rounds.

    Args:
        target (`PreTrainedModel`): the model to generate with.
        draft (`Proposer`, *optional*): proposes tokens; must match the target, see
            [`~decoding.speculative.check_pair`]. `None` is plain decoding.
        draft_length (`int`, *optional*): see [`~decoding.speculative.speculative_generate`].
        input_ids (`torch.Tensor`): `[rows, prompt]`, padded on the left.
        attention_mask (`torch.Tensor`, *optional*): `[rows, prompt]`.
        plans (`Sequence[RowPlan]`, *optional*): see [`Rows`].
        **arguments: arguments of `generate`.

    Attributes:
        input_ids (`torch.Tensor`): `[rows, prompt]`, on the target's device.
        config (`GenerationConfig`): as `generate` resolved it.
        rows (`Rows`): the unfinished rows.
        statistics (`SpeculationStatistics`): counts and times up to the last round.
        token_scores (`dict`): what to collect, `"scores"` (after processing) or `"logits"` (before): a list per row,
            to which each round adds `[new tokens, vocab_size]`.

    Raises:
        InputError: if an option is not supported, or a prompt fills the context.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        draft: Proposer | None,
        draft_length: int | None,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        plans: Sequence[RowPlan] | None = None,
        **arguments: Any,
    ):
        if draft is None:
            draft, draft_length = Proposer(), 0
        # `custom_generate` is called with everything prepared, in place of a decoding method; its result is returned.
        # The method of the mixin, since `TinyLlamaForCausalLM.generate` would look for a draft again.
        arguments["custom_generate"] = lambda model, input_ids, **prepared: (input_ids, prepared)
        generate: Callable[..., Any] = GenerationMixin.generate
        input_ids, prepared = generate(target, input_ids, attention_mask=attention_mask, **arguments)
        names = ("logits_processor", "stopping_criteria", "generation_config")
        processors, criteria, self.config = (prepared.pop(name) for name in names)
        _check_options(self.config, prepared)
        self.input_ids = input_ids.to(target.device)
        self._target = RaggedModel(target)
        context = self._target.context
        self.rows = Rows(self.input_ids, prepared.get("attention_mask"), criteria, context, plans)
        longest, num_rows = max(self.rows.limits), len(self.rows)
        if self._target.has_position_table and longest > context:
            raise InputError(
                f"max_new_tokens: rows of {longest} tokens are longer than the context of {context}, and this "
                "model has no positions beyond it. Lower max_new_tokens"
            )
        self._processors = RowProcessors(processors, self.rows.paddings, self.rows.limits)
        self._accept = accept_sampled if self.config.do_sample else accept_greedy
        self._draft = draft.begin(num_rows)
        self._length = DraftLength(num_rows, LONGEST_DRAFT, draft_length)
        self.statistics = SpeculationStatistics(num_rows)
        self.token_scores: dict[str, list[list[torch.Tensor]]] = {}

    @torch.no_grad()
    def start(self) -> list[list[int]]:
        """Reads the prompts and returns the first new token of each row."""
        began = time.perf_counter()
        logits = self._target.read(self.input_ids, self.rows.lengths)
        _, unfinished, appended = self._finish_round(empty_proposal(self.rows), logits)
        self._length.keep(unfinished)
        self.statistics.prefill_seconds = time.perf_counter() - began
        return appended

    @torch.no_grad()
    def join(self, other: "Decoding") -> None:
        """Adds the rows of a `Decoding` that was prepared with the same arguments and has started."""
        self.statistics.add(other.statistics)
        end = max([*self.rows.lengths, *other.rows.lengths], default=0)
        self._target.join(other._target, end)
        began = time.perf_counter()
        self._draft.join(self.rows, other._draft, other.rows)
        _wait_for(self.rows.tokens)
        self.statistics.draft_seconds += time.perf_counter() - began
        self._processors.join(other._processors)
        self._length.join(len(other.rows))
        self.rows.join(other.rows)
        self.statistics.target_passes, self.statistics.draft_passes = self._target.passes, self._draft.passes

    @torch.no_grad()
    def round(self) -> list[list[int]]:
        """Drafts, verifies in one target pass and returns the new tokens of each row; removes finished rows."""
        rows, draft = self.rows, self._draft
        # At most as many tokens as the draft can read. Every round also adds a token of the target's own, so drafting
        # the last token of a row would be wasted.
        limits = [
            max(0, min(remaining - 1, draft.context - length))
            for remaining, length in zip(rows.remaining, rows.lengths, strict=True)
        ]
        chosen = self._length.choose()
        wanted = min(chosen, max(limits))  # all rows draft the same number; `counts` below cuts it per row
        started = time.perf_counter()
        proposal = empty_proposal(rows)
        if wanted:
            draft.catch_up(rows)
            _wait_for(rows.tokens)
        began = time.perf_counter()  # catching up is not part of the time per drafted token
        if wanted:
            proposal = draft.propose(rows, wanted, self._processors, self.config.do_sample)
            counts = proposal.counts.minimum(torch.tensor(limits, device=rows.tokens.device))
            proposal = proposal._replace(counts=counts)
        _wait_for(proposal.tokens)
        drafted = time.perf_counter()
        width = proposal.tokens.shape[1]
        # The last accepted token was never read by the target, so a pass reads it and the drafted ones: the logits of
        # `width + 1` positions verify all drafted tokens and give one more.
        ends = [length + width for length in rows.lengths]
        logits = self._target.read(rows.last_tokens(1, proposal.tokens), ends, width + 1)
        accepted, unfinished, appended = self._finish_round(proposal, logits)
        finished = time.perf_counter()
        self.statistics.plain_rounds += not chosen
        self.statistics.draft_seconds += drafted - started
        self.statistics.target_seconds += finished - drafted
        self._length.observe(width, limits, accepted, drafted - began, finished - drafted)
        self._length.keep(unfinished)
        return appended

    def _finish_round(self, proposal: Proposal, logits: torch.Tensor) -> tuple[list[int], list[int], list[list[int]]]:
        """Appends the accepted tokens and removes finished rows.

        Returns:
            The number of accepted tokens per row, the indices of the unfinished rows, and the new tokens per row.
        """
        rows, statistics = self.rows, self.statistics
        scores = self._processors(logits, rows.tokens, rows.lengths)
        tokens, accepted = self._accept(scores, proposal, rows)
        counts, accepted = torch.stack([proposal.counts, accepted]).tolist()  # one wait for the device
        # Rejected tokens are not erased from the caches: the next round overwrites their slots.
        appended, unfinished = rows.append(tokens, [count + 1 for count in accepted])
        statistics.target_passes, statistics.draft_passes = self._target.passes, self._draft.passes
        statistics.row_passes += len(accepted)
        statistics.drafted += sum(counts)
        statistics.accepted += sum(min(count, len(new)) for count, new in zip(accepted, appended, strict=True))
        statistics.verified += sum(min(taken + 1, count) for taken, count in zip(accepted, counts, strict=True))
        statistics.new_tokens += sum(map(len, appended))
        for name, collected in self.token_scores.items():
            for key, new, values in zip(rows.keys, appended, scores if name == "scores" else logits, strict=True):
                collected[key].append(values[: len(new)].clone())
        if len(unfinished) < len(accepted):
            for part in (rows, self._target, self._draft, self._processors):
                part.keep(unfinished)
        return accepted, unfinished, appended


def _wait_for(tokens: torch.Tensor) -> None:
    if tokens.is_cuda:  # or time of the draft would be counted as time of the target
        torch.cuda.synchronize(tokens.device)


def _check_options(config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """Refuses options of other decoding methods, which this one would ignore."""
    mode, chunk, kind = config.get_generation_mode(), config.prefill_chunk_size, config.cache_implementation
    if mode not in SUPPORTED_MODES:
        raise InputError(f"{mode.value}: a draft supports greedy decoding and sampling only. Generate without a draft")
    own_cache = "rows of different lengths need their own kind of cache. Leave it out"
    outputs = "is not supported for rows of different lengths. Leave it out"
    refused = {
        "use_cache=False: rows of different lengths need a cache. Leave it on": not config.use_cache,
        f"output_attentions=True: {outputs}": config.output_attentions,
        f"output_hidden_states=True: {outputs}": config.output_hidden_states,
        f"prefill_chunk_size={chunk}: prompts are read in one pass here. Leave it out": chunk is not None,
        f"past_key_values: {own_cache}": getattr(model_kwargs.get("past_key_values"), "_is_user_defined", False),
        f"cache_implementation={kind!r}: {own_cache}": kind not in (None, "dynamic"),
    }
    for name in sorted(set(model_kwargs) - _PREPARED):
        refused[f"{name}: is not supported with a draft. Generate without a draft"] = True
    for message, applies in refused.items():
        if applies:
            raise InputError(message)
