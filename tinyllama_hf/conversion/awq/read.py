"""Reads AWQ's "gemm" layout and dequantizes it."""

from collections.abc import Mapping
from typing import Any

import torch

from ...errors import damaged
from ..checkpoint import LazyTensor, require_values
from ..quantized.rounding import BITS, dequantize_groups
from .packing import PER_WORD, unpack


_WORDS, _ZEROS, _SCALES = ".qweight", ".qzeros", ".scales"


def is_awq(quantization: Any) -> bool:
    """Whether a `quantization_config` is AWQ's."""
    return isinstance(quantization, dict) and quantization.get("quant_method") == "awq"


def dequantize_awq(
    tensors: Mapping[str, LazyTensor], quantization: Mapping[str, Any], where: str
) -> dict[str, LazyTensor]:
    """Returns the tensors with a float16 weight in place of each triple of `qweight`, `qzeros` and `scales`.

    Raises:
        InputError: if the number of bits or the version is not supported, or a triple is inconsistent.
    """
    require_values(quantization, {"bits": BITS, "zero_point": True, "version": "gemm"}, where, "AWQ")
    found = {name: tensor for name, tensor in tensors.items() if not name.endswith((_WORDS, _ZEROS, _SCALES))}
    for name in tensors:
        if name.endswith(_WORDS):
            module = name.removesuffix(_WORDS)
            found[f"{module}.weight"] = _weight(tensors, module, quantization.get("group_size"))
    return found


def _weight(tensors: Mapping[str, LazyTensor], module: str, group_size: Any) -> LazyTensor:
    words, zeros, scales = tensors[module + _WORDS], tensors.get(module + _ZEROS), tensors.get(module + _SCALES)
    source = words.source
    if zeros is None or scales is None:
        raise damaged(source, f"{module}.{'scales' if scales is None else 'qzeros'} is missing")
    width, columns = (*words.shape, 0, 0)[:2]  # [in, out / 8]
    divides = isinstance(group_size, int) and group_size > 0 and width % group_size == 0
    groups = width // group_size if divides else 0
    shapes, kinds = (words.shape, zeros.shape, scales.shape), (words.dtype, zeros.dtype, scales.dtype)
    fitting = ((width, columns), (groups, columns), (groups, columns * PER_WORD))
    if not groups or shapes != fitting or kinds != (torch.int32, torch.int32, torch.float16):
        found = f"qweight, qzeros and scales have the shapes {[list(shape) for shape in shapes]}"
        raise damaged(source, f"{found}, which are inconsistent for group_size {group_size!r}")

    def read() -> torch.Tensor:
        integers, zero_points = unpack(words.read()).T, unpack(zeros.read()).T
        return dequantize_groups(integers, scales.read().T, zero_points).contiguous()

    return LazyTensor((columns * PER_WORD, width), torch.float16, read, source)
