"""Models in 8 and 4 bit through bitsandbytes, for inference.

On a CPU with AVX512_BF16, bitsandbytes (0.50.2) repacks 4-bit weights at the first forward pass in evaluation mode. A
repacked layer saves corrupt weights (slightly other ones if its scales are quantised too), and lets no gradient pass, with
a warning at most. That fast path is kept, and what it would break is refused: a quantised model is not saved and not
trained. tests/inference/test_quantization.py shows the library's behaviour.
"""

from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from ..configuration_tinyllama import TinyLlamaConfig
from ..errors import InputError, did_you_mean, require
from ..modeling_tinyllama import TinyLlamaForCausalLM
from ..progress import quiet_bitsandbytes


QUANTIZATIONS = ("none", "int8", "nf4")


class QuantizedTinyLlama(TinyLlamaForCausalLM):
    """A `TinyLlamaForCausalLM` with int8 or nf4 weights that generates, and refuses what would damage it."""

    sealed = False  # while it is being loaded, the library needs what is refused afterwards

    def train(self, mode: bool = True):
        """Refuses training mode; `eval()` works as ever."""
        if mode:
            self._refuse("trained", "fine-tune the unquantised model (recipes/sft/lora.yaml needs little memory)")
        return super().train(mode)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Refuses to hand out weights that the fast path has repacked."""
        self._refuse("read out", "take the weights of the unquantised model")
        return super().state_dict(*args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refuses to write weights that the fast path has repacked."""
        self._refuse("saved", "keep the unquantised folder, and quantise when loading")
        super().save_pretrained(*args, **kwargs)

    save_as_llama = save_pretrained

    def _refuse(self, what: str, fix: str) -> None:
        if self.sealed:
            raise InputError(f"a quantised model is for inference and cannot be {what}: {fix}")


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
    from bitsandbytes.functional import has_avx512bf16

    fast_bf16 = device.startswith("cuda") or has_avx512bf16()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if fast_bf16 else torch.float32,
    )


def footprint(model: PreTrainedModel) -> Footprint:
    """Measures the memory of a model's weights: parameters, buffers, and the scales beside quantised ones."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for parameter in model.parameters():
        tensors |= {id(tensor): tensor for tensor in _scales(parameter)}
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


def _scales(parameter: torch.nn.Parameter) -> list[torch.Tensor]:
    """What bitsandbytes keeps beside a quantised weight: row scales of int8; block scales of nf4, and their scales."""
    found = [getattr(parameter, "SCB", None)]
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        found += [state.absmax, state.code, getattr(state, "offset", None)]
        state = getattr(state, "state2", None)
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]
