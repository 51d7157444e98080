"""Writes and reads W4A16: 4-bit weights in vLLM's own format, compressed-tensors "pack-quantized".

The library packs, describes and dequantizes them. Written are zero points, which vLLM reads on CPUs and GPUs: without
them (the library's preset W4A16) SmolLM2's perplexity rises further, see benchmarks/README.md.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...errors import InputError, damaged, refuse_damage, require
from ..checkpoint import Checkpoint, LazyTensor, require_values
from ..writing import Spec
from .four_bit import LINEAR, OUTPUTS, FourBitLayout, write_four_bit
from .rounding import BITS


GROUP_SIZES = (128, 64)  # the first that divides all widths
_FORMAT = "pack-quantized"
_PACKED, _SCALE, _SHAPE, _ZEROS = "weight_packed", "weight_scale", "weight_shape", "weight_zero_point"
_MIDDLE = 2 ** (BITS - 1)  # the library's integers are signed


def is_compressed(quantization: Any) -> bool:
    """Whether a `quantization_config` is that of compressed-tensors."""
    return isinstance(quantization, dict) and quantization.get("quant_method") == "compressed-tensors"


def write_w4a16(
    checkpoint: Checkpoint, folder: Path, calibration: Sequence[str] | None, max_shard_size: int
) -> tuple[str, dict[str, str]]:
    """Writes weights and `config.json` in groups of 128 inputs, or 64 if 128 does not divide every width.

    Arguments, results and errors are those of [`write_four_bit`].
    """
    library = require("compressed_tensors", "w4a16", "--to w4a16")
    pack_to_int32 = library.compressors.pack_to_int32
    shapes = {name: lazy.shape for name, lazy in checkpoint.tensors.items() if name.endswith(LINEAR)}
    fitting = (size for size in GROUP_SIZES if all(width % size == 0 for _, width in shapes.values()))
    group_size = next(fitting, GROUP_SIZES[-1])  # a width that no size divides is refused with its name
    weights = {"num_bits": BITS, "type": "int", "symmetric": False, "strategy": "group", "group_size": group_size}
    scheme = {"targets": ["Linear"], "weights": weights, "format": _FORMAT}
    config = library.quantization.QuantizationConfig(
        config_groups={"group_0": scheme}, format=_FORMAT, quantization_status="compressed", ignore=["lm_head"]
    )

    def specs(rows: int, width: int) -> dict[str, Spec]:
        groups = width // group_size
        return {
            _PACKED: (torch.int32, (rows, width // OUTPUTS)),
            _SCALE: (torch.float16, (rows, groups)),
            _ZEROS: (torch.int32, (rows // OUTPUTS, groups)),
        }

    def pack(integers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> tuple[torch.Tensor, ...]:
        signed, signed_zeros = ((part.to(torch.int8) - _MIDDLE) for part in (integers, zeros))
        return pack_to_int32(signed, BITS), scales, pack_to_int32(signed_zeros, BITS, packed_dim=0)

    leading = {f"{name.removesuffix('weight')}{_SHAPE}": torch.tensor(shape) for name, shape in shapes.items()}
    # transformers loads the weights compressed otherwise, for which compressed-tensors 0.20 gets zero points wrong.
    described = config.model_dump(mode="json", exclude_none=True) | {"dequantize": True}
    layout = FourBitLayout("w4a16", group_size, described, specs, pack, leading)
    return write_four_bit(checkpoint, folder, calibration, max_shard_size, layout)


def read_scheme(quantization: Mapping[str, Any], where: str) -> Any:
    """Returns the library's `QuantizationScheme` of the linear layers.

    Raises:
        InputError: if the library is not installed, or the weights are not 4-bit integers in groups.
    """
    library = require("compressed_tensors", "w4a16", f"{where}: compressed-tensors")
    with refuse_damage(where):
        config = library.quantization.QuantizationConfig.model_validate(quantization)
    schemes = list(config.config_groups.values())
    if len(schemes) != 1 or schemes[0].weights is None:
        raise InputError(f"{where}: {len(schemes)} config_groups; w4a16 supports one, with weights")
    found = config.model_dump() | schemes[0].model_dump() | schemes[0].weights.model_dump() | {"format": config.format}
    required = {"format": _FORMAT, "num_bits": BITS, "type": "int", "strategy": "group", "dynamic": False}
    unused = dict.fromkeys(("kv_cache_scheme", "input_activations", "output_activations"))
    require_values(found, required | unused, where, "w4a16")
    return schemes[0]


def dequantize_w4a16(
    tensors: Mapping[str, LazyTensor], quantization: Mapping[str, Any], where: str
) -> dict[str, LazyTensor]:
    """Returns the tensors with a weight, in the dtype of its scales, in place of the packed parts.

    Raises:
        InputError: if the scheme is not supported, or the parts of a weight are inconsistent.
    """
    scheme = read_scheme(quantization, where)
    names = [_PACKED, _SCALE, _SHAPE, *([] if scheme.weights.symmetric else [_ZEROS])]
    modules = [name.removesuffix(_PACKED) for name in tensors if name.endswith(f".{_PACKED}")]
    parts = {module + name for module in modules for name in names}
    found = {name: tensor for name, tensor in tensors.items() if name not in parts}
    return found | {f"{module}weight": _weight(tensors, module, names, scheme) for module in modules}


def _weight(tensors: Mapping[str, LazyTensor], module: str, names: Sequence[str], scheme: Any) -> LazyTensor:
    packed = tensors[module + _PACKED]
    if missing := [module + name for name in names if module + name not in tensors]:
        raise damaged(packed.source, f"{missing[0]} is missing")
    parts = {name: tensors[module + name] for name in names}
    rows, columns = (*packed.shape, 0, 0)[:2]
    width, group_size = columns * OUTPUTS, scheme.weights.group_size
    groups = width // group_size
    fitting = {_PACKED: (rows, columns), _SCALE: (rows, groups), _SHAPE: (2,), _ZEROS: (-(-rows // OUTPUTS), groups)}
    fits = groups > 0 and width % group_size == 0 and all(part.shape == fitting[name] for name, part in parts.items())
    fits = fits and all(parts[name].dtype == torch.int32 for name in names if name in (_PACKED, _ZEROS))
    if not fits or parts[_SHAPE].read().tolist() != [rows, width]:
        shapes = {name: list(part.shape) for name, part in parts.items()}
        raise damaged(packed.source, f"the parts {shapes} are inconsistent for group_size {group_size}")

    def read() -> torch.Tensor:
        state = {name: part.read() for name, part in parts.items()}
        library = require("compressed_tensors", "w4a16", packed.source)
        return library.compressors.PackedQuantizationCompressor.decompress(state, scheme)["weight"]

    return LazyTensor((rows, width), parts[_SCALE].dtype, read, packed.source)
