"""Grouped-query attention without copies of keys and values: `attn_implementation="gqa_packed"`.

With a mask and several queries, transformers' sdpa (5.23) repeats keys and values for every query head: eight copies
of the cache in TinyLlama. Here the query heads of a group are placed along the sequence dimension instead, so they
share their key/value head without a copy. Importing this module registers the implementation with transformers.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


GQA_PACKED = "gqa_packed"
# With the many queries of a prefill, the copies cost less than the product, and the repeated mask would be large.
_MAX_PACKED_QUERIES = 64
# Per configuration in use: the number of active `packed_attention` contexts, and the implementation from before.
_packed: dict[int, tuple[int, str]] = {}
_lock = threading.Lock()


def gqa_packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one query, or of up to 64 masked ones, without copies of keys and values; otherwise calls sdpa.

    Args:
        query (`torch.Tensor`): `[batch, heads, queries, head_dim]`.
        key (`torch.Tensor`): `[batch, key_value_heads, keys, head_dim]`.
        value (`torch.Tensor`): `[batch, key_value_heads, keys, head_dim]`.
        attention_mask (`torch.Tensor`, *optional*): `[batch or 1, heads or 1, queries, keys]`, true where a query sees
            a key, or added to the scores. A mask that was repeated for the query heads of a group already,
            `[batch, 1, groups * queries, keys]`, is used unchanged.

    Returns:
        `[batch, queries, heads, head_dim]`, equal to sdpa's up to rounding, and `None` in place of the weights.
    """
    batch, heads, num_queries, head_dim = query.shape
    groups = heads // key.shape[1]
    is_packed = groups > 1 and attention_mask is not None and attention_mask.shape[2] == groups * num_queries
    packs = is_packed or (groups > 1 and attention_mask is not None and 1 < num_queries <= _MAX_PACKED_QUERIES)
    # One query without a mask: transformers (5.23) does not repeat keys and values, and torch's CPU kernel (2.13) for
    # grouped queries takes 2 times as long in fp32 and 10 to 17 times as long in bf16 (32 heads on 4;
    # benchmarks/decode.py).
    packs |= groups > 1 and attention_mask is None and num_queries == 1 and query.device.type == "cpu"
    if not packs or dropout or any(kwargs.get(name) is not None for name in ("position_bias", "softcap")):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    # Query head h belongs to key/value head h // groups, so a reshape gathers each group along the sequence dimension.
    packed = query.reshape(batch, key.shape[1], groups * num_queries, head_dim)
    if attention_mask is not None and attention_mask.shape[1] == 1 and not is_packed:
        attention_mask = attention_mask.repeat(1, 1, groups, 1)
    elif attention_mask is not None and not is_packed:
        attention_mask = attention_mask.reshape(-1, key.shape[1], groups * num_queries, attention_mask.shape[-1])
    output = nn.functional.scaled_dot_product_attention(packed, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(batch, heads, num_queries, -1).transpose(1, 2).contiguous(), None


def attention_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Returns the configurations that choose the attention of a model: its own, and those of shared layers."""
    found = [
        model.config.get_text_config(decoder=True),
        *(getattr(module, "config", None) for module in model.modules()),
    ]
    return list({id(config): config for config in found if isinstance(config, PreTrainedConfig)}.values())


@contextlib.contextmanager
def packed_attention(configs: Sequence[PreTrainedConfig]) -> Iterator[None]:
    """Sets `gqa_packed` attention in a context; several threads may use the same model.

    When the last context exits, the implementation from before is restored, even if another one was set meanwhile.

    Args:
        configs (`Sequence[PreTrainedConfig]`): from [`attention_configs`].
    """
    with _lock:
        for config in configs:
            users, before = _packed.get(id(config), (0, config._attn_implementation))
            _packed[id(config)] = (users + 1, before)
            config._attn_implementation = GQA_PACKED
    try:
        yield
    finally:
        with _lock:
            for config in configs:
                users, before = _packed.pop(id(config))
                if users > 1:
                    _packed[id(config)] = (users - 1, before)
                else:
                    config._attn_implementation = before


AttentionInterface.register(GQA_PACKED, gqa_packed_attention)
AttentionMaskInterface.register(GQA_PACKED, sdpa_mask)
