"""Quantized models: which kinds a folder or a request has, the class, and its memory.

`bitsandbytes` has int8 and nf4, `torchao` has int4 and fp8.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from ..configuration_tinyllama import TinyLlamaConfig
from ..errors import InputError, require
from ..files import new_files
from ..modeling_tinyllama import TinyLlamaForCausalLM
from ..progress import quiet_bitsandbytes
from .bitsandbytes import FOUR_BIT, make_safe, scale_tensors
from .names import GPU_CAPABILITIES, check_quantization_name
from .torchao import check_stored, check_torchao, saved_torchao, stored_tensors


_COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class QuantizedTinyLlama(TinyLlamaForCausalLM):
    """A `TinyLlamaForCausalLM` with 8-bit or 4-bit weights, for generation; it is saved quantized."""

    _takes_quantized_weights = True

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Loads a folder that was saved quantized, or quantizes it while loading with a `quantization_config`.

        Raises:
            InputError: if weights and scales in the folder do not match.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        check_loaded(loaded[0] if isinstance(loaded, tuple) else loaded, str(pretrained_model_name_or_path))
        return loaded

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Writes a plain Llama folder with quantized weights, or the adapter if the model has one.

        Every file is written under a temporary name and renamed, `config.json` last. Other files in the folder are
        kept. Arguments are those of transformers.
        """
        folder = Path(save_directory).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", folder.name)  # the library takes the name of the folder that it writes to
        with new_files(folder, last="config.json") as temporary:
            super().save_pretrained(temporary, *args, **kwargs)
            names = {file.name for file in temporary.iterdir()}
        if "config.json" in names and not kwargs.get("variant"):  # the model was written, not an adapter
            # Some readers load every weight file, and would mix these with those of an earlier save.
            for file in (*folder.glob("model.safetensors*"), *folder.glob("model-*-of-*.safetensors")):
                if file.name not in names:
                    file.unlink()

    save_as_llama = save_pretrained

    def flops_per_token(self, seq_len: int | None = None, convention: str = "without_input_embedding") -> int:
        """Returns `TinyLlamaForCausalLM.flops_per_token` of the unquantized model.

        The parameters of this model cannot be counted: one element holds two 4-bit weights.
        """
        return _unquantized(self).flops_per_token(seq_len, convention)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Returns the bytes of weights, scales, adapter and buffers; see [`measure_footprint`]."""
        return measure_footprint(self).weights

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        # bitsandbytes (0.50.2) does not move the int8 scales when a model moves after its first forward pass.
        if getattr(self, "is_loaded_in_8bit", False) and fn(torch.empty(0, device=self.device)).device != self.device:
            raise InputError("an int8 model cannot be moved to another device; load it there with device=...")
        return super()._apply(fn, recurse)


def choose_quantization(asked: str, saved: str, where: str) -> str:
    """Returns the quantization to use: the one that the weights were saved with, or else the requested one.

    Args:
        asked (`str`): one of `QUANTIZATIONS`; `"none"` keeps weights as they were saved.
        saved (`str`): the quantization of the saved weights; see [`saved_quantization`].
        where (`str`): name of the model, for the error message.

    Raises:
        InputError: if the name is unknown, or the weights were saved with another quantization.
    """
    check_quantization_name(asked)
    if saved != "none" and asked not in ("none", saved):
        raise InputError(
            f"--quantization {asked!r}: the weights of {where} are already {saved}. Leave the option out, or give the "
            "unquantized model"
        )
    return asked if saved == "none" else saved


def check_quantization(
    quantization: str, double_quantization: bool = True, compute_dtype: Any = "auto", device: str = "auto"
) -> None:
    """Checks the options of a quantization, the device, and that the backend is installed.

    The name must be valid already: [`check_quantization_name`] checks it, and a folder may also be `"fp4"`.

    Raises:
        InputError: naming the option, the device, or the package to install.
    """
    if compute_dtype != "auto" and compute_dtype not in _COMPUTE_DTYPES:
        raise InputError(
            f"compute_dtype {compute_dtype!r}: not supported; use 'auto', {', '.join(map(str, _COMPUTE_DTYPES))}"
        )
    if quantization not in FOUR_BIT:
        given = {"double_quantization": (double_quantization, True), "compute_dtype": (compute_dtype, "auto")}
        for name, (value, default) in given.items():
            if value != default:
                raise InputError(f"{name}={value}: only for nf4; leave it out with quantization {quantization}")
    if quantization in GPU_CAPABILITIES:
        check_torchao(quantization, device)
    elif quantization != "none":
        quiet_bitsandbytes()
        require("bitsandbytes", "quantization", f"quantization {quantization}")


def saved_quantization(fields: Mapping[str, Any], where: str) -> str:
    """Returns the quantization that the weights of a folder were saved with.

    Args:
        fields (`Mapping`): contents of its `config.json`.
        where (`str`): name of the folder, for the error message.

    Raises:
        InputError: if they were quantized by another library, or in another way; the message names what can read them.
    """
    saved = fields.get("quantization_config")
    if saved is None:
        return "none"
    saved = saved if isinstance(saved, dict) else {}
    method = saved.get("quant_method", "bitsandbytes")  # missing in older folders
    kind = "int8" if saved.get("load_in_8bit") else saved.get("load_in_4bit") and saved.get("bnb_4bit_quant_type")
    if method == "bitsandbytes" and kind in ("int8", *FOUR_BIT):
        return kind
    if method == "torchao":
        kind, name = saved_torchao(saved)
        if kind is not None:
            return kind
        method = f"torchao as {name}"
    converted = "`tinyllama-hf convert FOLDER --to llama --output NEW` writes it as plain weights"
    readers = {
        "awq": f"vLLM reads it, and {converted}",
        "gptq": "vLLM reads it",
        "compressed-tensors": f"vLLM reads it, and if it is W4A16 (4 bit, pack-quantized) {converted}",
    }
    raise InputError(
        f"{where}: the weights were quantized by {method}, not as int8, nf4 or fp4 by bitsandbytes, nor as "
        "int4 or fp8 by torchao; " + readers.get(method, "give the unquantized model and quantize it while loading")
    )


def check_loaded(model: PreTrainedModel, where: str) -> None:
    """Checks the quantized weights of a model that was just loaded, and makes it exact and possible to save.

    A second call does nothing.

    Args:
        where (`str`): name of the model's folder, for the error message.

    Raises:
        InputError: naming the first layer in which weights and scales do not match.
    """
    if getattr(model, "quantization_method", None) == "torchao":
        check_stored(model, where)
    else:
        make_safe(model, where)
    # With them transformers (5.23) refuses to save a model that it loaded quantized.
    vars(model)["_weight_conversions"] = []


def cast_unquantized(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts the parameters that are not quantized, in place."""
    for parameter in model.parameters():
        # 4-bit weights may be stored in tensors of any dtype, floating-point ones included.
        if parameter.is_floating_point() and getattr(parameter, "quant_state", None) is None:
            parameter.data = parameter.data.to(dtype)


