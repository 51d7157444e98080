"""The forward pass of a Llama over a cache of fixed size, with fewer kernels than transformers' own.

In a recorded step the kernels are the time, and most of them are small: transformers (5.23) normalizes in eight
kernels where torch has one, and rotates in ten where six are enough. Results differ from its own by rounding only.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM, LlamaModel, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from ..errors import InputError
from . import graphs


def is_plain_llama(model: PreTrainedModel) -> bool:
    """Whether a model is a Llama whose layers are transformers' own; their linear layers may be of any kind."""
    inner = getattr(model, "model", None)
    if not isinstance(model, LlamaForCausalLM) or not isinstance(inner, LlamaModel):
        return False
    kinds = {
        type(inner).forward: LlamaModel.forward,
        type(inner.norm): LlamaRMSNorm,
        **{type(layer): LlamaDecoderLayer for layer in inner.layers},
        **{type(layer.self_attn): LlamaAttention for layer in inner.layers},
        **{type(layer.mlp): LlamaMLP for layer in inner.layers},
        **{type(layer.input_layernorm): LlamaRMSNorm for layer in inner.layers},
        **{type(layer.post_attention_layernorm): LlamaRMSNorm for layer in inner.layers},
    }
    return all(found is expected for found, expected in kinds.items())


def llama_step(
    model: Any,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    mask: torch.Tensor,
    caches: list[tuple[torch.Tensor, torch.Tensor]],
    num_logits: int,
) -> torch.Tensor:
    """Reads tokens and writes their keys and values.

    Args:
        model (`LlamaForCausalLM`): see [`is_plain_llama`].
        tokens (`torch.Tensor`): `[rows, tokens]`.
        positions (`torch.Tensor`): `[rows, tokens]`, which are also the slots to write to.
        mask (`torch.Tensor`): `[rows, 1, groups * tokens, slots to read]`, added to the scores; query head h and token
            t of a group are at h * tokens + t.
        caches (`list`): keys and values of each layer, `[rows or more, key_value_heads, slots, head_dim]`.
        num_logits (`int`): number of the last positions to return logits for.

    Returns:
        `[rows, num_logits, vocab_size]`.
    """
    inner = model.model
    hidden = inner.embed_tokens(tokens)
    cos, sin = (angles[:, :, None] for angles in inner.rotary_emb(hidden, positions))  # [rows, tokens, 1, head_dim]
    half = sin.shape[-1] // 2
    sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)  # for the halves in the other order
    rows = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(positions)
    step = _compiled_step() if model in _compiled else layer_step
    for layer, (keys, values) in zip(inner.layers, caches, strict=True):
        hidden = step(layer, hidden, cos, sin, mask, keys, values, rows, positions)
    return model.lm_head(_normalized(inner.norm, hidden[:, -num_logits:]))


def layer_step(
    layer: Any,  # a LlamaDecoderLayer; its linear layers may be of any kind
    hidden: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    mask: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """One decoder layer of [`llama_step`]; `rows` and `slots` `[rows, tokens]` are where keys and values go."""
    attention, mlp = layer.self_attn, layer.mlp
    num_rows, num_tokens, _ = hidden.shape
    key_value_heads, head_dim = keys.shape[1], keys.shape[3]
    heads = (num_rows, num_tokens, -1, head_dim)
    normalized = _normalized(layer.input_layernorm, hidden)
    query = _rotated(attention.q_proj(normalized).view(heads), cos, sin)
    keys[rows, :, slots] = _rotated(attention.k_proj(normalized).view(heads), cos, sin)
    values[rows, :, slots] = attention.v_proj(normalized).view(heads)
    # The query heads of a group share their key/value head without a copy: see `grouped_attention.py`.
    query = query.transpose(1, 2).reshape(num_rows, key_value_heads, -1, head_dim)
    seen = mask.shape[-1]
    mixed = F.scaled_dot_product_attention(
        query, keys[:num_rows, :, :seen], values[:num_rows, :, :seen], attn_mask=mask, scale=attention.scaling
    )
    mixed = mixed.view(num_rows, -1, num_tokens, head_dim).transpose(1, 2).reshape(num_rows, num_tokens, -1)
    hidden = hidden + attention.o_proj(mixed)
    normalized = _normalized(layer.post_attention_layernorm, hidden)
    return hidden + mlp.down_proj(mlp.act_fn(mlp.gate_proj(normalized)) * mlp.up_proj(normalized))


_MOST_SHAPES = 256  # by default torch compiles a function for eight shapes
_compiled: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()


def compile_for_generation(model: PreTrainedModel) -> None:
    """Compiles the layers of a model for generation by recorded steps, when a step of a new shape is recorded.

    This takes seconds to tens of seconds for each shape.

    Args:
        model (`PreTrainedModel`): a Llama on a device that records steps.

    Raises:
        InputError: if its steps are not recorded, or its layers are not those of transformers.
    """
    reason = None
    if graphs.recorder_for(model.device) is None:
        reason = f"generation on {model.device} runs without recorded steps"
    elif not is_plain_llama(model):
        reason = f"the layers of {type(model).__name__} are not those of Llama in transformers"
    if reason := reason or graphs.reason_not_to_record(model):
        raise InputError(f"--compile: {reason}. Leave it out")
    _compiled.add(model)


@functools.cache
def _compiled_step() -> Callable[..., torch.Tensor]:
    """Returns [`layer_step`], compiled once per shape for the layers of all models: a layer is an argument."""
    compiled = torch.compile(layer_step, dynamic=False, fullgraph=True)

    def step(*arguments: Any) -> torch.Tensor:
        with torch._dynamo.config.patch(recompile_limit=_MOST_SHAPES):
            return compiled(*arguments)

    return step


def is_compiled(model: PreTrainedModel) -> bool:
    """Whether [`compile_for_generation`] was called for a model."""
    return model in _compiled


def _normalized(norm: Any, hidden: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(hidden, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates `[rows, tokens, heads, head_dim]`; `sin` has the sign of the first half changed."""
    half = states.shape[-1] // 2
    return torch.addcmul(states * cos, torch.cat([states[..., half:], states[..., :half]], dim=-1), sin)
