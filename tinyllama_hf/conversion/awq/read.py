"""Reads AWQ's "gemm" layout as the weights that its readers compute with."""

from collections.abc import Mapping
from typing import Any

import torch

from ...errors import damaged
from ..checkpoint import LazyTensor, require_values
from .packing import BITS, PER_WORD, dequantize_groups, unpack


_WORDS, _ZEROS, _SCALES = ".qweight", ".qzeros", ".scales"


def is_awq(quantization: Any) -> bool:
    """Whether a `quantization_config` says that the weights are AWQ's."""
    return isinstance(quantization, dict) and quantization.get("quant_method") == "awq"


def dequantized(
    tensors: Mapping[str, LazyTensor], quantization: Mapping[str, Any], where: str
) -> dict[str, LazyTensor]:
    """The tensors with a float16 weight in place of each triple of words, zeros and scales.

    Raises:
        InputError: for another number of bits or version, and for a triple that does not fit together.
    """
    require_values(quantization, {"bits": BITS, "zero_point": True, "version": "gemm"}, where, "AWQ")
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith((_WORDS, _ZEROS, _SCALES))}
    for name in tensors:
        if name.endswith(_WORDS):
            module = name.removesuffix(_WORDS)
            found[f"{module}.weight"] = _weight(tensors, module, quantization.get("group_size"))
    return found


def _weight(tensors: Mapping[str, LazyTensor], module: str, group_size: Any) -> LazyTensor:
    words, zeros, scales = (tensors.get(module + part) for part in (_WORDS, _ZEROS, _SCALES))
    source = tensors[module + _WORDS].source
    if zeros is None or scales is None:
        raise damaged(source, f"{module} lacks its {'scales' if scales is None else 'qzeros'}")
    width, columns = (*words.shape, 0, 0)[:2]  # [in, out / 8]
    divides = isinstance(group_size, int) and group_size > 0 and width % group_size == 0
    groups = width // group_size if divides else 0
    shapes, kinds = (words.shape, zeros.shape, scales.shape), (words.dtype, zeros.dtype, scales.dtype)
    fitting = ((width, columns), (groups, columns), (groups, columns * PER_WORD))
    if not groups or shapes != fitting or kinds != (torch.int32, torch.int32, torch.float16):
        raise damaged(
            source,
            f"words, zeros and scales are {[list(shape) for shape in shapes]} in groups of {group_size!r}, which do not fit "
            "together",
        )

    def read() -> torch.Tensor:
        integers, zero_points = unpack(words.read()).T, unpack(zeros.read()).T
        return dequantize_groups(integers, scales.read().T, zero_points).contiguous()

    return LazyTensor((columns * PER_WORD, width), torch.float16, read, source)
