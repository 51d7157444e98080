"""Speculative decoding for batches: a draft proposes tokens, the target checks several of every row in one pass.

Greedy output is the target's own; sampled output follows the target's distribution. Each row accepts what it accepts: rows
are neither realigned nor made to wait, see `ragged_cache.py`.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import GenerateDecoderOnlyOutput, GenerationConfig, GenerationMode, LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from ..errors import InputError
from ..grouped_attention import packed_attention
from .acceptance import Proposal, RowProcessors, accept_greedy, accept_sampled
from .draft_length import AdaptiveDraftLength, DraftLength, FixedDraftLength
from .proposals import ModelProposer, PromptLookup, Proposer, first_layers
from .ragged_cache import RaggedModel, check_full_attention
from .rows import Rows


LONGEST_DRAFT = 8
_PREPARED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
_DRAFTS = ("prompt_lookup_num_tokens", "assistant_early_exit")
_UNUSED = ("assistant_confidence_threshold", "num_assistant_tokens_schedule", "custom_generate")
_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


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
        target_passes (`int`): forward passes of the target, the one over the prompts included.
        row_passes (`int`): the same summed over the rows that were in each pass; every one adds a token of the target's own.
        draft_passes (`int`): forward passes of the draft model.
        plain_rounds (`int`): rounds without drafted tokens, the first included.
        prefill_seconds (`float`): of the pass over the prompts.
        target_seconds (`float`): of the passes after it, with choosing what is accepted.
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

    def __str__(self) -> str:
        line = (
            f"draft: {self.acceptance * 100:.0f} % of {self.drafted} drafted tokens accepted, {self.target_passes} target "
            f"passes for {self.new_tokens} tokens, {self.seconds:.1f} s"
        )
        # The first rounds are plain in any case: the prompt's, and one that is timed.
        gave_up = self.plain_rounds > 2 + self.target_passes // 10
        return line + (f"; {self.plain_rounds} passes without drafting, which did not pay" if gave_up else "")


@dataclasses.dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """The output of `generate`, with statistics; there is no cache in it."""

    statistics: SpeculationStatistics | None = None


@torch.no_grad()
def speculative_generate(
    target: PreTrainedModel,
    draft: PreTrainedModel | Proposer,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    draft_length: int | None = None,
    generation_config: GenerationConfig | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    streamer: BaseStreamer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **kwargs: Any,
) -> torch.Tensor | SpeculativeOutput:
    """Generates with the help of a draft, for any number of prompts of any length.

    In fp32, greedy output equals what `target.generate` gives for each prompt by itself, unless two logits lie closer than
    rounding; in 16 bit, rounding depends on the shape of a batch, with and without a draft. Sampled output has the target's
    distribution. Logits processors and stopping criteria are applied to each row's own tokens, criteria after every token.

    Args:
        target (`PreTrainedModel`): any causal language model with full attention, stock or ours.
        draft (`PreTrainedModel` or `Proposer`): a smaller model with the same vocabulary, `first_layers(target, n)`, or a
            `PromptLookup`.
        input_ids (`torch.Tensor`): `[rows, prompt]`, padded on the left.
        attention_mask (`torch.Tensor`, *optional*): `[rows, prompt]`.
        draft_length (`int`, *optional*): tokens to draft in each round. By default as many as pay, by measured times and
            acceptance, and none where none do; the draws of a seed then depend on these times.
        generation_config (`GenerationConfig`, *optional*): as in `generate`; so are `stopping_criteria`, the `streamer` (for
            one row), the `tokenizer` (for `stop_strings`), and everything else: `max_new_tokens`, `do_sample`,
            `temperature`, `repetition_penalty`, `num_return_sequences`, `return_dict_in_generate` ...

    Returns:
        `[rows, prompt + new]`, padded on the right, or a [`SpeculativeOutput`] with `return_dict_in_generate=True`.

    Raises:
        InputError: if the vocabularies differ, the models or options are not supported, or a prompt fills the context.
    """
    _check_pair(target, draft, draft_length)
    for name in _UNUSED:
        if (value := kwargs.pop(name, None)) is not None:
            raise InputError(f"{name}={value!r}: has no meaning for drafts here; leave it out")
    # `generate` (5.23) would need the tokenizer for them, which it hands on to no decoding method of ours.
    stop_strings = _take("stop_strings", target, generation_config, kwargs)
    criteria = StoppingCriteriaList(stopping_criteria or [])
    if stop_strings:
        criteria.append(_stop_string_criterion(stop_strings, tokenizer))

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        _check_options(generation_config, model_kwargs)
        loop = _Loop(model, draft, draft_length, input_ids, model_kwargs.get("attention_mask"), logits_processor,
                     stopping_criteria, generation_config, streamer)  # fmt: skip
        with packed_attention(model, *([draft] if isinstance(draft, nn.Module) else [])):
            return loop.run()

    return target.generate(
        input_ids,
        attention_mask=attention_mask,
        generation_config=generation_config,
        stopping_criteria=criteria,
        custom_generate=decode,
        **kwargs,
    )


def draft_of_generate(
    target: PreTrainedModel, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
) -> PreTrainedModel | Proposer | None:
    """The draft that the arguments of `generate` name, or `None`; they are replaced by those of [`speculative_generate`].

    Raises:
        InputError: if more than one is named, or the draft has a tokenizer of its own.
    """

    def take(name: str) -> Any:
        return _take(name, target, generation_config, kwargs)

    assistant = kwargs.pop("assistant_model", None)
    lookup, early_exit = map(take, _DRAFTS)
    if sum(draft is not None for draft in (assistant, lookup, early_exit)) > 1:
        raise InputError("assistant_model, prompt_lookup_num_tokens, assistant_early_exit: only one of them can draft")
    if kwargs.pop("assistant_tokenizer", None) is not None:
        raise InputError("assistant_tokenizer: a draft must have the target's own vocabulary; leave it out")
    if assistant is None and lookup is None and early_exit is None:
        return None
    num_tokens = take("num_assistant_tokens") if lookup is None else lookup
    if num_tokens is not None:
        kwargs["draft_length"] = num_tokens
    if lookup is not None:
        return PromptLookup(take("max_matching_ngram_size") or 3)
    return first_layers(target, early_exit) if early_exit is not None else assistant


class _Loop:
    """The state of one generation; [`run`] is the algorithm."""

    def __init__(
        self,
        target: PreTrainedModel,
        draft: PreTrainedModel | Proposer,
        draft_length: int | None,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: BaseStreamer | None,
    ):
        num_rows = input_ids.shape[0]
        self.input_ids, self.streamer, self.config = input_ids.to(target.device), streamer, config
        self.target = RaggedModel(target)
        self.draft = ModelProposer(draft, num_rows) if isinstance(draft, nn.Module) else draft
        self.rows = Rows(self.input_ids, attention_mask, criteria, self.target.context)
        self.target.check_length(max(self.rows.lengths) + max(self.rows.remaining))
        self.processors = RowProcessors(processors, self.rows.paddings)
        self.length: DraftLength = (
            AdaptiveDraftLength(num_rows, LONGEST_DRAFT) if draft_length is None else FixedDraftLength(draft_length)
        )
        self.accept: Callable = accept_sampled if config.do_sample else accept_greedy
        self.statistics = SpeculationStatistics(num_rows)
        if streamer is not None and num_rows > 1:
            raise InputError(f"streamer: shows one row, and there are {num_rows}; generate without it")
        if num_rows > 1 and self.rows.may_end_early and config._pad_token_tensor is None:
            raise InputError("pad_token_id: rows may end at different lengths, and there is none to fill up; give it")

    def run(self) -> torch.Tensor | SpeculativeOutput:
        """Rounds of drafting, one target pass, and accepting, until every row has ended."""
        if self.streamer is not None:
            self.streamer.put(self.input_ids.cpu())
        began = time.perf_counter()
        logits = self.target.read(self.input_ids, self.rows.lengths)
        nothing = Proposal(self.input_ids[:, :0], torch.zeros_like(self.input_ids[:, 0]))
        *_, going_on = self._finish_round(nothing, logits)
        self.length.keep(going_on)
        self.statistics.prefill_seconds = time.perf_counter() - began
        while self.rows.numbers:
            self._round()
        if self.streamer is not None:
            self.streamer.end()
        self.statistics.target_passes = self.target.passes
        self.statistics.draft_passes = self.draft.passes
        pad = self.config._pad_token_tensor
        sequences = self.rows.sequences(self.input_ids, 0 if pad is None else int(pad))
        if not self.config.return_dict_in_generate:
            return sequences
        return SpeculativeOutput(sequences=sequences, statistics=self.statistics)

    def _round(self) -> None:
        rows = self.rows
        # Beyond its context a draft is of no use.
        wanted = min(self.length.choose(), max(rows.remaining) - 1, self.draft.context - max(rows.lengths))
        wanted = max(wanted, 0)
        started = time.perf_counter()
        proposal = Proposal(rows.tokens[:, :0], torch.zeros_like(rows.tokens[:, 0]))
        if wanted:
            self.draft.catch_up(rows)
            _wait_for(rows.tokens)
        began = time.perf_counter()
        if wanted:
            proposal = self.draft.propose(rows, wanted, self.processors, self.config.do_sample)
            _wait_for(proposal.tokens)
        drafted = time.perf_counter()
        width = proposal.tokens.shape[1]
        ends = [length + width for length in rows.lengths]
        logits = self.target.read(rows.last_tokens(1, proposal.tokens), ends, width + 1)
        accepted, going_on = self._finish_round(proposal, logits)
        finished = time.perf_counter()
        self.statistics.draft_seconds += drafted - started
        self.statistics.target_seconds += finished - drafted
        self.length.observe(width, accepted, drafted - began, finished - drafted)
        self.length.keep(going_on)

    def _finish_round(self, proposal: Proposal, logits: torch.Tensor) -> tuple[list[int], list[int]]:
        """Appends what is accepted, and lets finished rows go: (accepted by row, rows that go on)."""
        rows, statistics = self.rows, self.statistics
        scores = self.processors(logits, rows.tokens, rows.lengths)
        tokens, accepted = self.accept(scores, proposal)
        counts, accepted = torch.stack([proposal.counts, accepted]).tolist()
        appended, going_on = rows.append(tokens, [count + 1 for count in accepted])
        statistics.row_passes += len(accepted)
        statistics.drafted += sum(counts)
        statistics.accepted += sum(min(count, len(new)) for count, new in zip(accepted, appended, strict=True))
        statistics.judged += sum(min(taken + 1, count) for taken, count in zip(accepted, counts, strict=True))
        statistics.new_tokens += sum(map(len, appended))
        statistics.plain_rounds += not proposal.tokens.shape[1]
        if self.streamer is not None and appended[0]:
            self.streamer.put(torch.tensor(appended[0]))
        if len(going_on) < len(accepted):
            for part in (rows, self.target, self.draft, self.processors):
                part.keep(going_on)
        return accepted, going_on


def _wait_for(tokens: torch.Tensor) -> None:
    if tokens.is_cuda:  # so that the draft's time is not counted as the target's
        torch.cuda.synchronize(tokens.device)


def _check_pair(target: PreTrainedModel, draft: PreTrainedModel | Proposer, draft_length: int | None) -> None:
    """Refuses a draft that cannot help this target."""
    check_full_attention(target, "target")
    if draft_length is not None and not (isinstance(draft_length, int) and draft_length >= 1):
        raise InputError(
            f"draft_length {draft_length!r}: must be a whole number from 1; leave it out to draft what pays"
        )
    if isinstance(draft, nn.Module):  # a PeftModel is no PreTrainedModel
        check_full_attention(draft, "draft")
        check_vocabulary_size(target, draft)
        if draft.device != target.device:
            raise InputError(f"draft: is on {draft.device}, the target on {target.device}; load both on one device")
    elif not callable(getattr(draft, "propose", None)):
        raise InputError(f"draft: must be a model or a PromptLookup, and is a {type(draft).__name__}")


def check_vocabulary_size(target: PreTrainedModel, draft: PreTrainedModel, name: str = "draft") -> None:
    """Refuses a draft whose ids are not the target's.

    Raises:
        InputError: with both sizes, and how to trim.
    """
    own, wanted = (model.config.get_text_config(decoder=True).vocab_size for model in (draft, target))
    if own != wanted:
        raise InputError(
            f"{name}: its vocabulary has {own} entries, the target's {wanted}; a draft must have been trained with the "
            f"target's own tokenizer. If the first {min(own, wanted)} entries are the same, trim the larger model: "
            f"model.resize_token_embeddings({min(own, wanted)})"
        )


def _take(name: str, target: PreTrainedModel, config: GenerationConfig | None, kwargs: dict[str, Any]) -> Any:
    """An option as `generate` resolves it: from the call, the configuration, or the model's; then switched off in the call."""
    found = getattr(config, name, None)
    found = getattr(target.generation_config, name, None) if found is None else found
    value = kwargs.pop(name, found)
    if found is not None:
        kwargs[name] = None
    return value


