"""The generation engine: rounds of drafting, one target pass and acceptance, over rows that may finish and join."""

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin

from ..errors import InputError
from . import fixed_memory, graphs
from .acceptance import RowProcessors, accept_greedy, accept_sampled
from .draft_length import DraftLength
from .fixed_memory import FixedMemory, Size
from .proposals import ModelProposer, Proposer, SpeculationStatistics
from .ragged_cache import RaggedModel
from .rows import RowPlan, Rows, slots_of
from .supported import check_supported
from .timing import Mark, mark, seconds_between, wait_for


logger = logging.getLogger(__name__)
LONGEST_DRAFT = 8
# With steps of fixed shape, a round drafts one of these numbers of tokens.
FIXED_DRAFTS = (1, 2, 3, 5, LONGEST_DRAFT)
# Columns of what a round returns from the device, before the tokens.
_TOKENS = 5
_Returned = TypeVar("_Returned")


def _without_gradients(function: Callable[..., _Returned]) -> Callable[..., _Returned]:
    """Runs a function without gradients, and outside of inference mode, so that kept tensors can be changed later."""
    # In this order: `inference_mode(False)` turns gradients on.
    return torch.inference_mode(False)(torch.no_grad()(function))


class _Round(NamedTuple):
    """A round that the device may not have finished."""

    values: torch.Tensor  # from `Decoding._choose`
    logits: torch.Tensor
    width: int  # drafted tokens
    limits: list[int]  # maximum number of drafted tokens per row
    marks: tuple[Mark, Mark, Mark, Mark]  # started, drafting began, drafting ended, finished
    is_plain: bool  # by choice
    was_recorded: bool  # a step was recorded in it


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
        token_scores (`dict`): what to collect, `"scores"` (after processing) or `"logits"` (before): a list for each
            row by its key, to which each round adds `[new tokens, vocab_size]`.
        draft_counts (`dict`): the number of drafted and of accepted tokens of each row so far, by its key.

    Raises:
        InputError: if an option is not supported, or a prompt fills the context.
    """

    @_without_gradients
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
        check_supported(self.config, prepared)
        self.input_ids = input_ids.to(target.device)
        self._target = RaggedModel(target)
        context = self._target.context
        do_sample = self.config.do_sample
        self.rows = Rows(self.input_ids, prepared.get("attention_mask"), criteria, context, plans, do_sample)
        longest, num_rows = max(self.rows.limits), len(self.rows)
        if self._target.has_position_table and longest > context:
            raise InputError(
                f"max_new_tokens: rows of {longest} tokens are longer than the context of {context}, and this "
                "model has no positions beyond it. Lower max_new_tokens"
            )
        self._processors = RowProcessors(processors, self.rows.paddings, self.rows.limits)
        self._accept = accept_sampled if do_sample else accept_greedy
        self._draft = draft.begin(num_rows)
        self._remark: str | None = None  # logged with the first round: rows that join another batch have none
        self._recorder = self._find_recorder()
        drafts = range(1, LONGEST_DRAFT + 1) if self._recorder is None else FIXED_DRAFTS
        self._longest = max(LONGEST_DRAFT, draft_length or 0)
        self._length = DraftLength(num_rows, drafts, draft_length)
        self._memory: FixedMemory | None = None
        self._next: _Round | None = None  # a round that was started ahead
        self._appended: dict[int, list[int]] = {}  # new tokens by key that were not returned yet
        self.statistics = SpeculationStatistics(num_rows)
        self.token_scores: dict[str, dict[int, list[torch.Tensor]]] = {}
        self.draft_counts: dict[int, tuple[int, int]] = dict.fromkeys(self.rows.keys, (0, 0))
        self._unread = self.input_ids.shape[1]  # tokens of the longest prompt

    def _find_recorder(self) -> graphs.Recorder | None:
        """Returns what records the steps of rounds as graphs, or `None` if they cannot be recorded here."""
        recorder = graphs.recorder_for(self._target.model.device)
        for reader in self._readers if recorder else ():
            if reason := graphs.reason_not_to_record(reader.model):
                self._remark = f"{type(reader.model).__name__}: steps run without graphs, since {reason}"
                return None
        if recorder and (in_python := [*self._processors.not_recordable, *self.rows.criteria_names]):
            self._remark = f"outside of graphs, in Python: {', '.join(in_python)}"
        return recorder

    @property
    def _readers(self) -> list[RaggedModel]:
        draft = self._draft
        return [self._target, draft.reader] if isinstance(draft, ModelProposer) else [self._target]

    @_without_gradients
    def read_piece(self, num_tokens: int, with_logits: bool = False) -> torch.Tensor | None:
        """Reads the next tokens of the prompts, so that a long prompt need not be read in one pass.

        Args:
            num_tokens (`int`): maximum number of tokens per row. At least one token is left for [`start`].
            with_logits (`bool`, *optional*, defaults to `False`): whether to compute the logits of each token.

        Returns:
            `[rows, tokens, vocab_size]`, of the last token only by default; `None` if no more than one token is left.
        """
        taken = min(num_tokens, self._unread - 1)
        if not taken:
            return None
        self._unread -= taken
        self._draft.read_piece(self.rows, taken, -self._unread)
        return self._target.read(self.rows, taken, -self._unread, taken if with_logits else 1)

    @_without_gradients
    def start(self) -> dict[int, list[int]]:
        """Reads the rest of the prompts and returns the first new token of each row, by its key."""
        began = mark(self.input_ids)
        logits = self._target.read(self.rows, self._unread)
        values = self._choose(0, logits)
        ended = mark(self.input_ids)
        self._record(_Round(values, logits, 0, [], (began, began, began, ended), False, True))
        self.statistics.prefill_seconds, self.statistics.target_seconds = self.statistics.target_seconds, 0.0
        self._remove_finished()
        return self._take_appended()

    @_without_gradients
    def join(self, other: "Decoding") -> None:
        """Adds the rows of a `Decoding` that has started.

        Both have the same models, end-of-sequence tokens and `do_sample`. Logits processors may differ, and are called
        for each row if they do.
        """
        self._settle()
        self._remove_finished()
        self.statistics.add(other.statistics)
        lengths = [*self.rows.lengths, *other.rows.lengths]
        batches = [self.rows, other.rows]
        if self._memory is not None and any(lengths) and not self._size(batches).fits(self._memory.size):
            self._move_to_fixed_memory(batches)
        began = mark(self.input_ids)
        self._draft.join(self.rows, other._draft, other.rows)
        ended = mark(self.input_ids)
        wait_for(ended)
        self.statistics.draft_seconds += seconds_between(began, ended)
        self._target.join(other._target, len(self.rows), max(lengths, default=0))
        self._processors.join(other._processors)
        self._length.join(len(other.rows))
        self.rows.join(other.rows)
        self.draft_counts |= other.draft_counts
        for name, collected in other.token_scores.items():
            self.token_scores.setdefault(name, {}).update(collected)
        self.statistics.target_passes, self.statistics.draft_passes = self._target.passes, self._draft.passes

    @_without_gradients
    def round(self) -> dict[int, list[int]]:
        """Drafts, verifies in one target pass and returns the new tokens by row key; removes finished rows.

        Where nothing waits for the tokens of a round on a GPU, the next one starts before they are read.
        """
        if not len(self.rows):
            return self._take_appended()
        if self._remark is not None:
            logger.info(self._remark)
            self._remark = None
        if self._recorder is not None and self._memory is None:
            self._move_to_fixed_memory([self.rows])
        current = self._next or self._launch()
        self._next = self._launch() if self._may_run_ahead() else None
        self._record(current)
        if self.rows.has_finished():
            self._settle()
        self._remove_finished()
        return self._take_appended()

    @_without_gradients
    def cancel(self, keys: Collection[int]) -> None:
        """Ends the rows with these keys; their tokens so far are those of finished rows."""
        self._settle()
        self.rows.cancel(keys)
        self._remove_finished()

    def _settle(self) -> None:
        """Waits for a round that was started ahead, and records it."""
        if self._next is not None:
            ahead, self._next = self._next, None
            self._record(ahead)

    def _take_appended(self) -> dict[int, list[int]]:
        appended, self._appended = self._appended, {}
        return appended

    def _may_run_ahead(self) -> bool:
        """Whether the next round depends on nothing that the host has to read from the current one."""
        return (
            self._memory is not None
            and type(self._draft) is Proposer
            and self._processors.recordable is not None
            and not any(self.token_scores.values())
            and not self.rows.criteria_names
            and max(self.rows.remaining) > 1
        )

    def _launch(self) -> _Round:
        """Starts a round."""
        rows, draft = self.rows, self._draft
        # At most as many tokens as the draft can read. Every round also adds a token of the target's own, so drafting
        # the last token of a row would be wasted.
        limits = [
            max(0, min(remaining - 1, draft.context - length)) if is_drafted else 0
            for remaining, length, is_drafted in zip(rows.remaining, rows.lengths, rows.are_drafted, strict=True)
        ]
        chosen = rows.draft_length or self._length.choose()
        # All rows draft the same number, and `drafted` of the state cuts it per row.
        wanted = min(chosen, max(limits)) if self._memory is None or not max(limits) else chosen
        rows.make_room(wanted + 2)  # a round may already be under way
        recorded, width = self._num_recorded, 0
        started = mark(self.input_ids)
        if wanted:
            draft.catch_up(rows)
        began = mark(self.input_ids)  # catching up is not part of the time per drafted token
        if wanted:
            width = draft.propose(rows, wanted, self._processors, self.config.do_sample)
            if self._memory is not None and width:
                width = wanted
            for row, is_drafted in enumerate(rows.are_drafted):
                if not is_drafted:
                    rows.state.drafted[row] = 0
        drafted = mark(self.input_ids)
        # The last accepted token was never read by the target, so a pass reads it and the drafted ones: the logits of
        # `width + 1` positions verify all drafted tokens and give one more.
        logits = self._target.read(rows, width + 1, width, width + 1)
        values = self._choose(width, logits)
        marks = (started, began, drafted, mark(self.input_ids))
        return _Round(values, logits, width, limits, marks, chosen == 0, self._num_recorded > recorded)

    @property
    def _num_recorded(self) -> int:
        return 0 if self._memory is None else self._memory.graphs.recorded

    def _choose(self, width: int, logits: torch.Tensor) -> torch.Tensor:
        """Chooses and appends tokens on the device.

        Returns:
            `[rows, 5 + width + 1]` on the host, when the device has finished: number of appended, accepted and drafted
            tokens, whether the row is active and its probabilities are finite; then the tokens.
        """
        rows = self.rows

        def step() -> torch.Tensor:
            scores = self._processors(logits, rows)
            if self.token_scores.get("scores"):
                self._scores = scores
            tokens, accepted, is_finite = self._accept(scores, rows.state)
            drafted = rows.state.drafted if width else accepted  # zeros
            counts = rows.state.advance(tokens, accepted)
            columns = torch.stack([counts, accepted, drafted, rows.state.active, is_finite], dim=1)
            return torch.cat([columns, tokens], dim=1)

        settings = self._processors.recordable
        if self._memory is None or settings is None or any(self.token_scores.values()):
            chosen = step()
        else:
            # The logits of each bucket have their own address.
            key = ("choose", rows.bucket, width, self.config.do_sample, settings)
            chosen = self._memory.graphs.run(key, step)
        chosen = chosen[: len(rows)]
        if not chosen.is_cuda:
            return chosen.clone()  # the next round may overwrite it
        return torch.empty(chosen.shape, dtype=chosen.dtype, pin_memory=True).copy_(chosen, non_blocking=True)

    def _record(self, found: _Round) -> None:
        """Waits for a round and records its tokens."""
        rows, statistics = self.rows, self.statistics
        wait_for(found.marks[-1])
        values = found.values.tolist()
        counts, accepted, drafted, active, is_finite = ([row[column] for row in values] for column in range(_TOKENS))
        if not all(is_finite):
            raise RuntimeError("the model's probabilities hold nan or inf, so no token can be sampled")
        # Rejected tokens are not erased from the caches: the next round overwrites their slots.
        appended = rows.record([row[_TOKENS:] for row in values], counts, active)
        started, began, ended, finished = found.marks
        draft_seconds, target_seconds = seconds_between(began, ended), seconds_between(ended, finished)
        if not found.was_recorded:  # otherwise the time of recording is in it
            self._length.observe(found.width, found.limits, accepted, draft_seconds, target_seconds)
        statistics.draft_seconds += seconds_between(started, ended)
        statistics.target_seconds += target_seconds
        statistics.plain_rounds += found.is_plain
        statistics.target_passes, statistics.draft_passes = self._target.passes, self._draft.passes
        statistics.row_passes += sum(count > 0 for count in counts)
        statistics.drafted += sum(drafted)
        statistics.accepted += sum(min(count, len(new)) for count, new in zip(accepted, appended, strict=True))
        statistics.verified += sum(min(taken + 1, count) for taken, count in zip(accepted, drafted, strict=True))
        statistics.new_tokens += sum(map(len, appended))
        for name, collected in self.token_scores.items():
            of_rows = (self._scores if name == "scores" else found.logits)[: len(values)]
            for key, new, tensors in zip(rows.keys, appended, of_rows, strict=True):
                if key in collected:
                    collected[key].append(tensors[: len(new)].clone())
        for key, new, proposed, taken in zip(rows.keys, appended, drafted, accepted, strict=True):
            self._appended.setdefault(key, []).extend(new)
            all_drafted, all_accepted = self.draft_counts[key]
            self.draft_counts[key] = all_drafted + proposed, all_accepted + min(taken, len(new))

    def _remove_finished(self) -> None:
        if self.rows.has_finished():
            unfinished = self.rows.unfinished()
            for part in (self.rows, self._target, self._draft, self._processors, self._length):
                part.keep(unfinished)

    def _move_to_fixed_memory(self, rows: list[Rows]) -> None:
        """Moves rows and caches to fixed addresses, with room for other rows that are about to join."""
        assert self._recorder is not None
        if isinstance(self._draft, ModelProposer) and len(self.rows):
            self._draft.catch_up(self.rows)  # prompts, whose lengths are no fixed shapes
        memory = fixed_memory.borrow(self, self._readers, self._size(rows), self._recorder)
        self.rows.move_to(memory.state)
        self._target.move_to(memory.caches[0], memory.graphs, len(self.rows))
        if isinstance(self._draft, ModelProposer):
            self._draft.move_to(memory.caches[1], memory.graphs, len(self.rows))
        self._memory = memory

    def _size(self, batches: list[Rows]) -> Size:
        limits = [limit for rows in batches for limit in rows.limits]
        draws = [rows.state.draws.shape[2] for rows in batches if rows.state.draws is not None]
        has_model = isinstance(self._draft, ModelProposer)
        sampled = (self._longest, self._target.vocab_size) if draws and has_model else (0, 0)
        slots, eos = slots_of(max(limits), self._target.context, self._longest), len(self.rows.state.eos)
        return Size(sum(map(len, batches)), slots, max(draws, default=0), sampled, eos)

    def close(self) -> None:
        """Makes the fixed memory available to the next call; to be called when all rows have finished."""
        if self._memory is not None:
            logger.info("%s", self._memory.graphs)
            self._memory.give_back()
