"""4-bit layers that use the fast CPU kernel without changing the weights that are saved, merged or trained on.

On a CPU with AVX512_BF16, bitsandbytes (0.50.2) repacks 4-bit weights for a fused kernel at the first forward pass in
evaluation mode, and rounds their scales. After that a save writes corrupt weights (slightly wrong ones if the scales
are quantized too), `dequantize()` and PEFT's merge return noise, and no gradient flows, all without an error.
tests/quantization/test_quantization.py demonstrates it.

Here the same kernel runs on the same layout, but the original scales are kept. The bytes of a weight are meaningless
without its `quant_state`, so reading that attribute restores the original bytes. This covers everything that the
libraries do with a quantized layer: saving, dequantizing, merging, moving, copying, and forward passes with gradients.
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


class _Packing(NamedTuple):
    """Contents of a weight while it is repacked, or while it is being restored.

    Attributes:
        data (`torch.Tensor`): the repacked bytes; the original ones while the weight is being restored.
        state (`QuantState`, *optional*): scales for the fused kernel; `None` while the weight is being restored.
    """

    data: torch.Tensor
    state: QuantState | None


# Both classes have the names of the library's classes, since transformers, accelerate and PEFT compare class names.
class Params4bit(nn.Params4bit):
    """A 4-bit weight that is repacked for the fused kernel, and restored before other code reads it.

    `packing` alone defines the state of the weight. It is assigned in one step, after everything is computed, and the
    steps after the assignment can be repeated. An exception (Ctrl-C, out of memory) between any two lines is therefore
    harmless.
    """

    packing: _Packing | None = None

    @property
    def lock(self) -> AbstractContextManager:
        """Held by the one thread that repacks this weight, computes with it, or restores it in place."""
        return self.__dict__.setdefault("lock", threading.RLock())

    @property
    def packed_state(self) -> QuantState | None:
        """Scales for the fused kernel while the weight is repacked, else `None`."""
        packing = self.packing
        return None if packing is None else packing.state

    @property
    def quant_state(self) -> QuantState | None:
        """The original scales. Reading them restores the weight to the original layout."""
        with self.lock:
            packing = self.packing
            if packing is not None:
                if packing.state is not None:
                    packing = self.packing = _Packing(_unpacked(packing.data, packing.state), None)
                # In place, for callers that read the weight before its scales.
                _as_bytes(self.data).copy_(packing.data)
                self.packing = None
        return self.__dict__["quant_state"]

    @quant_state.setter
    def quant_state(self, state: QuantState | None) -> None:
        self.__dict__["quant_state"] = state

    def repacked(self) -> tuple[torch.Tensor, QuantState]:
        """Returns weight and scales for the fused kernel, repacking the weight if needed. The caller holds `lock`."""
        packing = self.packing
        if packing is None or packing.state is None:
            # Tensors that are created in inference mode could not be used in training later.
            with torch.inference_mode(False), torch.no_grad():
                scales = copy.copy(self.quant_state)
                assert scales is not None
                packed, state = _convert_weight_packed_for_cpu(self.data, scales)
                # New memory, since an earlier state dict shares the old one; the old shape, since other code reads it.
                packing = self.packing = _Packing(packed.view(-1).view(self.dtype).view(self.shape), state)
                self.data = packing.data
        assert packing.state is not None
        return packing.data, packing.state

    def __getstate__(self) -> dict[str, Any]:
        self.quant_state  # noqa: B018  restores the weight, so that copies and pickles have the library's layout
        return {name: value for name, value in super().__getstate__().items() if name not in ("packing", "lock")}


class Linear4bit(nn.Linear4bit):
    """A 4-bit layer with the fused kernel on a CPU in evaluation mode, and the library's forward pass otherwise."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps `[..., in_features]` to `[..., out_features]`; differentiable with respect to `x`."""
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
            weight.quant_state  # noqa: B018  restores the weight, since the copied values have the library's layout
            super()._load_from_state_dict(*args)

    def _reversible_weight(self) -> Params4bit:
        """Returns the weight as a reversible one; PEFT's merge and transformers' loading assign plain ones."""
        if not isinstance(self.weight, Params4bit):
            self.weight.__class__ = Params4bit
        assert isinstance(self.weight, Params4bit)
        return self.weight


def make_reversible(model: torch.nn.Module) -> None:
    """Replaces the class of the 4-bit layers that the library would repack by [`Linear4bit`]."""
    for module in model.modules():
        if isinstance(module, nn.Linear4bit) and module.support_avx512bf16_for_cpu:
            module.support_avx512bf16_for_cpu = False
            # The library's repacking (0.50.2) fails for other shapes, which use the slow kernel.
            state = getattr(module.weight, "quant_state", None)
            if state and module.out_features % 32 == 0 and module.in_features % state.blocksize == 0:
                module.__class__ = Linear4bit


def _unpacked(data: torch.Tensor, state: QuantState) -> torch.Tensor:
    """Returns the bytes of a repacked weight in the library's layout, `[out_features * in_features / 2]`."""
    rows = _as_bytes(data).view(state.shape[0], state.shape[1] // 2)
    # A copy, since the library modifies the state.
    original, _ = _convert_weight_packed_for_cpu_inverse(rows, copy.copy(state))
    return _as_bytes(original)


def _as_bytes(weight: torch.Tensor) -> torch.Tensor:
    """Returns a 4-bit weight as a flat view of bytes."""
    return weight.view(-1).view(torch.uint8)
