"""Models in 8 and 4 bit through bitsandbytes: made while loading, saved and loaded again, with adapters on top.

What the library does wrong on some CPUs is dealt with in `repacking`.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration_tinyllama import TinyLlamaConfig
from ..errors import InputError, did_you_mean, require
from ..files import new_files
from ..modeling_tinyllama import TinyLlamaForCausalLM
from ..progress import quiet_bitsandbytes


QUANTIZATIONS = ("none", "int8", "nf4")
_FOUR_BIT = ("nf4", "fp4")  # fp4 only where a folder was saved so
_COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class QuantizedTinyLlama(TinyLlamaForCausalLM):
    """A `TinyLlamaForCausalLM` with int8 or 4-bit weights, which generates, and is saved as it is."""

    _takes_quantized_weights = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any):
        """As `TinyLlamaForCausalLM.from_pretrained`, for `quantization_config=...` and folders that were saved quantised.

        Raises:
            InputError: if weights and scales in the folder do not belong together.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        make_safe(loaded[0] if isinstance(loaded, tuple) else loaded, str(pretrained_model_name_or_path))
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Writes a plain Llama folder with quantised weights, or the adapter if there is one; arguments as in transformers.

        Every file is written under a temporary name and renamed, `config.json` last. Other files there stay.
        """
        folder = Path(save_directory).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", folder.name)  # the library takes the name of the folder that it writes to
        with new_files(folder, last="config.json") as temporary:
            super().save_pretrained(temporary, *args, **kwargs)
            names = {file.name for file in temporary.iterdir()}
        if "config.json" in names and not kwargs.get("variant"):  # the model's weights, and no adapter
            _remove_other_weights(folder, names)

    save_as_llama = save_pretrained

    def flops_per_token(self, seq_len: int | None = None, convention: str = "without_input_embedding") -> int:
        """As `TinyLlamaForCausalLM.flops_per_token`; two 4-bit weights are one element of their parameter."""
        return _unquantized(self).flops_per_token(seq_len, convention)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the weights, scales, adapter and buffers; see [`footprint`]."""
        return footprint(self).weights

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True):
        # bitsandbytes (0.50.2) leaves the scales behind where a whole model in int8 moves after a pass.
        if getattr(self, "is_loaded_in_8bit", False) and fn(torch.empty(0, device=self.device)).device != self.device:
            raise InputError("a model in int8 cannot be moved: load it with device=...")
        return super()._apply(fn, recurse)


def _remove_other_weights(folder: Path, written: set[str]) -> None:
    """Removes weights of an earlier save, which readers that take every file of weights would mix with the new ones."""
    for pattern in ("model.safetensors*", "model-*-of-*.safetensors"):
        for file in folder.glob(pattern):
            if file.name not in written:
                file.unlink()


def chosen_quantization(asked: str, saved: str, where: str) -> str:
    """The quantisation that a model is used with: the one its weights were saved with, or the one that is asked for.

    Args:
        asked (`str`): one of `QUANTIZATIONS`; `"none"` leaves weights as they were saved.
        saved (`str`): that of the weights, see [`quantization_of`].
        where (`str`): name of the model, for the message.

    Raises:
        InputError: if there is none of this name, or the weights have another already.
    """
    check_name(asked)
    if saved != "none" and asked not in ("none", saved):
        raise InputError(
            f"--quantization {asked!r}: the weights of {where} are {saved} already; leave it out, or give the unquantised model"
        )
    return asked if saved == "none" else saved


def check_name(quantization: str) -> None:
    """Refuses a quantisation that there is not; needs no bitsandbytes.

    Raises:
        InputError: with the nearest name.
    """
    if quantization == "fp4":
        raise InputError(
            "--quantization 'fp4': is no longer a choice; use 'nf4', which has the same size and a smaller error. Folders "
            "saved as fp4 load without the option"
        )
    if quantization not in QUANTIZATIONS:
        raise InputError(
            f"--quantization {quantization!r}: there is none of this name{did_you_mean(quantization, QUANTIZATIONS)}"
        )


def check_quantization(quantization: str, double_quantization: bool = True, compute_dtype: Any = "auto") -> None:
    """Refuses options that a kind has not, and one whose backend is missing; see [`check_name`] for names.

    Raises:
        InputError: naming the option, or the package to install.
    """
    if compute_dtype != "auto" and compute_dtype not in _COMPUTE_DTYPES:
        raise InputError(f"compute_dtype {compute_dtype!r}: use 'auto', {', '.join(map(str, _COMPUTE_DTYPES))}")
    if quantization not in _FOUR_BIT:
        given = {"double_quantization": (double_quantization, True), "compute_dtype": (compute_dtype, "auto")}
        for name, (value, default) in given.items():
            if value != default:
                raise InputError(f"{name}={value}: is for nf4; with quantization {quantization} leave it out")
    if quantization != "none":
        quiet_bitsandbytes()
        require("bitsandbytes", "quantization", f"quantization {quantization}")


