"""8-bit and 4-bit weights through bitsandbytes: their configuration, their checks after loading, and their scales.

`repacking` works around the library's errors on some CPUs.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import InputError


FOUR_BIT = ("nf4", "fp4")  # fp4 only if a folder was saved with it


def quantization_config(quantization: str, device: str, double_quantization: bool, compute_dtype: Any) -> Any:
    """Returns the configuration that transformers takes for a quantization.

    Args:
        quantization (`str`): `"int8"` or `"nf4"`.
        device (`str`): where the model will run; it determines the fastest dtype.
        double_quantization (`bool`): also quantize the scales of nf4.
        compute_dtype (`torch.dtype` or `"auto"`): dtype of the products with dequantized nf4 weights.
    """
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=double_quantization,
        bnb_4bit_compute_dtype=_fastest_dtype(device) if compute_dtype == "auto" else compute_dtype,
    )


def _fastest_dtype(device: str) -> torch.dtype:
    """Returns the fastest dtype for products with dequantized weights; bf16 is slow where it is only emulated."""
    from bitsandbytes.functional import has_avx512bf16

    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if has_avx512bf16() else torch.float32


def make_safe(model: PreTrainedModel, where: str) -> None:
    """Makes the forward passes, saves and copies of a model that was just loaded exact (see `repacking`).

    A second call does nothing.

    Args:
        where (`str`): name of the model's folder, for the error message.

    Raises:
        InputError: naming the first layer in which weights and scales do not match.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    from .repacking import make_reversible

    # The kernels would read beyond the end of a tensor that is too short.
    for name, layer in model.named_modules():
        sound = True
        if isinstance(layer, Linear4bit):
            sound = _is_sound_4bit(layer)
        elif isinstance(layer, Linear8bitLt):
            scales = getattr(layer.weight, "SCB", None)
            shape = (layer.out_features, layer.in_features)
            sound = scales is not None and scales.numel() == layer.out_features
            sound = sound and layer.weight.shape == shape and layer.weight.dtype == torch.int8
        if not sound:
            raise InputError(f"model {where}: weights and scales of {name} do not match; download it again")
    make_reversible(model)


def _is_sound_4bit(layer: Any) -> bool:
    state, weights = getattr(layer.weight, "quant_state", None), layer.out_features * layer.in_features
    if state is None or state.shape != (layer.out_features, layer.in_features) or not state.blocksize:
        return False
    scales, sound = state.absmax.numel(), layer.weight.nbytes == -(-weights // 2) and state.code.numel() == 16
    if state.nested:
        inner = state.state2
        sound = sound and inner.code.numel() == 256 and inner.absmax.numel() == -(-scales // inner.blocksize)
    kind = torch.uint8 if state.nested else torch.float32
    return sound and scales == -(-weights // state.blocksize) and state.absmax.dtype == kind


def scale_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Returns the tensors that bitsandbytes stores with a quantized weight.

    These are the row scales of int8, and the block scales of 4-bit weights with the scales of these scales.
    """
    weight = module._parameters.get("weight", module)
    found = [vars(weight).get("SCB"), getattr(vars(module).get("state"), "SCB", None)]
    # Not through `weight.quant_state`: reading that property undoes the repacking.
    for state in (vars(weight).get("quant_state"), getattr(weight, "packed_state", None)):
        while state is not None:
            found += [state.absmax, state.code, state.offset]
            state = state.state2 if state.nested else None
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]
