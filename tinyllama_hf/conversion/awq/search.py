"""The search for activation-aware scales: Lin et al., AWQ, arXiv 2306.00978, section 3.2.

An input channel that is large in the activations is worth more of the 16 levels. Its weights are multiplied by s before
they are rounded, and what feeds the channel is divided by s, which changes nothing but the rounding. The paper looks for
s = mean|x|^ratio with the ratio that makes the output differ least (its equations 4 and 5):

    || Q(W diag(s)) diag(1/s) x - W x ||^2, summed over calibration tokens = sum over rows of d G d^T,

where d is a row of the difference of the weights and G = sum of x x^T. G is all that is kept of the inputs, so the cost
of a trial does not grow with the text, and memory stays near one decoder layer. The paper's code compares the output of
the whole attention or MLP block for what their norms feed; on a trained model of 4 layers that took seven times as long
and came out no nearer.

All layers are searched on the activations of the original model, as AutoAWQ does: the target of a layer is then what
the model computes, whatever was chosen before it, and no layer learns to make up for an earlier one on calibration
text alone.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import LlamaConfig, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from ...errors import InputError
from ...tokenization_tinyllama import encode_text
from .packing import dequantize_groups, quantize_groups


SEQUENCE_TOKENS = 512
MAX_SEQUENCES = 128
BATCH_SEQUENCES = 8
RATIO_STEPS = 20
# Clipping: the largest weight of a group is cut to 1, 0.95, ... 0.5 of itself.
CLIP_STEPS, CLIP_LEAST = 20, 0.5
# A channel counts at least 1e-4 of the largest: at any ratio the scales stay between 0.01 and 100, so that what is
# divided by them stays well within float16.
LEAST_MAGNITUDE = 1e-4


class Fold(NamedTuple):
    """Linear layers that share an input, and what that input's scales are taken from.

    `heads` is (key/value heads, query heads of each, head width) where one producer channel feeds several inputs.
    """

    producer: str
    consumers: tuple[str, ...]
    heads: tuple[int, int, int] | None = None

    def tie(self, channels: torch.Tensor) -> torch.Tensor:
        """Averages over the inputs that one producer channel feeds: `[in]` to `[producer channels]`."""
        return channels if self.heads is None else channels.view(self.heads).mean(1).flatten()

    def spread(self, channels: torch.Tensor) -> torch.Tensor:
        """Repeats each producer channel for the inputs that it feeds: `[producer channels]` to `[in]`."""
        if self.heads is None:
            return channels
        return channels.view(self.heads[0], 1, self.heads[2]).expand(self.heads).flatten()


@dataclass
class Inputs:
    """What is kept of the inputs x `[tokens, in]` of a linear layer.

    Args:
        gram (`torch.Tensor`): `[in, in]`, mean of x x^T.
        magnitude (`torch.Tensor`): `[in]`, mean of |x|.
    """

    gram: torch.Tensor
    magnitude: torch.Tensor


def folds(config: LlamaConfig) -> tuple[Fold, ...]:
    """The four groups of a decoder layer.

    With grouped-query attention one row of `v_proj` feeds the same channel of several query heads: they get one scale,
    which keeps the fold exact (AutoAWQ leaves such an `o_proj` out). The activation function stands between `gate_proj`
    and the product with `up_proj`, so that any will do.
    """
    groups = config.num_key_value_heads
    heads = (groups, config.num_attention_heads // groups, config.head_dim)
    attention, mlp = "self_attn.{}_proj.weight".format, "mlp.{}_proj.weight".format
    return (
        Fold("input_layernorm.weight", (attention("q"), attention("k"), attention("v"))),
        Fold(attention("v"), (attention("o"),), heads),
        Fold("post_attention_layernorm.weight", (mlp("gate"), mlp("up"))),
        Fold(mlp("up"), (mlp("down"),)),
    )


def calibration_tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: LlamaConfig) -> torch.Tensor:
    """Joins texts, begin-of-sequence before each, and cuts them into sequences; text beyond the last is not read.

    Returns:
        `[sequences, tokens]`, at most 128 sequences of 512 tokens, or of the model's context where that is shorter.

    Raises:
        InputError: if there is not one full sequence, or the tokenizer has more ids than the model.
    """
    length = min(SEQUENCE_TOKENS, config.max_position_embeddings)
    ids: list[int] = []
    for text in texts:
        if tokenizer.bos_token_id is not None:
            ids.append(tokenizer.bos_token_id)
        ids += encode_text(tokenizer, text)
        if len(ids) >= MAX_SEQUENCES * length:
            break
    count = min(len(ids) // length, MAX_SEQUENCES)
    if count == 0:
        raise InputError(f"the calibration text has {len(ids)} tokens; one sequence takes {length}: give more text")
    tokens = torch.tensor(ids[: count * length]).view(count, length)
    if tokens.max() >= config.vocab_size:
        raise InputError(f"the calibration text has the token {int(tokens.max())}, but the model {config.vocab_size} rows; "
                         "the tokenizer is another model's")  # fmt: skip
    return tokens


@torch.no_grad()
def observe_layer(config: LlamaConfig, weights: dict[str, torch.Tensor], hidden: torch.Tensor) -> dict[str, Inputs]:
    """Sends the calibration text through one decoder layer.

    Args:
        config (`LlamaConfig`): of the model.
        weights (`dict[str, torch.Tensor]`): of the layer, under their names in it, float32.
        hidden (`torch.Tensor`): `[sequences, tokens, hidden]`, float32; becomes the input of the next layer.

    Returns:
        For each fold, under its producer, what its consumers saw.
    """
    config = copy.deepcopy(config)
    config._attn_implementation = "sdpa"  # causal without a mask
    with torch.device("meta"):
        layer = LlamaDecoderLayer(config, layer_idx=0)
    layer.load_state_dict(weights, assign=True)
    positions = torch.arange(hidden.shape[1])[None]
    rotary = LlamaRotaryEmbedding(config)(hidden, positions)
    seen = {}
    for fold in folds(config):
        width = weights[fold.consumers[0]].shape[1]
        seen[fold.producer] = Inputs(torch.zeros(width, width), torch.zeros(width))
        module = layer.get_submodule(fold.consumers[0].removesuffix(".weight"))
        module.register_forward_pre_hook(_keeper(seen[fold.producer], hidden.shape[0] * hidden.shape[1]))
    for batch in hidden.split(BATCH_SEQUENCES):  # views: each is overwritten by its output
        batch.copy_(layer(batch, position_ids=positions, position_embeddings=rotary))
    return seen


def _keeper(inputs: Inputs, num_tokens: int) -> Callable[..., None]:
    def keep(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        x = arguments[0].flatten(0, 1)  # [tokens of the batch, in]
        inputs.gram.addmm_(x.T, x, alpha=1 / num_tokens)
        inputs.magnitude.add_(x.abs().sum(0), alpha=1 / num_tokens)

    return keep


@torch.no_grad()
def scale_layer(
    config: LlamaConfig, weights: dict[str, torch.Tensor], seen: dict[str, Inputs], group_size: int
) -> None:
    """Searches the scales of one decoder layer and folds them in; the layer computes what it did before.

    Args:
        config (`LlamaConfig`): of the model.
        weights (`dict[str, torch.Tensor]`): of the layer; changed in place.
        seen (`dict[str, Inputs]`): of [`observe_layer`]; made those of the scaled layer.
        group_size (`int`): of the rounding.
    """
    for fold in folds(config):
        inputs = seen[fold.producer]
        scales = _search_scales(fold, [weights[name] for name in fold.consumers], inputs, group_size)
        spread = fold.spread(scales)
        for name in fold.consumers:
            weights[name] *= spread
        producer = weights[fold.producer]
        producer /= scales if producer.ndim == 1 else scales[:, None]
        inputs.gram /= torch.outer(spread, spread)


def _search_scales(fold: Fold, weights: Sequence[torch.Tensor], inputs: Inputs, group_size: int) -> torch.Tensor:
    """The best of the grid, `[producer channels]`; the first among equals, so that a dead input is left alone."""
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
    """Mean squared error of the output, summed over its channels."""
    rounded = dequantize_groups(*quantize_groups(weight * scales, group_size)).float()
    difference = rounded / scales - weight
    return ((difference @ gram) * difference).sum().item()


@torch.no_grad()
def clip_layer(
    config: LlamaConfig, weights: dict[str, torch.Tensor], seen: dict[str, Inputs], group_size: int
) -> None:
    """Cuts the largest weights of a group where the finer steps are worth it: the paper's second search.

    Each group of each output is judged alone, by its own share of the output. Queries and keys are clipped as well, which
    AutoAWQ does not do: of four trained models, SmolLM2 among them, it brought every one nearer to what it was.

    Args:
        config (`LlamaConfig`): of the model.
        weights (`dict[str, torch.Tensor]`): of the layer after [`scale_layer`]; changed in place.
        seen (`dict[str, Inputs]`): of the scaled layer.
        group_size (`int`): of the rounding.
    """
    for fold in folds(config):
        rows = seen[fold.producer].gram.split(group_size)
        blocks = torch.stack([row.split(group_size, 1)[i] for i, row in enumerate(rows)])
        for name in fold.consumers:
            weights[name].copy_(_clipped(weights[name], blocks))


def _clipped(weight: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """`weight` `[out, in]` with each group at its best limit; `blocks` `[groups, group_size, group_size]` of G."""
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
