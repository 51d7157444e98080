"""The two orders in which rows of q and k are kept, and how one becomes the other.

Hugging Face, lit-gpt: the first half of a head's rows is rotated with the second half. Meta, llama2.c, GGUF: each row with
its neighbour.
"""

import torch
from transformers import LlamaConfig


def rotated_heads(config: LlamaConfig, name: str) -> int | None:
    """The number of heads in a tensor of `LlamaForCausalLM` whose rows have an order, `None` for all others."""
    if name.endswith("self_attn.q_proj.weight"):
        return config.num_attention_heads
    return config.num_key_value_heads if name.endswith("self_attn.k_proj.weight") else None


def to_pairwise(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """From Hugging Face's order to Meta's; weight is `[heads x head_dim, in]`, or a bias without the last dimension."""
    return weight.view(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def to_half_split(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of [`to_pairwise`]."""
    return weight.view(heads, weight.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(weight.shape)
