"""Translation of tensor names between a layout and `LlamaForCausalLM`."""

import re
from collections.abc import Mapping

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

    def layer_and_part(self, name: str) -> tuple[int, str] | None:
        """Splits a name of the layout; returns `None` for a tensor outside the layers."""
        match = self._pattern.fullmatch(name)
        return (int(match[1]), match[2]) if match else None

    def to_llama(self, name: str) -> str:
        """Returns the name in `LlamaForCausalLM`, or an unknown name unchanged."""
        layer, part = self.layer_and_part(name) or (0, "")
        return f"model.layers.{layer}.{self.inside[part]}" if part in self.inside else self.outer.get(name, name)

    def from_llama(self, name: str) -> str:
        """Returns the layout's name for a tensor of `LlamaForCausalLM`."""
        if name in self._outer:
            return self._outer[name]
        _, _, layer, inside = name.split(".", 3)
        return self.block.format(layer=layer, part=self._parts[inside])

    def renamed(self, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
        """Returns the tensors under the names of `LlamaForCausalLM`.

        Raises:
            InputError: if two tensors get the same name.
        """
        found: dict[str, LazyTensor] = {}
        for name, tensor in tensors.items():
            llama = self.to_llama(name)
            if llama in found:
                raise InputError(f"{tensor.source}: also stored as {found[llama].source}. Remove one of them")
            found[llama] = tensor
        return found
