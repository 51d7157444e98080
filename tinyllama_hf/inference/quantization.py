"""Models in 8 and 4 bit through bitsandbytes, for inference.

On a CPU with AVX512_BF16, bitsandbytes (0.50.2) repacks 4-bit weights at the first forward pass in evaluation mode. From
then on a save writes corrupt weights (slightly other ones if the scales are quantised too), `dequantize()` and PEFT's
merging return noise, and no gradient passes: all without an error. That fast path is kept, and what it would break is
refused on every machine: a quantised model is neither saved, nor read out, nor moved, nor trained.
tests/inference/test_quantization.py shows the library's behaviour.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration_tinyllama import TinyLlamaConfig
from ..errors import InputError, did_you_mean, require
from ..modeling_tinyllama import TinyLlamaForCausalLM
from ..progress import quiet_bitsandbytes


QUANTIZATIONS = ("none", "int8", "nf4")
_FIXES = {
    "trained": "fine-tune the unquantised model (recipes/sft/lora.yaml needs little memory)",
    "read out": "take the weights of the unquantised model",
    "saved": "keep the unquantised folder, and quantise when loading",
    "copied": "load it again",
    "moved": "load it with device=...",
}


def _refuse(what: str) -> NoReturn:
    raise InputError(f"a quantised model is for inference and cannot be {what}: {_FIXES[what]}")


class _WithoutGradient(torch.autograd.Function):
    """Calls a layer, and refuses to take a gradient back through it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        return layer(x.detach())

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> NoReturn:
        _refuse("trained")


class SealedLinear(nn.Module):
    """A quantised layer that computes, and refuses what would take its weights for what they were before repacking.

    The library's layer is no submodule, so that nothing else finds it: neither a loop over modules that dequantises, nor
    PEFT, which would wrap it and merge into it.

    Args:
        layer (`torch.nn.Module`): `Linear4bit` or `Linear8bitLt` of bitsandbytes.
    """

    def __init__(self, layer: nn.Module):
        super().__init__()
        self._layer = (layer.eval(),)  # in a tuple, which torch does not register

    @property
    def layer(self) -> nn.Module:
        """The library's layer; its weights may be repacked."""
        return self._layer[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]`; a backward pass through it is refused."""
        # Not by freezing the other weights: without gradients of its own the head copies its weight at each prompt
        # (torch 2.13 multiplies a slice of the hidden states by bmm then).
        return _WithoutGradient.apply(x, self.layer) if x.requires_grad else self.layer(x)

    def train(self, mode: bool = True):
        """Refuses training mode; `eval()` works as ever."""
        if mode:
            _refuse("trained")
        return super().train(mode)

    def extra_repr(self) -> str:
        """Shows the layer in the model's `repr`."""
        return repr(self.layer)

    def _save_to_state_dict(self, *_: Any) -> None:
        _refuse("read out")

    def __getstate__(self) -> NoReturn:
        _refuse("copied")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True):
        device = self.layer.weight.device
        if fn(torch.empty(0, device=device)).device != device:
            _refuse("moved")
        return super()._apply(fn, recurse)


class QuantizedTinyLlama(TinyLlamaForCausalLM):
    """A `TinyLlamaForCausalLM` with int8 or nf4 weights, which generates."""

    def seal(self) -> None:
        """Seals the quantised layers once they are loaded."""
        from bitsandbytes.nn import Linear4bit, Linear8bitLt

        for name, module in list(self.named_modules()):
            if isinstance(module, Linear4bit) and (module.out_features % 32 or module.in_features % 64):
                module.support_avx512bf16_for_cpu = False  # repacking fails on such a shape (0.50.2)
            if isinstance(module, (Linear4bit, Linear8bitLt)):
                self.set_submodule(name, SealedLinear(module))
        self.eval()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True):
        # Before any part of the model has moved, which the layers alone would notice too late.
        sealed = any(isinstance(module, SealedLinear) for module in self.modules())
        if sealed and fn(torch.empty(0, device=self.device)).device != self.device:
            _refuse("moved")
        return super()._apply(fn, recurse)

    def flops_per_token(self, seq_len: int | None = None, convention: str = "without_input_embedding") -> int:
        """Refuses: it is about training, and the sealed weights are not among the parameters that it counts."""
        _refuse("trained")

    def train(self, mode: bool = True):
        """Refuses training mode before any part of the model has changed."""
        if mode:
            _refuse("trained")
        return super().train(mode)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refuses before anything is written, or made on a Hub."""
        _refuse("saved")

    save_as_llama = push_to_hub = save_pretrained

    def dequantize(self, *args: Any, **kwargs: Any) -> None:
        """Refuses: the library would find no layer to dequantise, and say nothing."""
        _refuse("read out")

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the weights, sealed ones and buffers included; see [`footprint`]."""
        return footprint(self).weights


class Footprint(NamedTuple):
    """Bytes of weights in memory, and of the same model without quantisation."""

    weights: int
    unquantized: int


def check_quantization(quantization: str) -> None:
    """Refuses an unknown kind, and one whose backend is missing.

    Raises:
        InputError: naming the valid kinds, or the package to install.
    """
    if quantization not in QUANTIZATIONS:
        raise InputError(
            f"quantization {quantization!r}: there is none of this name{did_you_mean(quantization, QUANTIZATIONS)}"
        )
    if quantization != "none":
        quiet_bitsandbytes()
        require("bitsandbytes", "quantization", f"quantization {quantization}")


def quantization_config(quantization: str, device: str) -> Any:
    """The library's configuration of a kind: int8, or nf4 with quantised scales (double quantisation)."""
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_compute_dtype(device),
    )


def _compute_dtype(device: str) -> torch.dtype:
    """The fastest type here for products with dequantised weights; bf16 is slow where the hardware only emulates it."""
    from bitsandbytes.functional import has_avx512bf16

    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if has_avx512bf16() else torch.float32


def footprint(model: PreTrainedModel) -> Footprint:
    """Measures the memory of a model's weights: parameters, buffers, and the scales beside quantised ones."""
    sealed = [module.layer for module in model.modules() if isinstance(module, SealedLinear)]
    found = [tensor for module in (model, *sealed) for tensor in (*module.parameters(), *module.buffers())]
    found += [tensor for layer in sealed for tensor in _scales(layer.weight)]
    tensors = {id(tensor): tensor for tensor in found}
    with torch.device("meta"):
        plain = TinyLlamaForCausalLM(TinyLlamaConfig.from_llama(model.config))
    size = model.dtype.itemsize
    unquantized = sum(p.numel() * size for p in plain.parameters()) + sum(b.nbytes for b in plain.buffers())
    return Footprint(sum(tensor.nbytes for tensor in tensors.values()), unquantized)


def footprint_line(model: PreTrainedModel, quantization: str) -> str:
    """The measured memory as a line for the user: `nf4: 95.2 MB of weights (269.0 MB in bfloat16)`."""
    measured = footprint(model)
    dtype = str(model.dtype).removeprefix("torch.")
    return (
        f"{quantization}: {measured.weights / 1e6:.1f} MB of weights ({measured.unquantized / 1e6:.1f} MB in {dtype})"
    )


def _scales(parameter: nn.Parameter) -> list[torch.Tensor]:
    """What bitsandbytes keeps beside a quantised weight: row scales of int8; block scales of nf4, and their scales."""
    found = [getattr(parameter, "SCB", None)]
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        found += [state.absmax, state.code, getattr(state, "offset", None)]
        state = getattr(state, "state2", None)
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]
