"""Packed documents: no attention across positions that restart within a row, or an error."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import LlamaConfig
from transformers.masking_utils import create_causal_mask, packed_sequence_mask_function
from transformers.utils import is_tracing


def use_cache_for_positions(config: LlamaConfig, inputs: dict[str, Any], training: bool) -> bool | None:
    """Returns `use_cache` for inputs with positions, and refuses inputs that would join packed documents.

    Stock Llama (5.23) keeps documents apart only without mask and cache, and with flash attention only in a single
    row.

    Args:
        config (`LlamaConfig`): configuration of the model.
        inputs (`dict[str, Any]`): inputs of `LlamaModel.forward`; `position_ids` has more than one token per row.
        training (`bool`): whether to assume that positions restart, if neither mask nor cache is given.

    Returns:
        `bool`, *optional*: the value of `use_cache` for `LlamaModel.forward`.

    Raises:
        ValueError: if documents are packed and another input joins them.
        RuntimeError: the same, raised by the device: under tracing, and on an accelerator in training mode or after a
            cache, where reading the positions would wait for the device.
    """
    position_ids, attention_mask = inputs["position_ids"], inputs["attention_mask"]
    if attention_mask is not None and len(attention_mask.shape) == 4:
        return inputs["use_cache"]  # a 4D mask already defines which tokens see each other
    joining = [name for name in ("attention_mask", "past_key_values") if inputs[name] is not None]
    joining += ["use_cache"] if inputs["use_cache"] else []
    assumed = training and not joining
    tokens = inputs["inputs_embeds"] if inputs["input_ids"] is None else inputs["input_ids"]
    if "flash" in config._attn_implementation and len(tokens) > 1:
        joining.append(f"attn_implementation={config._attn_implementation} with {len(tokens)} rows")
    if assumed:
        if joining:
            raise ValueError(_error_message(joining))
        return False
    caches = config.use_cache if inputs["use_cache"] is None else inputs["use_cache"]
    if not joining and not caches:
        return inputs["use_cache"]  # stock Llama keeps documents apart
    restarts = _restarts(position_ids, attention_mask)
    would_wait = position_ids.device.type != "cpu" and (training or inputs["past_key_values"] is not None)
    if would_wait or is_tracing(restarts):
        torch._assert_async(~restarts, _error_message(joining or ["use_cache"]))
        return inputs["use_cache"]
    if joining and restarts:
        raise ValueError(_error_message(joining))
    return False if restarts else inputs["use_cache"]


def document_mask(config: LlamaConfig, position_ids: torch.Tensor) -> torch.Tensor | BlockMask | None:
    """Returns the causal mask of packed documents: dense, in blocks for flex attention, none for flash attention.

    transformers (5.23) creates the same mask, but first reads from the device whether there are several documents.

    Args:
        config (`LlamaConfig`): configuration of the model.
        position_ids (`torch.Tensor`): `[batch, seq]`.
    """
    if "flash" in config._attn_implementation:
        return None  # it finds the documents of a row from the positions
    documents = (position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)
    return create_causal_mask(
        config=config,
        # Only its shape, dtype and device are used.
        inputs_embeds=torch.empty(*position_ids.shape, 0, device=position_ids.device),
        attention_mask=None,
        past_key_values=None,
        and_mask_function=packed_sequence_mask_function(documents),
    )


def _restarts(position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Returns whether positions restart, as a boolean on the device; restarts at padding do not count."""
    restart = position_ids.diff(dim=-1) != 1
    if attention_mask is not None:
        real = attention_mask[:, -position_ids.shape[-1] :].to(restart.device, torch.bool)
        restart = restart & real[:, 1:] & real[:, :-1]
    return restart.any()


def _error_message(joining: Sequence[str]) -> str:
    return (
        f"position_ids restart within a row, so documents are packed, but {', '.join(joining)} is given too, which "
        "would join the documents. Leave it out (use_cache=False), or give each document its own row"
    )
