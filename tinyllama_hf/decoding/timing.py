"""Times of steps: of the device on CUDA, where they are read when the device has finished anyway."""

import time

import torch


Mark = float | torch.cuda.Event


def mark(tensor: torch.Tensor) -> Mark:
    """Returns a point in time: now, or on CUDA when the device has finished what was queued before."""
    if not tensor.is_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(tensor.device))
    return event


def seconds_between(first: Mark, second: Mark, wait: bool = False) -> float:
    """Returns the seconds between two marks.

    Args:
        first (`Mark`): from [`mark`].
        second (`Mark`): a later one, for the same device.
        wait (`bool`, *optional*, defaults to `False`): wait for the device; otherwise it must have finished.
    """
    if isinstance(first, torch.cuda.Event) and isinstance(second, torch.cuda.Event):
        if wait:
            second.synchronize()
        return first.elapsed_time(second) / 1e3
    assert isinstance(first, float) and isinstance(second, float)
    return second - first
