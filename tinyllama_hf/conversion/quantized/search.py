"""The search for activation-aware scales: Lin et al., AWQ, arXiv 2306.00978, section 3.2.

An input channel with large activations needs more precise weights. They are multiplied by s before rounding, and the
layer that feeds the channel is divided by s, so only the rounding changes. The paper searches
s = mean|x|^ratio for the ratio with the smallest error of the output (equations 4 and 5):

    || Q(W diag(s)) diag(1/s) x - W x ||^2, summed over calibration tokens = sum over rows of d G d^T,

where d is a row of the difference of the weights and G = sum of x x^T. Only G is kept of the inputs, so the cost of a
trial is independent of the text length, and memory stays near one decoder layer. For the layers after a norm, the
paper's code compares the output of the whole attention or MLP block. On a trained model with 4 layers this took seven
times as long and was not more accurate.

As in AutoAWQ, all layers are searched on the activations of the original model. The target of a layer is then what the
model computes, and no layer compensates for earlier ones on calibration text alone.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from transformers import LlamaConfig, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from ...errors import InputError
from ...tokenization_tinyllama import encode_text
from ..checkpoint import head_sizes
from .rounding import dequantize_groups, quantize_groups


SEQUENCE_TOKENS = 512
MAX_SEQUENCES = 128
BATCH_SEQUENCES = 8
RATIO_STEPS = 20
# Clipping tries limits of 1, 0.95, ... 0.5 times the largest weight of a group.
CLIP_STEPS, CLIP_LEAST = 20, 0.5
# Magnitudes are at least 1e-4 of the largest. The scales then stay between 0.01 and 100 at any ratio, so that weights
# divided by them stay well within float16.
LEAST_MAGNITUDE = 1e-4


class Fold(NamedTuple):
    """Linear layers that share an input, and the weight that absorbs the inverse scales.

    `heads` is (key/value heads, query heads per key/value head, head size) if a producer channel feeds several inputs.
    """

    producer: str
    consumers: tuple[str, ...]
    heads: tuple[int, int, int] | None = None

    def tie(self, channels: torch.Tensor) -> torch.Tensor:
        """Averages over the inputs of each producer channel: `[in]` to `[producer channels]`."""
        return channels if self.heads is None else channels.view(self.heads).mean(1).flatten()

    def spread(self, channels: torch.Tensor) -> torch.Tensor:
        """Repeats each producer channel for its inputs: `[producer channels]` to `[in]`."""
        if self.heads is None:
            return channels
        return channels.view(self.heads[0], 1, self.heads[2]).expand(self.heads).flatten()


@dataclass
class Inputs:
    """Statistics of the inputs x `[tokens, in]` of a linear layer.

    Args:
        gram (`torch.Tensor`): `[in, in]`, mean of x x^T.
        magnitude (`torch.Tensor`): `[in]`, mean of |x|.
    """

    gram: torch.Tensor
    magnitude: torch.Tensor


def layer_folds(config: LlamaConfig) -> tuple[Fold, ...]:
    """Returns the four groups of layers in a decoder layer.

    With grouped-query attention, a row of `v_proj` feeds the same channel of several query heads. They get one scale,
    which keeps the fold exact (AutoAWQ skips such an `o_proj`). The scales of `down_proj` are absorbed by `up_proj`,
    which has no activation function after it.
    """
    queries, groups, width = head_sizes(config)
    heads = (groups, queries // groups, width)
    attention, mlp = "self_attn.{}_proj.weight".format, "mlp.{}_proj.weight".format
    return (
        Fold("input_layernorm.weight", (attention("q"), attention("k"), attention("v"))),
        Fold(attention("v"), (attention("o"),), heads),
        Fold("post_attention_layernorm.weight", (mlp("gate"), mlp("up"))),
        Fold(mlp("up"), (mlp("down"),)),
    )


def calibration_tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: LlamaConfig) -> torch.Tensor:
    """Joins texts, each after a begin-of-sequence token, and splits them into sequences.

    Returns:
        Ids `[sequences, tokens]`: at most 128 sequences of 512 tokens, or of the model's context if that is shorter.

    Raises:
        InputError: if the text is shorter than one sequence.
    """
    length = min(SEQUENCE_TOKENS, config.max_position_embeddings)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids: list[int] = []
    for text in texts:
        ids += begin + encode_text(tokenizer, text)
        if len(ids) >= MAX_SEQUENCES * length:
            break
    count = min(len(ids) // length, MAX_SEQUENCES)
    if count == 0:
        raise InputError(f"--calibration: {len(ids)} tokens; at least one sequence of {length} is needed. Add text")
    return torch.tensor(ids[: count * length]).view(count, length)


@torch.no_grad()
def observe_layer(config: LlamaConfig, weights: dict[str, torch.Tensor], hidden: torch.Tensor) -> dict[str, Inputs]:
    """Runs one decoder layer on the calibration text.

    Args:
        config (`LlamaConfig`): the model's configuration.
        weights (`dict[str, torch.Tensor]`): float32 weights by name within the layer.
        hidden (`torch.Tensor`): `[sequences, tokens, hidden]`, float32. It is overwritten with the layer's output.

    Returns:
        The input statistics of each fold, by its producer.
    """
    config = copy.deepcopy(config)
    config._attn_implementation = "sdpa"  # causal without a mask
    with torch.device("meta"):
        layer = LlamaDecoderLayer(config, layer_idx=0)
    layer.load_state_dict(weights, assign=True)
    positions = torch.arange(hidden.shape[1])[None]
    rotary = LlamaRotaryEmbedding(config)(hidden, positions)
    seen = {}
    for fold in layer_folds(config):
        width = weights[fold.consumers[0]].shape[1]
        seen[fold.producer] = Inputs(torch.zeros(width, width), torch.zeros(width))
        module = layer.get_submodule(fold.consumers[0].removesuffix(".weight"))
        module.register_forward_pre_hook(partial(_observe, seen[fold.producer], hidden.shape[0] * hidden.shape[1]))
    for batch in hidden.split(BATCH_SEQUENCES):  # views of `hidden`
        batch.copy_(layer(batch, position_ids=positions, position_embeddings=rotary))
    return seen


def _observe(inputs: Inputs, num_tokens: int, module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
    x = arguments[0].flatten(0, 1)  # [tokens of the batch, in]
    inputs.gram.addmm_(x.T, x, alpha=1 / num_tokens)
    inputs.magnitude.add_(x.abs().sum(0), alpha=1 / num_tokens)


@torch.no_grad()
def scale_layer(
    config: LlamaConfig, weights: dict[str, torch.Tensor], seen: dict[str, Inputs], group_size: int
) -> None:
    """Searches the scales of one decoder layer and folds them in; the function of the layer does not change.

    Args:
        config (`LlamaConfig`): the model's configuration.
        weights (`dict[str, torch.Tensor]`): weights of the layer; changed in place.
        seen (`dict[str, Inputs]`): the result of [`observe_layer`]; changed to that of the scaled layer.
        group_size (`int`): group size of the quantization.
    """
    for fold in layer_folds(config):
        inputs = seen[fold.producer]
        scales = _search_scales(fold, [weights[name] for name in fold.consumers], inputs, group_size)
        spread = fold.spread(scales)
        for name in fold.consumers:
            weights[name] *= spread
        producer = weights[fold.producer]
        producer /= scales if producer.ndim == 1 else scales[:, None]
        inputs.gram /= torch.outer(spread, spread)


def _search_scales(fold: Fold, weights: Sequence[torch.Tensor], inputs: Inputs, group_size: int) -> torch.Tensor:
    """Returns the best scales of the grid, `[producer channels]`; among equals the first, which keeps dead inputs."""
    magnitude = fold.tie(inputs.magnitude)
    magnitude = magnitude.clamp(min=max(magnitude.max().item() * LEAST_MAGNITUDE, torch.finfo(torch.float32).tiny))
    best, least = torch.ones_like(magnitude), float("inf")
    for step in range(RATIO_STEPS + 1):
        scales = magnitude ** (step / RATIO_STEPS)
        scales /= (scales.max() * scales.min()).sqrt()
        spread = fold.spread(scales)
        error = sum(_output_error(weight, spread, inputs.gram, group_size) for weight in weights)
        if error < least:
            best, least = scales, error
    return best


def _output_error(weight: torch.Tensor, scales: torch.Tensor, gram: torch.Tensor, group_size: int) -> float:
    """Returns the mean squared error of the output, summed over its channels."""
    rounded = dequantize_groups(*quantize_groups(weight * scales, group_size)).float()
    difference = rounded / scales - weight
    return ((difference @ gram) * difference).sum().item()


@torch.no_grad()
def clip_layer(
    config: LlamaConfig, weights: dict[str, torch.Tensor], seen: dict[str, Inputs], group_size: int
) -> None:
    """Clips the largest weights of a group if the smaller scale reduces the error: the paper's second search.

    Each group is evaluated by its own contribution to the output. Unlike in AutoAWQ, queries and keys are clipped too,
    which reduced the error of all four trained models that were tested, among them SmolLM2.

    Args:
        config (`LlamaConfig`): the model's configuration.
        weights (`dict[str, torch.Tensor]`): weights of the layer after [`scale_layer`]; changed in place.
        seen (`dict[str, Inputs]`): input statistics of the scaled layer.
        group_size (`int`): group size of the quantization.
    """
    for fold in layer_folds(config):
        rows = seen[fold.producer].gram.split(group_size)
        blocks = torch.stack([row.split(group_size, 1)[i] for i, row in enumerate(rows)])
        for name in fold.consumers:
            weights[name].copy_(_clipped(weights[name], blocks))


def _clipped(weight: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Clips each group of `weight` `[out, in]` to its best limit; `blocks` `[groups, group_size, group_size]` of G."""
    group_size = blocks.shape[1]
    groups = weight.unflatten(1, (-1, group_size))  # [out, groups, group_size]
    largest = groups.abs().amax(2, keepdim=True)
    limit, least = largest, torch.full_like(largest, float("inf"))
    for step in range(round((1 - CLIP_LEAST) * CLIP_STEPS) + 1):
        trial = largest * (1 - step / CLIP_STEPS)
        cut = groups.clamp(-trial, trial)
        difference = dequantize_groups(*quantize_groups(cut.flatten(1), group_size)).float().view_as(groups) - groups
        error = (torch.einsum("ogi,gij->ogj", difference, blocks) * difference).sum(2, keepdim=True)
        limit, least = torch.where(error < least, trial, limit), torch.minimum(error, least)
    return groups.clamp(-limit, limit).flatten(1)