def quantization_config(quantization: str, device: str, double_quantization: bool, compute_dtype: Any) -> Any:
    """The library's configuration of a kind.

    Args:
        quantization (`str`): `"int8"` or `"nf4"`.
        device (`str`): where the model will run, which decides the fastest type.
        double_quantization (`bool`): quantise the scales of nf4 too.
        compute_dtype (`torch.dtype` or `"auto"`): of products with dequantised weights of nf4.
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
    """The fastest type here for products with dequantised weights; bf16 is slow where the hardware only emulates it."""
    from bitsandbytes.functional import has_avx512bf16

    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if has_avx512bf16() else torch.float32


def quantization_of(fields: Mapping[str, Any], where: str) -> str:
    """The kind that the weights of a folder have.

    Args:
        fields (`Mapping`): of its `config.json`.
        where (`str`): its name, for the message.

    Raises:
        InputError: if they are quantised by other means than bitsandbytes, saying what reads them.
    """
    saved = fields.get("quantization_config")
    if saved is None:
        return "none"
    saved = saved if isinstance(saved, dict) else {}
    method = saved.get("quant_method", "bitsandbytes")  # older folders do not say
    kind = "int8" if saved.get("load_in_8bit") else saved.get("load_in_4bit") and saved.get("bnb_4bit_quant_type")
    if method == "bitsandbytes" and kind in ("int8", *_FOUR_BIT):
        return kind
    readers = {
        "awq": "vLLM reads it, and `tinyllama-hf convert FOLDER --to llama --output NEW` makes plain weights of it",
        "gptq": "vLLM reads it",
        "compressed-tensors": "vLLM reads it",
    }
    raise InputError(
        f"{where}: weights quantised by {method}, and not as int8, nf4 or fp4 of bitsandbytes; "
        + readers.get(method, "give the unquantised model, and quantise when loading")
    )


def make_safe(model: PreTrainedModel, where: str) -> None:
    """Makes passes, saves and copies of a model that was just loaded exact (see `repacking`); a second time does nothing.

    Args:
        where (`str`): name of the folder that it comes from, for the message.

    Raises:
        InputError: naming the first layer whose weights and scales do not belong together.
    """
    from .repacking import make_reversible

    check_layers(model, where)
    make_reversible(model)
    model._weight_conversions = []  # transformers (5.23) refuses to save again what it loaded quantised


def cast_plain(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts the parameters that are not quantised, in place."""
    for parameter in model.parameters():
        # Four-bit weights may be kept in containers of any type.
        if parameter.is_floating_point() and getattr(parameter, "quant_state", None) is None:
            parameter.data = parameter.data.to(dtype)


def check_layers(model: nn.Module, where: str) -> None:
    """Refuses quantised layers whose parts do not belong together: the kernels read as much as they should have.

    Args:
        where (`str`): name of the folder that they come from, for the message.

    Raises:
        InputError: naming the first such layer.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

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
            raise InputError(
                f"model {where}: weights and scales of {name} do not belong together; fetch or make it again"
            )


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


class Footprint(NamedTuple):
    """Bytes in memory: of all weights, of the same model without quantisation, and of the adapter, which both include."""

    weights: int
    unquantized: int
    adapter: int


def footprint(model: PreTrainedModel) -> Footprint:
    """Measures the memory of a model's weights: parameters, buffers, and the scales beside quantised ones."""
    tensors: dict[int, torch.Tensor] = {}
    for module in model.modules():
        found = (*module.parameters(recurse=False), *module.buffers(recurse=False), *_scales(module))
        tensors |= {id(tensor): tensor for tensor in found}
    size, plain, adapter = model.dtype.itemsize, _unquantized(model), _adapter_bytes(model)
    unquantized = sum(p.numel() * size for p in plain.parameters()) + sum(b.nbytes for b in plain.buffers())
    return Footprint(sum(tensor.nbytes for tensor in tensors.values()), unquantized + adapter, adapter)


def footprint_line(model: PreTrainedModel) -> str:
    """The measured memory as a line for the user: `nf4: 95.2 MB of weights (269.0 MB in bfloat16)`."""
    measured = footprint(model)
    kind = quantization_of(model.config.to_dict(), "model")
    adapter = f", {measured.adapter / 1e6:.1f} MB of them the adapter's" if measured.adapter else ""
    dtype = str(model.dtype).removeprefix("torch.")
    return (
        f"{kind}: {measured.weights / 1e6:.1f} MB of weights{adapter} ({measured.unquantized / 1e6:.1f} MB in {dtype})"
    )


def _unquantized(model: PreTrainedModel) -> TinyLlamaForCausalLM:
    """The same architecture without memory."""
    with torch.device("meta"):
        return TinyLlamaForCausalLM(TinyLlamaConfig.from_llama(model.config))


def _adapter_bytes(model: PreTrainedModel) -> int:
    """What PEFT has put beside the layers that it wraps."""
    wrappers = [module for module in model.modules() if hasattr(module, "get_base_layer")]
    own = {id(p): p.nbytes for module in wrappers for p in module.parameters()}
    base = {id(p) for module in wrappers for p in module.get_base_layer().parameters()}
    return sum(nbytes for key, nbytes in own.items() if key not in base)


def _scales(module: nn.Module) -> list[torch.Tensor]:
    """What bitsandbytes keeps beside a quantised weight: row scales of int8; block scales of 4 bit, and their scales."""
    weight = module._parameters.get("weight", module)
    found = [vars(weight).get("SCB"), getattr(vars(module).get("state"), "SCB", None)]
    # Not by `weight.quant_state`, which would undo the repacking.
    for state in (vars(weight).get("quant_state"), getattr(weight, "packed_state", None)):
        while state is not None:
            found += [state.absmax, state.code, state.offset]
            state = state.state2 if state.nested else None
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]