def _stop_string_criterion(
    stop_strings: str | list[str], tokenizer: PreTrainedTokenizerBase | None
) -> StopStringCriteria:
    texts = [stop_strings] if isinstance(stop_strings, str) else stop_strings
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) and text for text in texts):
        raise InputError(f"stop_strings {stop_strings!r}: must be a text or a list of texts, none of them empty")
    if tokenizer is None:
        raise InputError(f"stop_strings {stop_strings!r}: need the tokenizer to be found; give tokenizer=")
    return StopStringCriteria(tokenizer=tokenizer, stop_strings=list(texts))


def _check_options(config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """Refuses what other decoding methods have and this one would ignore."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise InputError(f"{mode.value}: a draft helps greedy decoding and sampling only; generate without it")
    if not config.use_cache:
        raise InputError("use_cache=False: drafted tokens are checked with the help of the cache; leave it on")
    for name in _OUTPUTS:
        if getattr(config, name):
            raise InputError(f"{name}: is not collected while a draft helps; generate without it")
    if config.prefill_chunk_size is not None:
        raise InputError(
            f"prefill_chunk_size={config.prefill_chunk_size}: prompts are read at once here; leave it out"
        )
    cache = model_kwargs.get("past_key_values")
    if cache is not None and getattr(cache, "_is_user_defined", False):
        raise InputError("past_key_values: rows of different lengths need a cache of their own; leave it out")
    if config.cache_implementation not in (None, "dynamic"):
        raise InputError(
            f"cache_implementation {config.cache_implementation!r}: a draft needs a cache of its own kind"
        )
    if unknown := sorted(set(model_kwargs) - _PREPARED):
        raise InputError(f"{unknown[0]}: is not supported while a draft helps; generate without it")
