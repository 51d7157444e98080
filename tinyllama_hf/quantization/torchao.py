"""int4 and fp8 weights through torchao, for NVIDIA GPUs: their configuration, their checks and their sizes.

For generation and evaluation only: the products of torchao (0.18) with these weights have no derivative.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration_tinyllama import TinyLlamaConfig
from ..errors import InputError, require
from ..progress import quiet_torchao
from .names import GPU_CAPABILITIES, unsupported_device


# Group sizes that the int4 kernel supports. Larger ones have fewer scales. 256 is read, but not chosen.
_GROUP_SIZES = (128, 64, 32)
# The fields of a saved configuration that determine layout and kernel.
_PER_ROW = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
_SAVED: dict[str, tuple[str, dict[str, Any]]] = {
    "Int4WeightOnlyConfig": ("int4", {"int4_packing_format": "tile_packed_to_4d", "int4_tile_packed_ntile": 8}),
    "Float8DynamicActivationFloat8WeightConfig": (
        "fp8",
        {"packing_format": {"_type": "Float8PackingFormat", "_data": "PLAIN"}, "granularity": [_PER_ROW, _PER_ROW]},
    ),
}


def check_torchao(quantization: str, device: str = "auto") -> None:
    """Checks that a device has the kernels of `"int4"` or `"fp8"`, and that torchao is installed.

    Raises:
        InputError: naming the device and what to use, or the package to install.
    """
    _check_device(quantization, device)
    quiet_torchao()
    require("torchao", "quantization-gpu", f"quantization {quantization}")


def _check_device(quantization: str, device: str) -> None:
    if device == "cpu" or not torch.cuda.is_available():
        raise unsupported_device(quantization, "a CPU")
    capability = torch.cuda.get_device_capability(None if device == "auto" else device)
    if torch.version.cuda is None or capability < GPU_CAPABILITIES[quantization]:
        name = torch.cuda.get_device_name(None if device == "auto" else device)
        raise unsupported_device(quantization, f"{name} ({capability[0]}.{capability[1]})")


def check_layers(quantization: str, config: TinyLlamaConfig, dtype: torch.dtype | None) -> None:
    """Checks that the kernels of `"int4"` or `"fp8"` support the dtype and the layers of a model.

    torchao would leave layers of other widths unquantized, without an error.

    Args:
        quantization (`str`): `"int4"` or `"fp8"`.
        config (`TinyLlamaConfig`): the architecture; of weights that were saved quantized, only the dtype is checked.
        dtype (`torch.dtype`, *optional*): of the weights, `None` if `config.json` has none.

    Raises:
        InputError: naming the dtype or the width.
    """
    if dtype != torch.bfloat16:
        found = "an unknown dtype" if dtype is None else str(dtype).removeprefix("torch.")
        raise InputError(f"--quantization {quantization}: needs weights in bf16, not in {found}. Add --dtype bf16")
    if getattr(config, "quantization_config", None):
        return
    inputs = _input_widths(config)
    widths = inputs if quantization == "int4" else inputs | {"key/value width": _key_value_width(config)}
    multiple = _GROUP_SIZES[-1] if quantization == "int4" else 16
    for name, width in widths.items():
        if width % multiple:
            raise InputError(
                f"--quantization {quantization}: {name} {width} is not a multiple of {multiple}, as the kernel "
                "requires. Use nf4 or int8"
            )


def _input_widths(config: TinyLlamaConfig) -> dict[str, int]:
    """Returns the numbers of columns of the quantized weights; all are numbers of rows as well."""
    heads = config.num_attention_heads * _head_dim(config)
    return {"hidden_size": config.hidden_size, "attention width": heads, "intermediate_size": config.intermediate_size}


def _key_value_width(config: TinyLlamaConfig) -> int:
    return (config.num_key_value_heads or config.num_attention_heads) * _head_dim(config)


def _head_dim(config: TinyLlamaConfig) -> int:
    return config.head_dim or config.hidden_size // config.num_attention_heads


def torchao_config(quantization: str, config: TinyLlamaConfig) -> Any:
    """Returns the configuration that transformers takes for `"int4"` or `"fp8"`."""
    import torchao.quantization as library  # type: ignore[import-untyped]  # it has no type information
    from transformers import TorchAoConfig

    kept = {"set_inductor_config": False}  # else it changes settings of torch.compile for the whole process
    if quantization == "fp8":
        return TorchAoConfig(library.Float8DynamicActivationFloat8WeightConfig(granularity=library.PerRow(), **kept))
    # The default packing needs another package, mslk.
    packing = {"group_size": group_size(config), "int4_packing_format": "tile_packed_to_4d"}
    return TorchAoConfig(library.Int4WeightOnlyConfig(**packing, **kept))


def group_size(config: TinyLlamaConfig) -> int:
    """Returns the number of int4 weights that share a scale: as saved, else the largest that fits all layers."""
    if saved := getattr(config, "quantization_config", None):
        return saved["quant_type"]["default"]["_data"]["group_size"]
    return next(size for size in _GROUP_SIZES if not any(width % size for width in _input_widths(config).values()))


def saved_torchao(configuration: Mapping[str, Any]) -> tuple[str | None, str]:
    """Returns the quantization of a saved `quantization_config` of torchao, `None` if it is another; and its type."""
    try:
        chosen = configuration["quant_type"]["default"]
        name, data = chosen["_type"], chosen["_data"]
        quantization, fields = _SAVED.get(name, (None, {}))
        if configuration.get("modules_to_not_convert") or configuration.get("include_input_output_embeddings"):
            return None, f"{name} with a choice of layers"
        if any(data.get(key) != value for key, value in fields.items()):
            return None, f"{name} with another layout"
        if quantization == "int4" and data["group_size"] not in (256, *_GROUP_SIZES):
            return None, f"{name} in groups of {data['group_size']}"
        return quantization, name
    except (KeyError, TypeError, AttributeError):
        return None, "an unknown type"


def stored_bytes(quantization: str, shape: Sequence[int], group: int | None) -> int:
    """Returns the bytes that torchao stores for a weight.

    Args:
        quantization (`str`): `"int4"` or `"fp8"`.
        shape (`Sequence[int]`): `[out_features, in_features]`.
        group (`int`, *optional*): number of int4 weights that share a scale.
    """
    rows, columns = shape
    if quantization == "fp8":
        return rows * columns + 4 * rows  # an fp32 scale per row
    assert group is not None
    weights = 8 * math.ceil(rows / 8) * 1024 * math.ceil(columns / 1024)  # padded to tiles of the kernel
    return weights // 2 + 4 * weights // group  # bf16 scale and zero point per group


def stored_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yields the tensors that hold the data of a tensor: values and scales of a torchao weight, else the tensor."""
    if flatten := getattr(tensor, "__tensor_flatten__", None):
        yield from (getattr(tensor, name) for name in flatten()[0])
    else:
        yield tensor


def check_stored(model: PreTrainedModel, where: str) -> None:
    """Checks that values and scales of a model that was just loaded have the right sizes.

    Args:
        where (`str`): name of the model's folder, for the error message.

    Raises:
        InputError: naming the first layer in which they do not match.
    """
    quantizer: Any = model.hf_quantizer
    kind = quantizer.quantization_config.quant_type
    quantization, group = _SAVED[type(kind).__name__][0], getattr(kind, "group_size", None)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer is not model.get_output_embeddings():
            shape = (layer.out_features, layer.in_features)
            stored = sum(tensor.nbytes for tensor in stored_tensors(layer.weight))
            if layer.weight.shape != shape or stored != stored_bytes(quantization, shape, group):
                raise InputError(f"model {where}: weights and scales of {name} do not match; download it again")
