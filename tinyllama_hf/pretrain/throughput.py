"""The speed of a run compared with the peak of its device, and its peak memory."""

import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..devices import known_device


# Sides of the square matrices of `measure_matmul_flops`; the products of a training step are of sizes in between.
_MATMUL_SIDES = (1024, 2048, 4096, 8192)
_MATMUL_SECONDS = 0.5  # per side


def model_flops_utilization(
    tokens_per_second: float, flops_per_token: int, device_name: str | None, num_devices: int = 1
) -> float | None:
    """Model FLOPs utilization (MFU): share of the devices' peak rate, or `None` for an unknown device.

    Args:
        tokens_per_second (`float`): of the whole run.
        flops_per_token (`int`): from `TinyLlamaForCausalLM.flops_per_token`, which sets the convention.
        device_name (`str`, *optional*): from `torch.cuda.get_device_name`; `None` for a CPU.
        num_devices (`int`): of the run.
    """
    device = known_device(device_name)
    return None if device is None else tokens_per_second * flops_per_token / (device.flops * num_devices)


def measure_matmul_flops(device: torch.device | str, dtype: torch.dtype) -> float:
    """Measures the rate of matrix products in FLOP/s: the fastest single product of square matrices of several sizes.

    An upper bound for a training step on this machine under its present load. Takes about two seconds; no larger size
    is tried after one with a slow first product.

    Args:
        device (`torch.device` or `str`): to measure.
        dtype (`torch.dtype`): of both factors, as in the run.
    """
    device, best = torch.device(device), 0.0
    for side in _MATMUL_SIDES:
        left = torch.randn(side, side, device=device).to(dtype)
        right = torch.randn(side, side, device=device).to(dtype)
        out = torch.empty_like(left)
        began = time.perf_counter()
        product = functools.partial(torch.mm, left, right, out=out)
        first = fastest = _seconds(product, device)
        while time.perf_counter() - began < _MATMUL_SECONDS:
            fastest = min(fastest, _seconds(product, device))
        best = max(best, 2 * side**3 / fastest)
        if first > 4 * _MATMUL_SECONDS / 8:  # the next side takes eight times as long
            break
    return best


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of a call, including the work on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def peak_memory_bytes(device: torch.device | str) -> int | None:
    """Peak memory of this process so far.

    On CUDA, memory allocated by torch; on a CPU, the peak resident set size; `None` if neither is available.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if device.type != "cpu" or not status.is_file():
        return None
    # getrusage would include the peak of the parent process.
    return int(status.read_text(encoding="ascii", errors="replace").split("VmHWM:")[1].split()[0]) * 1024
