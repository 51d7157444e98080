"""Packed documents: positions that restart within a row keep them apart, or the call is refused."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import LlamaConfig
from transformers.masking_utils import create_causal_mask, packed_sequence_mask_function
from transformers.utils import is_tracing


def use_cache_for_positions(config: LlamaConfig, inputs: dict[str, Any], training: bool) -> bool | None:
    """Decides `use_cache` where positions are given, and refuses what would let packed documents see each other.

    Stock Llama (5.23) keeps documents apart only without mask and cache, and under flash attention only in a single row.

    Args:
        config (`LlamaConfig`): of the model.
        inputs (`dict[str, Any]`): of `LlamaModel.forward`; `position_ids` has more than one token.
        training (`bool`): without mask and cache, positions are taken to restart, and are not read.

    Returns:
        `bool`, *optional*: what `LlamaModel.forward` is to be given.

    Raises:
        ValueError: if documents are packed and something else is given that joins them.
        RuntimeError: the same where positions are not read: under tracing, and on an accelerator in training or on top of a
            cache. There the device asserts that no position restarts, since reading the answer would wait for the device.
    """
    position_ids, attention_mask = inputs["position_ids"], inputs["attention_mask"]
    if attention_mask is not None and len(attention_mask.shape) == 4:
        return inputs["use_cache"]  # the caller has decided which tokens see each other
    joining = [name for name in ("attention_mask", "past_key_values") if inputs[name] is not None]
    joining += ["use_cache"] if inputs["use_cache"] else []
    assumed = training and not joining
    tokens = inputs["inputs_embeds"] if inputs["input_ids"] is None else inputs["input_ids"]
    if "flash" in config._attn_implementation and len(tokens) > 1:
        joining.append(f"attn_implementation={config._attn_implementation} with {len(tokens)} rows")
    if assumed:
        if joining:
            raise ValueError(_problem(joining))
        return False
    caches = config.use_cache if inputs["use_cache"] is None else inputs["use_cache"]
    if not joining and not caches:
        return inputs["use_cache"]  # stock keeps them apart
    restarts = _restarts(position_ids, attention_mask)
    would_wait = position_ids.device.type != "cpu" and (training or inputs["past_key_values"] is not None)
    if would_wait or is_tracing(restarts):
        torch._assert_async(~restarts, _problem(joining or ["use_cache"]))
        return inputs["use_cache"]
    if joining and restarts:
        raise ValueError(_problem(joining))
    return False if restarts else inputs["use_cache"]


def document_mask(config: LlamaConfig, position_ids: torch.Tensor) -> torch.Tensor | BlockMask | None:
    """The causal mask of packed documents in the form that the attention takes: dense, in blocks for flex, none for flash.

    transformers (5.23) makes the same one, but reads back from the device whether there are several documents.

    Args:
        config (`LlamaConfig`): of the model.
        position_ids (`torch.Tensor`): `[batch, seq]`.
    """
    if "flash" in config._attn_implementation:
        return None  # which finds the documents of its one row by itself
    documents = (position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)
    return create_causal_mask(
        config=config,
        # Read for shape, type and device.
        inputs_embeds=torch.empty(*position_ids.shape, 0, device=position_ids.device),
        attention_mask=None,
        past_key_values=None,
        and_mask_function=packed_sequence_mask_function(documents),
    )


def _restarts(position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Whether any position does not follow its predecessor, a boolean on the device; where one of the two is padding, none counts."""
    restart = position_ids.diff(dim=-1) != 1
    if attention_mask is not None:
        real = attention_mask[:, -position_ids.shape[-1] :].to(restart.device, torch.bool)
        restart = restart & real[:, 1:] & real[:, :-1]
    return restart.any()


def _problem(joining: Sequence[str]) -> str:
    return (
        f"position_ids restart within a row, so that documents are packed, but {', '.join(joining)} is given too: stock "
        "attention would then let the documents see each other. Leave it out (use_cache=False), or unpack the documents"
    )
