"""Conversion between the two row orders of q and k.

In Hugging Face and lit-gpt, the first half of a head's rows is rotated with the second half. In Meta's, llama2.c's and
GGUF files, each even row is rotated with the next row.
"""

import torch
from transformers import LlamaConfig


def rotated_heads(config: LlamaConfig, name: str) -> int | None:
    """Returns the number of heads in q or k of `LlamaForCausalLM`, or `None` for other tensors."""
    if name.endswith("self_attn.q_proj.weight"):
        return config.num_attention_heads
    return config.num_key_value_heads if name.endswith("self_attn.k_proj.weight") else None


def to_pairwise(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Converts Hugging Face's order to Meta's: a weight `[heads x head_dim, in]` or a bias `[heads x head_dim]`."""
    return weight.view(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def to_half_split(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Converts Meta's order to Hugging Face's, the inverse of [`to_pairwise`]."""
    return weight.view(heads, weight.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(weight.shape)
