"""Speculative decoding for batches: a draft proposes tokens, and the target verifies several per row in one pass.

Greedy output equals the target's own; sampled output follows the target's distribution. Each row accepts its own
number of tokens: rows are neither realigned nor made to wait, see `ragged_cache.py`.
"""

import dataclasses
import functools
import logging
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import GenerateDecoderOnlyOutput, GenerationConfig
from transformers.generation.logits_process import LogitsProcessor
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from ..errors import InputError
from . import graphs
from .engine import Decoding
from .proposals import ModelProposer, PromptLookup, Proposer, SpeculationStatistics, first_layers
from .ragged_cache import check_full_attention


logger = logging.getLogger(__name__)
_DRAFTS = ("prompt_lookup_num_tokens", "assistant_early_exit")
_UNUSED = ("assistant_confidence_threshold", "num_assistant_tokens_schedule", "custom_generate")


@dataclasses.dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """The output of `generate` with statistics, without cache, hidden states and attentions.

    With `output_scores` and `output_logits`, it has one tensor `[rows, vocab_size]` per new token, as in transformers,
    which is zero for rows that ended before.
    """

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
    """Generates with a draft, for any number of prompts of any length.

    In fp32, greedy output equals that of `target.generate` for each prompt alone, unless two logits differ by less
    than rounding. In 16 bit, rounding depends on the shape of a batch, with and without a draft. Sampled output
    follows the target's distribution. Logits processors and stopping criteria are applied to each row's own tokens,
    criteria after every token.

    Args:
        target (`PreTrainedModel`): any causal language model with full attention, of transformers or of this package.
        draft (`PreTrainedModel` or `Proposer`): a smaller model with the same vocabulary, `first_layers(target, n)` or
            a `PromptLookup`. A `Proposer` holds the `statistics` after the call.
        input_ids (`torch.Tensor`): `[rows, prompt]`, padded on the left.
        attention_mask (`torch.Tensor`, *optional*): `[rows, prompt]`.
        draft_length (`int`, *optional*): number of tokens to draft in each round. By default it is chosen for
            throughput, from measured times and acceptance; output sampled with a seed then depends on these times.
        generation_config (`GenerationConfig`, *optional*): as in `generate`, like all other arguments:
            `stopping_criteria`, `streamer` (for one row), `tokenizer` (for `stop_strings`), `max_new_tokens`,
            `do_sample`, `temperature`, `repetition_penalty`, `num_return_sequences`, `return_dict_in_generate`,
            `output_scores` and so on.

    Returns:
        `[rows, prompt + new]`, padded on the right, or a [`SpeculativeOutput`] with `return_dict_in_generate=True`.

    Raises:
        InputError: if the vocabularies differ, a model or an option is not supported, or a prompt fills the context.
    """
    if isinstance(draft, nn.Module):  # a PeftModel is not a PreTrainedModel
        draft = ModelProposer(draft)
    elif not isinstance(draft, Proposer):
        raise InputError(f"draft: must be a model or a PromptLookup, not a {type(draft).__name__}")
    check_pair(target, draft)
    if draft_length is not None and not (isinstance(draft_length, int) and draft_length >= 1):
        raise InputError(
            f"draft_length={draft_length!r}: must be an integer of at least 1. Leave it out for an adaptive length"
        )
    for name in _UNUSED:
        if (value := kwargs.pop(name, None)) is not None:
            raise InputError(f"{name}={value!r}: is not supported with a draft. Leave it out")
    # As our own criterion, since `generate` (5.23) does not accept a `tokenizer` together with `custom_generate`.
    stop_strings = _pop_option("stop_strings", target, generation_config, kwargs)
    criteria = StoppingCriteriaList(stopping_criteria or [])
    if stop_strings:
        criteria.append(_stop_string_criterion(stop_strings, tokenizer))

    kwargs |= {"generation_config": generation_config, "stopping_criteria": criteria}
    decoding = Decoding(target, draft, draft_length, input_ids, attention_mask, **kwargs)
    draft.statistics = decoding.statistics
    return _run(decoding, streamer)


