"""How fast a run is, against what its device could do, and how much memory it took."""

import time
from pathlib import Path

import torch

from ..devices import known_device


# Sides of the square products of `measure_matmul_flops`: what this library's step multiplies lies between them.
_MATMUL_SIDES = (1024, 2048, 4096, 8192)
_MATMUL_SECONDS = 0.5  # per side


def model_flops_utilization(
    tokens_per_second: float, flops_per_token: int, device_name: str | None, num_devices: int = 1
) -> float | None:
    """Share of the devices' peak rate that the model's own arithmetic takes (MFU), or `None` for an unknown device.

    Args:
        tokens_per_second (`float`): of the whole run.
        flops_per_token (`int`): from `TinyLlamaForCausalLM.flops_per_token`, whose convention it inherits.
        device_name (`str`, *optional*): as `torch.cuda.get_device_name` gives it; `None` for a CPU.
        num_devices (`int`): devices of the run.
    """
    device = known_device(device_name)
    return None if device is None else tokens_per_second * flops_per_token / (device.flops * num_devices)


def measure_matmul_flops(device: torch.device | str, dtype: torch.dtype) -> float:
    """The rate in FLOP/s that products of square matrices reach here and now: the best single product of several sizes.

    The roof for a step on this machine, whatever else runs on it. Takes about two seconds; a size whose first product
    is slower than that is the last one tried.

    Args:
        device (`torch.device` or `str`): where.
        dtype (`torch.dtype`): of both factors; the products of a bf16 run are bf16.
    """
    device, best = torch.device(device), 0.0
    for side in _MATMUL_SIDES:
        left = torch.randn(side, side, device=device).to(dtype)
        right = torch.randn(side, side, device=device).to(dtype)
        out = torch.empty_like(left)
        began = time.perf_counter()
        first = _seconds(lambda left=left, right=right, out=out: torch.mm(left, right, out=out), device)
        fastest = first
        while time.perf_counter() - began < _MATMUL_SECONDS:
            fastest = min(fastest, _seconds(lambda a=left, b=right, out=out: torch.mm(a, b, out=out), device))
        best = max(best, 2 * side**3 / fastest)
        if first > 4 * _MATMUL_SECONDS / 8:  # the next side takes eight times as long
            break
    return best


def _seconds(call, device: torch.device) -> float:
    """Wall-clock time of a call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def peak_memory_bytes(device: torch.device | str) -> int | None:
    """The most memory that this process has taken so far.

    On CUDA what torch's allocator gave out, on a CPU the peak of the resident set; `None` where neither can be read.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if device.type != "cpu" or not status.is_file():
        return None
    # Not getrusage: its peak begins at that of the process that started this one.
    return int(status.read_text(encoding="ascii", errors="replace").split("VmHWM:")[1].split()[0]) * 1024