class Footprint(NamedTuple):
    """Bytes in memory.

    Attributes:
        weights (`int`): all weights, with scales, buffers and the adapter.
        unquantized (`int`): the same for the model without quantization.
        adapter (`int`): the adapter alone.
    """

    weights: int
    unquantized: int
    adapter: int


def measure_footprint(model: PreTrainedModel) -> Footprint:
    """Measures the memory of a model's weights: parameters, buffers, and the scales of quantized parameters."""
    tensors: dict[int, torch.Tensor] = {}
    for module in model.modules():
        found = (*module.parameters(recurse=False), *module.buffers(recurse=False), *scale_tensors(module))
        tensors |= {id(part): part for tensor in found for part in stored_tensors(tensor)}
    size, plain, adapter = model.dtype.itemsize, _unquantized(model), _adapter_bytes(model)
    unquantized = sum(p.numel() * size for p in plain.parameters()) + sum(b.nbytes for b in plain.buffers())
    return Footprint(sum(tensor.nbytes for tensor in tensors.values()), unquantized + adapter, adapter)


def describe_footprint(model: PreTrainedModel) -> str:
    """Returns the measured memory as a line of output: `nf4: 95.2 MB of weights (269.0 MB in bfloat16)`."""
    measured = measure_footprint(model)
    kind = saved_quantization(model.config.to_dict(), "model")
    adapter = f", including an adapter of {measured.adapter / 1e6:.1f} MB" if measured.adapter else ""
    dtype = str(model.dtype).removeprefix("torch.")
    return (
        f"{kind}: {measured.weights / 1e6:.1f} MB of weights{adapter} ({measured.unquantized / 1e6:.1f} MB in {dtype})"
    )


def _unquantized(model: PreTrainedModel) -> TinyLlamaForCausalLM:
    """Returns a model of the same architecture on the meta device."""
    with torch.device("meta"):
        return TinyLlamaForCausalLM(TinyLlamaConfig.from_llama(model.config))


def _adapter_bytes(model: PreTrainedModel) -> int:
    """Returns the bytes of the parameters that PEFT added to the layers it wraps."""
    base_layers = {
        module: get() for module in model.modules() if callable(get := getattr(module, "get_base_layer", None))
    }
    own = {id(p): p.nbytes for wrapper in base_layers for p in wrapper.parameters()}
    base = {id(p) for layer in base_layers.values() for p in layer.parameters()}
    return sum(nbytes for key, nbytes in own.items() if key not in base)