@torch.no_grad()
def generate_recorded(
    target: PreTrainedModel,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None = None,
    streamer: BaseStreamer | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Generates without a draft by recorded steps, where the device has them; the output is that of `target.generate`.

    Args:
        target (`PreTrainedModel`): see [`speculative_generate`], like the other arguments.
        input_ids (`torch.Tensor`): `[rows, prompt]`, padded on the left.

    Returns:
        `[rows, prompt + new]`, padded on the right; `None` if `target.generate` has to be used, for arguments that are
        not supported, and on devices without recorded steps. The reason is logged.
    """
    if graphs.recorder_for(target.device) is None:
        return None
    try:
        check_pair(target, None)
        _check_recordable(target, kwargs)
        if input_ids is None:
            raise InputError("input_ids: are missing")
        stop_strings = _pop_option("stop_strings", target, kwargs.get("generation_config"), kwargs)
        criteria = StoppingCriteriaList(kwargs.pop("stopping_criteria", None) or [])
        if stop_strings:
            criteria.append(_stop_string_criterion(stop_strings, kwargs.pop("tokenizer", None)))
        decoding = Decoding(target, None, None, input_ids, attention_mask, stopping_criteria=criteria, **kwargs)
        if decoding.config.return_dict_in_generate:
            raise InputError("return_dict_in_generate=True: its cache is one of transformers")
        _check_streamer(decoding, streamer)
    except InputError as reason:
        logger.info("generation runs in transformers' own loop: %s", reason)
        return None
    output = _run(decoding, streamer)
    assert isinstance(output, torch.Tensor)
    return output


def _check_recordable(target: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    """Refuses what recorded steps would compute in another way than `generate`."""
    if reason := graphs.reason_not_to_record(target):
        raise InputError(f"{type(target).__name__}: {reason}")
    own = LogitsProcessor.__module__
    for processor in kwargs.get("logits_processor") or ():
        if type(processor).__module__ != own:
            raise InputError(f"logits processor {type(processor).__name__}: may depend on the whole batch")
    for name in ("custom_generate", "negative_prompt_ids", "synced_gpus", "assistant_tokenizer"):
        if kwargs.get(name) is not None:
            raise InputError(f"{name}: is not supported by recorded steps")


def _run(decoding: Decoding, streamer: BaseStreamer | None) -> torch.Tensor | SpeculativeOutput:
    """Runs rounds until every row has finished, and returns the output of `generate`."""
    rows, config = decoding.rows, decoding.config
    _check_streamer(decoding, streamer)
    if len(rows) > 1 and rows.may_end_early and config._pad_token_tensor is None:
        raise InputError("pad_token_id: is missing, and rows may end at different lengths. Give pad_token_id")
    if streamer is not None:
        streamer.put(decoding.input_ids.cpu())
    for name in ("scores", "logits"):
        if config.return_dict_in_generate and getattr(config, f"output_{name}"):
            decoding.token_scores[name] = {key: [] for key in rows.keys}
    appended = decoding.start()
    while True:
        if streamer is not None and appended.get(0):
            streamer.put(torch.tensor(appended[0]))
        if not len(rows):
            break
        appended = decoding.round()
    decoding.close()
    if streamer is not None:
        streamer.end()
    pad = config._pad_token_tensor
    sequences = rows.sequences(decoding.input_ids, 0 if pad is None else int(pad))
    if not config.return_dict_in_generate:
        return sequences
    # Per name one tensor `[rows, vocab_size]` per new token, zero after a row's end.
    collected = decoding.token_scores.items()
    fields: Any = {
        name: tuple(pad_sequence([torch.cat(of_rows[row]) for row in range(len(of_rows))]))
        for name, of_rows in collected
    }
    fields["sequences"] = sequences
    return SpeculativeOutput(statistics=decoding.statistics, **fields)


def _check_streamer(decoding: Decoding, streamer: BaseStreamer | None) -> None:
    if streamer is not None and len(decoding.rows) > 1:
        raise InputError(f"streamer: supports one row, not {len(decoding.rows)}. Generate without it")


def pop_draft(
    target: PreTrainedModel, generation_config: GenerationConfig | None, kwargs: dict[str, Any]
) -> PreTrainedModel | Proposer | None:
    """Removes the arguments of assisted generation from those of `generate`; returns the draft, or `None`.

    The number of drafted tokens, if given, is added to `kwargs` as `draft_length` of [`speculative_generate`].

    Raises:
        InputError: if several drafts are given, or the draft has its own tokenizer.
    """
    pop = functools.partial(_pop_option, target=target, config=generation_config, kwargs=kwargs)
    assistant = kwargs.pop("assistant_model", None)
    lookup, early_exit = map(pop, _DRAFTS)
    if sum(draft is not None for draft in (assistant, lookup, early_exit)) > 1:
        raise InputError(
            "assistant_model, prompt_lookup_num_tokens, assistant_early_exit: only one of them can be given"
        )
    if kwargs.pop("assistant_tokenizer", None) is not None:
        raise InputError("assistant_tokenizer: a draft must have the target's own vocabulary. Leave it out")
    if assistant is None and lookup is None and early_exit is None:
        return None
    num_tokens = pop("num_assistant_tokens") if lookup is None else lookup
    if num_tokens is not None:
        kwargs["draft_length"] = num_tokens
    if lookup is not None:
        return PromptLookup(pop("max_matching_ngram_size") or 3)
    return first_layers(target, early_exit) if early_exit is not None else assistant


def check_pair(target: PreTrainedModel, draft: Proposer | None) -> None:
    """Refuses a target or a draft that [`~decoding.engine.Decoding`] does not support.

    Raises:
        InputError: if one of them does not support rows of different lengths, or vocabularies or devices differ.
    """
    check_full_attention(target, "target" if draft else "model", drafts=draft is not None)
    if not isinstance(draft, ModelProposer):
        return
    check_full_attention(draft.model, "draft")
    check_vocabulary_size(target, draft.model)
    if draft.model.device != target.device:
        raise InputError(f"draft: is on {draft.model.device}, the target on {target.device}. Load both on one device")


def check_vocabulary_size(target: PreTrainedModel, draft: PreTrainedModel, name: str = "draft") -> None:
    """Refuses a draft with another vocabulary size than the target.

    Raises:
        InputError: with both sizes, and how to trim.
    """
    own, wanted = (model.config.get_text_config(decoder=True).vocab_size for model in (draft, target))
    if own != wanted:
        raise InputError(
            f"{name}: its vocabulary has {own} entries, the target's {wanted}. A draft must have the target's own "
            f"tokenizer. If the first {min(own, wanted)} entries are the same, trim the larger model: "
            f"model.resize_token_embeddings({min(own, wanted)})"
        )


def _pop_option(name: str, target: PreTrainedModel, config: GenerationConfig | None, kwargs: dict[str, Any]) -> Any:
    """Returns an option from the arguments, the configuration or the model's own, and disables it for `generate`."""
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
        raise InputError(f"stop_strings={stop_strings!r}: must be a string or a list of strings, none of them empty")
    if tokenizer is None:
        raise InputError(f"stop_strings={stop_strings!r}: need the tokenizer. Give tokenizer=")
    return StopStringCriteria(tokenizer=tokenizer, stop_strings=list(texts))
