"""A stand-in for CUDA graphs on a CPU: records the device calls of a step with their storages, and repeats them.

Like a graph, it refuses what reads from the device or copies to it, repeats nothing but device work, and uses the
tensors that were used when it was recorded, whatever Python would do by then.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


aten = torch.ops.aten
# Their results or shapes depend on values, so that the host waits for the device.
READS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten._unique2.default,
}


_POISON = {torch.int64: -(10**9), torch.int32: -(10**9)}


class ReadsFromDevice(RuntimeError):
    """A step reads from the device, or copies to it."""


class _Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        indices = [leaf for leaf in tree_leaves(args[1:2]) if isinstance(leaf, torch.Tensor)]
        by_mask = func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default) and any(
            index.dtype in (torch.bool, torch.uint8) for index in indices
        )
        # A tensor that was made from Python values would be copied to the device. A number that is assigned to a slice
        # looks the same on a CPU, but elsewhere a kernel writes it.
        is_copied = func is aten.lift_fresh.default and args[0].dim() > 0
        if func in READS or by_mask or is_copied:
            raise ReadsFromDevice(f"{func} in a step that is recorded")
        output = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, output))
        return output


class Replay:
    """Implements [`~tinyllama_hf.decoding.graphs.Recorder`]."""

    def __init__(self):
        self.recorded: list[int] = []  # number of calls of each step
        self.replays = 0

    def record(self, step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        step()  # as for a graph, to load kernels
        with _Calls() as found:
            outputs = step()
        calls, intermediate = found.calls, _intermediate(found.calls, outputs)
        self.recorded.append(len(calls))

        @torch.no_grad()  # as in a graph, which has none
        def replay() -> None:
            self.replays += 1
            for func, args, kwargs, before in calls:
                _repeat(func, args, kwargs, before)
            for tensor in intermediate:
                tensor.fill_(math.nan if tensor.is_floating_point() else _POISON.get(tensor.dtype, 1))

        return replay, outputs

    def bytes(self) -> int:
        return 0


def _intermediate(calls: list[tuple[Any, Any, Any, Any]], outputs: Any) -> list[torch.Tensor]:
    """Returns the results whose memory other graphs may use: all but the outputs, and what was there before."""
    seen = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)}
    found = []
    for _, args, kwargs, output in calls:
        seen |= {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in seen:
                seen.add(leaf.untyped_storage().data_ptr())
                found.append(leaf)
    return found


def _repeat(func: Any, args: Any, kwargs: Any, before: Any) -> None:
    """Calls an operator on the recorded tensors, and writes its results where they were."""
    after = func(*args, **kwargs)
    given = {id(leaf) for leaf in tree_leaves((args, kwargs))}
    for old, new in zip(tree_leaves(before), tree_leaves(after), strict=True):
        if not isinstance(old, torch.Tensor) or id(old) in given:
            continue  # changed in place
        if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():  # not a view of an argument
            assert old.shape == new.shape and old.dtype == new.dtype
            old.copy_(new)


class Again:
    """A recorder that calls the step again: for compiled steps, which do not run under a dispatch mode."""

    def __init__(self):
        self.recorded: list[int] = []

    def record(self, step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        outputs = step()
        self.recorded.append(1)

        def replay() -> None:
            for old, new in zip(tree_leaves(outputs), tree_leaves(step()), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)

        return replay, outputs

    def bytes(self) -> int:
        return 0
