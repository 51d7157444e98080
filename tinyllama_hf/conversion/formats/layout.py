"""Translation between a layout and `LlamaForCausalLM`: tensor names, and the row order of q and k.

In Hugging Face and lit-gpt, the first half of a head's rows is rotated with the second half. In Meta's, llama2.c's and
GGUF files, each even row is rotated with the next row.
"""

import re
from collections.abc import Mapping
from functools import partial

import torch
from transformers import LlamaConfig

from ...errors import InputError
from ..checkpoint import LazyTensor


class NameMap:
    """The tensor names of one layout.

    Args:
        block (`str`): pattern of the names in a layer, with `{layer}` for its number and `{part}` for a key of
            `inside`.
        inside (`Mapping[str, str]`): maps parts of a layer to names after `model.layers.N.`.
        outer (`Mapping[str, str]`): maps the names of the other tensors.
    """

    def __init__(self, block: str, inside: Mapping[str, str], outer: Mapping[str, str]):
        self.block, self.inside, self.outer = block, inside, outer
        # No leading zeros, so that a layer has only one name.
        number, part = "(0|[1-9][0-9]{0,4})", "([a-z0-9_.]+)"
        self._pattern = re.compile(re.escape(block).replace(r"\{layer\}", number).replace(r"\{part\}", part))
        self._parts = {name: part for part, name in inside.items()}
        self._outer = {name: theirs for theirs, name in outer.items()}

    def layer_and_part(self, name: str) -> tuple[int, str]:
        """Splits a name of the layout; the part is empty for a tensor outside the layers."""
        match = self._pattern.fullmatch(name)
        return (int(match[1]), match[2]) if match else (0, "")

    def from_llama(self, name: str) -> str:
        """Returns the layout's name for a tensor of `LlamaForCausalLM`."""
        if name in self._outer:
            return self._outer[name]
        _, _, layer, inside = name.split(".", 3)
        return self.block.format(layer=layer, part=self._parts[inside])

    def renamed(self, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """Returns the tensors under the names of `LlamaForCausalLM`; unknown names are kept.

        Raises:
            InputError: if two tensors get the same name.
        """
        found: dict[str, LazyTensor] = {}
        for name, tensor in tensors.items():
            layer, part = self.layer_and_part(name)
            is_inside = part in self.inside
            llama = f"model.layers.{layer}.{self.inside[part]}" if is_inside else self.outer.get(name, name)
            if llama in found:
                raise InputError(f"{tensor.source}: also stored as {found[llama].source}. Remove one of them")
            found[llama] = tensor
        return found

    def from_pairwise(self, tensors: Mapping[str, LazyTensor], config: LlamaConfig) -> dict[str, LazyTensor]:
        """Returns the tensors of a layout with Meta's row order like [`renamed`], and in Hugging Face's order."""
        found = self.renamed(tensors)
        for name, tensor in found.items():
            if heads := rotated_heads(config, name):
                found[name] = tensor.map(partial(to_half_split, heads=heads))
        return found


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
