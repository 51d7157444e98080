"""4-bit layers that keep the fast path of a CPU and lose nothing by it.

On a CPU with AVX512_BF16, bitsandbytes (0.50.2) repacks 4-bit weights for a fused kernel at the first forward pass in
evaluation mode, and rounds their scales. From then on a save writes corrupt weights (slightly other ones if the scales are
quantised too), `dequantize()` and PEFT's merging return noise, and no gradient passes: all without an error.
tests/inference/test_quantization.py shows it.

Here the same kernel runs on the same layout, but the scales are kept as they were, and whoever asks a parameter for its
`quant_state`, without which its bytes mean nothing, finds the bytes as they were too. That holds for everything that the
libraries do with a quantised layer: saving, dequantising, merging, moving, copying, and passes with gradients.
"""

import copy
import threading
from typing import Any

import torch
from bitsandbytes import matmul_4bit, nn
from bitsandbytes.functional import (
    QuantState,
    _convert_weight_packed_for_cpu,
    _convert_weight_packed_for_cpu_inverse,
)


# Two threads that generate must not repack one weight twice, nor one restore it while the other computes.
_LAYOUT = threading.Lock()


# Both classes are named as the library's, since transformers, accelerate and PEFT ask for some of them by name.
class Params4bit(nn.Params4bit):
    """A 4-bit weight that is repacked at times, and that nobody sees repacked.

    `packed_state` is what the fused kernel needs while the weight is repacked, else `None`.
    """

    packed_state: QuantState | None = None

    @property
    def quant_state(self) -> QuantState | None:
        """The scales as they were before any repacking; the weight is brought back into their layout first."""
        with _LAYOUT:
            if self.packed_state is not None:
                packed = _as_rows(self.data, self.packed_state)
                restored, _ = _convert_weight_packed_for_cpu_inverse(packed, self.packed_state)
                # In place, for whoever took the weight before its scales.
                packed.copy_(_as_rows(restored, self.packed_state))
                self.packed_state = None
        return self.__dict__["quant_state"]

    @quant_state.setter
    def quant_state(self, state: QuantState | None) -> None:
        self.__dict__["quant_state"] = state

    def __getstate__(self) -> dict[str, Any]:
        self.quant_state  # noqa: B018  restores the weight: copies and pickles have the library's layout
        return super().__getstate__()


class Linear4bit(nn.Linear4bit):
    """A 4-bit layer: repacked weights and the fused kernel on a CPU in evaluation mode, the library's own pass otherwise."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]`; gradients with respect to `x` pass where it requires them."""
        if self.training or x.requires_grad or x.device.type != "cpu":
            return super().forward(x)
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        with _LAYOUT:
            state = _repack(self.weight)
            return matmul_4bit(x.to(self.compute_dtype), self.weight, state, bias=bias).to(x.dtype)


def make_reversible(model: torch.nn.Module) -> None:
    """Turns the 4-bit layers of a loaded model into reversible ones where the library would repack them."""
    for module in model.modules():
        if isinstance(module, nn.Linear4bit) and module.support_avx512bf16_for_cpu:
            module.support_avx512bf16_for_cpu = False
            # On other shapes the library's repacking fails (0.50.2); they take the slow path.
            if module.out_features % 32 == 0 and module.in_features % module.weight.quant_state.blocksize == 0:
                module.__class__ = Linear4bit


def _repack(weight: nn.Params4bit) -> QuantState:
    """Repacks a weight unless it is, and returns what the kernel needs beside it."""
    if not isinstance(weight, Params4bit):
        weight.__class__ = Params4bit
    if weight.packed_state is None:
        # Not as tensors of inference mode, which could not be trained on afterwards.
        with torch.inference_mode(False), torch.no_grad():
            packed, state = _convert_weight_packed_for_cpu(weight.data, copy.copy(weight.__dict__["quant_state"]))
            # Into new memory: a state dict that was taken before shares the old one. In the old shape, for what reads it.
            weight.data = packed.view(-1).view(weight.dtype).view(weight.shape)
        weight.packed_state = state
    return weight.packed_state


def _as_rows(weight: torch.Tensor, state: QuantState) -> torch.Tensor:
    """A 4-bit weight as `[out_features, in_features / 2]` bytes; shares its memory."""
    return weight.view(-1).view(torch.uint8).view(state.shape[0], state.shape[1] // 2)
