"""4-bit layers that keep the fast path of a CPU and lose nothing by it.

On a CPU with AVX512_BF16, bitsandbytes (0.50.2) repacks 4-bit weights for a fused kernel at the first forward pass in
evaluation mode, and rounds their scales. From then on a save writes corrupt weights (slightly other ones if the scales are
quantised too), `dequantize()` and PEFT's merging return noise, and no gradient passes: all without an error.
tests/quantization/test_quantization.py shows it.

Here the same kernel runs on the same layout, but the scales are kept as they were, and whoever asks a parameter for its
`quant_state`, without which its bytes mean nothing, finds the bytes as they were too. That holds for everything that the
libraries do with a quantised layer: saving, dequantising, merging, moving, copying, and passes with gradients.
"""

import copy
import threading
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from bitsandbytes import matmul_4bit, nn
from bitsandbytes.functional import (
    QuantState,
    _convert_weight_packed_for_cpu,
    _convert_weight_packed_for_cpu_inverse,
)


class _Layout(NamedTuple):
    """What a weight's memory holds while it is, or becomes, another than the library's own.

    Args:
        data (`torch.Tensor`): the bytes, repacked; or, while they are put back, as they were.
        state (`QuantState`, *optional*): what the fused kernel needs for repacked ones.
    """

    data: torch.Tensor
    state: QuantState | None


# Both classes are named as the library's, since transformers, accelerate and PEFT ask for some of them by name.
class Params4bit(nn.Params4bit):
    """A 4-bit weight that is repacked at times, and that nobody sees repacked.

    `layout` alone says what the weight is, and is set in one step when all is made; what follows it can be done again. So an
    interrupt (Ctrl-C, memory that is short) may come between any two lines.
    """

    layout: _Layout | None = None

    @property
    def lock(self) -> AbstractContextManager:
        """Of one weight: two threads must not repack it at once, nor one restore it in place while the other computes."""
        return self.__dict__.setdefault("lock", threading.RLock())

    @property
    def packed_state(self) -> QuantState | None:
        """What the fused kernel needs while the weight is repacked, else `None`."""
        layout = self.layout
        return None if layout is None else layout.state

    @property
    def quant_state(self) -> QuantState | None:
        """The scales as they were before any repacking; the weight is brought back into their layout first."""
        with self.lock:
            if self.layout is not None:
                if self.layout.state is not None:
                    self.layout = _Layout(_unpacked(*self.layout), None)
                # In place, for whoever took the weight before its scales.
                _as_bytes(self.data).copy_(self.layout.data)
                self.layout = None
        return self.__dict__["quant_state"]

    @quant_state.setter
    def quant_state(self, state: QuantState | None) -> None:
        self.__dict__["quant_state"] = state

    def repacked(self) -> _Layout:
        """The weight as the fused kernel takes it: repacked now unless it is. The caller holds `lock`."""
        if self.packed_state is None:
            # Not as tensors of inference mode, which could not be trained on afterwards.
            with torch.inference_mode(False), torch.no_grad():
                scales = copy.copy(self.quant_state)
                packed, state = _convert_weight_packed_for_cpu(self.data, scales)
                # Into new memory: a state dict that was taken before shares the old one. In the old shape, for what reads it.
                self.layout = _Layout(packed.view(-1).view(self.dtype).view(self.shape), state)
                self.data = self.layout.data
        return self.layout

    def __getstate__(self) -> dict[str, Any]:
        self.quant_state  # noqa: B018  restores the weight: copies and pickles have the library's layout
        return {name: value for name, value in super().__getstate__().items() if name not in ("layout", "lock")}


class Linear4bit(nn.Linear4bit):
    """A 4-bit layer: repacked weights and the fused kernel on a CPU in evaluation mode, the library's own pass otherwise."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]`; gradients with respect to `x` pass where it requires them."""
        if x.device.type != "cpu":
            return super().forward(x)
        weight = self._reversible_weight()
        with weight.lock:
            if self.training or x.requires_grad:
                return super().forward(x)
            packed, state = weight.repacked()
            bias = None if self.bias is None else self.bias.to(self.compute_dtype)
            return matmul_4bit(x.to(self.compute_dtype), packed, state, bias=bias).to(x.dtype)

    def _load_from_state_dict(self, *args: Any) -> None:
        weight = self._reversible_weight()
        with weight.lock:
            weight.quant_state  # noqa: B018  restores the weight: what is copied into it has the library's layout
            super()._load_from_state_dict(*args)

    def _reversible_weight(self) -> Params4bit:
        """The weight, which PEFT's merging and transformers' loading replace by new ones of the library."""
        if not isinstance(self.weight, Params4bit):
            self.weight.__class__ = Params4bit
        return self.weight


def make_reversible(model: torch.nn.Module) -> None:
    """Turns the 4-bit layers of a loaded model into reversible ones where the library would repack them."""
    for module in model.modules():
        if isinstance(module, nn.Linear4bit) and module.support_avx512bf16_for_cpu:
            module.support_avx512bf16_for_cpu = False
            # On other shapes the library's repacking fails (0.50.2); they take the slow path.
            if module.out_features % 32 == 0 and module.in_features % module.weight.quant_state.blocksize == 0:
                module.__class__ = Linear4bit


def _unpacked(data: torch.Tensor, state: QuantState) -> torch.Tensor:
    """The bytes of a repacked weight in the library's layout, `[out_features * in_features / 2]`."""
    rows = _as_bytes(data).view(state.shape[0], state.shape[1] // 2)
    # The library changes the state that it is given.
    original, _ = _convert_weight_packed_for_cpu_inverse(rows, copy.copy(state))
    return _as_bytes(original)


def _as_bytes(weight: torch.Tensor) -> torch.Tensor:
    """A 4-bit weight as a row of bytes; shares its memory."""
    return weight.view(-1).view(torch.uint8)
