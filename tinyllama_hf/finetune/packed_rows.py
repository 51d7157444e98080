"""Packing: the conversations of a forward pass stand in one row without padding, and do not attend to each other.

What a training step computes is the same with and without packing: the same conversations, losses and gradients.
"""

import heapq
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_flash_attn_2_available


# TRL's collator passes the bounds of the conversations in a row as `cu_seq_lens_q`.
PACKED_SDPA = "packed_sdpa"


def packed_sdpa_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each conversation of a row, one call of sdpa for each.

    Args:
        query, key, value (`torch.Tensor`): `[1, heads, tokens, head_dim]`; without `cu_seq_lens_q` any batch size.
        attention_mask (`torch.Tensor`, *optional*): from [`packed_mask`]; must be `None` for packed rows.
        cu_seq_lens_q (`torch.Tensor`, *optional*): the start of each conversation, and the number of tokens. Without
            it each row is one sequence, and attention is that of sdpa.

    Raises:
        ValueError: for packed rows with a mask, or several of them: they would be joined.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is not None or len(query) != 1:
        raise ValueError(f"{PACKED_SDPA}: takes one packed row and no mask, got {len(query)} rows")
    lengths = cu_seq_lens_q.diff().tolist()
    rows = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [sdpa_attention_forward(module, q, k, v, None, **kwargs)[0] for q, k, v in rows]
    return torch.cat(outputs, dim=1), None


def packed_mask(
    q_length: int, kv_length: int, attention_mask: torch.Tensor | None = None, **kwargs: Any
) -> torch.Tensor | None:
    """Returns the mask of sdpa for batches with padding and for generation; packed rows need none, `[tokens, tokens]`.

    transformers creates no mask at all for an implementation that it does not know, padding included.
    """
    if q_length == kv_length and (attention_mask is None or bool(attention_mask.all())):
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(PACKED_SDPA, packed_sdpa_attention)
AttentionMaskInterface.register(PACKED_SDPA, packed_mask)


def packed_attention_name(device: torch.device) -> str:
    """Returns the attention implementation for packed rows on a device: it keeps the conversations of a row apart."""
    if device.type != "cuda":
        return PACKED_SDPA
    return "flash_attention_2" if is_flash_attn_2_available() else "flex_attention"


def balanced_rows(lengths: Sequence[int], num_rows: int) -> list[list[int]]:
    """Distributes conversations over rows of nearly equal numbers of tokens: the longest first, to the shortest row.

    Graham, "Bounds on multiprocessing timing anomalies" (1969): the longest row has at most 4/3 of the least possible.

    Args:
        lengths (`Sequence[int]`): tokens of each conversation; at least `num_rows` of them.
        num_rows (`int`): number of rows.

    Returns:
        `list[list[int]]`: the numbers of the conversations in each row; no row is empty.
    """
    heap = [(0, row) for row in range(num_rows)]
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        tokens, row = heapq.heappop(heap)
        rows[row].append(number)
        heapq.heappush(heap, (tokens + lengths[number], row))
    return rows
