"""Steps of fixed shape, recorded once as CUDA graphs and replayed without Python.

A step is a function without arguments over tensors at fixed addresses. A replay costs what its kernels cost: one token
of TinyLlama 1.1B takes about 770 kernel launches, whose Python takes five times as long as the kernels on an H200.
"""

import os
import time
from collections.abc import Callable, Hashable
from typing import Protocol, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import InputError, one_line
from .row_state import RowState


_MOST_GRAPHS = 256  # all are dropped beyond this; a graph of 1.1b takes about a megabyte
_SWITCH = "TINYLLAMA_HF_GRAPHS"
_Outputs = TypeVar("_Outputs")


class Recorder(Protocol):
    """Records the device's work of a step."""

    def record(self, step: Callable[[], _Outputs]) -> tuple[Callable[[], None], _Outputs]:
        """Returns a function that repeats the work, and the outputs, which each call overwrites.

        The step may be called several times.

        Raises:
            RuntimeError: if the step reads from the device.
        """

    def bytes(self) -> int:
        """Returns the memory that the recorded steps hold."""


class CudaRecorder:
    """Records CUDA graphs in one memory pool.

    The stored outputs keep their memory. The rest of a graph's memory is used by the other graphs as well, so that a
    replay may overwrite whatever is not an output.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream: torch.cuda.Stream | None = None  # one for all: cuBLAS holds memory for each stream
        self._bytes = 0

    def record(self, step: Callable[[], _Outputs]) -> tuple[Callable[[], None], _Outputs]:
        """See [`Recorder.record`]."""
        self._stream = stream = self._stream or torch.cuda.Stream(self._device)
        current = torch.cuda.current_stream(self._device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            step()  # libraries load kernels and create handles in the first call, which cannot be captured
        current.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            before = torch.cuda.memory_reserved(self._device)  # unused memory was given back just now
            outputs = step()
        self._bytes += torch.cuda.memory_reserved(self._device) - before
        return graph.replay, outputs

    def bytes(self) -> int:
        """See [`Recorder.bytes`]."""
        return self._bytes


def recorder_for(device: torch.device) -> Recorder | None:
    """Returns what records steps on a device; `None` on a CPU, where steps fit the rows exactly instead.

    The environment variable `TINYLLAMA_HF_GRAPHS=off` turns recording off.
    """
    is_off = os.environ.get(_SWITCH) == "off"
    return CudaRecorder(device) if device.type == "cuda" and not is_off else None


class Graphs:
    """Recorded steps by key.

    Args:
        recorder (`Recorder`): records them.
        state (`RowState`): all rows, which a step changes. Recording leaves them as they were.

    Attributes:
        recorded (`int`): number of steps that were recorded so far.
        seconds (`float`): time of recording them.
    """

    def __init__(self, recorder: Recorder, state: RowState):
        self._recorder, self._state = recorder, state
        self._steps: dict[Hashable, tuple[Callable[[], None], object]] = {}
        self._is_recording = False
        self.recorded, self.seconds = 0, 0.0

    def run(self, key: Hashable, step: Callable[[], _Outputs]) -> _Outputs:
        """Runs a step. Within a step that is being recorded, it becomes a part of that.

        Args:
            key (`Hashable`): names everything that the step depends on, except the contents of tensors.
            step (`Callable`): the step.

        Returns:
            Its outputs; the next call with this key overwrites them.
        """
        if self._is_recording:
            return step()
        if key not in self._steps:
            self._record(key, step)
        replay, outputs = self._steps[key]
        replay()
        return outputs  # type: ignore[return-value]  # of the step that was recorded for this key

    def _record(self, key: Hashable, step: Callable[[], object]) -> None:
        began = time.perf_counter()
        if len(self._steps) >= _MOST_GRAPHS:
            self._steps.clear()
        before = self._state.snapshot()
        self._is_recording = True
        try:
            self._steps[key] = self._recorder.record(step)
        except InputError:
            raise
        except RuntimeError as error:
            raise InputError(
                f"a generation step cannot be recorded as a graph on this device ({one_line(error)}). Set "
                f"{_SWITCH}=off to generate without graphs"
            ) from error
        finally:
            self._is_recording = False
            self._state.restore(before)
        self.recorded += 1
        self.seconds += time.perf_counter() - began

    def __str__(self) -> str:
        return (
            f"{len(self._steps)} graphs of fixed shape, {self._recorder.bytes() / 1e6:.0f} MB, recorded in "
            f"{self.seconds:.2f} s"
        )


def describe_weights(model: PreTrainedModel) -> tuple[Hashable, ...]:
    """Describes what the graphs of a model depend on, besides the contents of tensors.

    These are its modules, the addresses of their tensors and the settings of adapters. Replays read weights at their
    addresses, so that weights which change in place need no new graphs.
    """
    found: list[Hashable] = [model.training, model.config._attn_implementation]
    for module in model.modules():
        found.append((id(module), *_adapter_settings(module)))
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            found += [(part.data_ptr(), part.dtype, part.shape) for part in _parts(tensor)]
    return tuple(found)


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Returns the tensors that a tensor consists of: several for the quantized ones of torchao."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(tensor, name))]


def _adapter_settings(module: nn.Module) -> tuple[Hashable, ...]:
    """Returns the Python values that PEFT's layers compute with."""
    names = ("_disable_adapters", "_active_adapter", "scaling", "merged_adapters")
    return tuple(repr(vars(module)[name]) for name in names if name in vars(module))


def reason_not_to_record(model: PreTrainedModel) -> str | None:
    """Returns why the steps of a model cannot be recorded, or `None`."""
    if getattr(model, "is_loaded_in_8bit", False):
        return "int8 layers of bitsandbytes read from the device"
    if model.training:
        return "the model is in training mode"
    if len(set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))) > 1:
        return "its layers are on several devices"
    rope = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type")
    if rope == "dynamic":
        return "its rotary scaling 'dynamic' reads the longest position from the device"
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or type(model).__name__} has hooks, which a replay would not call"
    return None
