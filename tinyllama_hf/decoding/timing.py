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


def wait_for(point: Mark) -> None:
    """Waits until the device has reached a mark."""
    if isinstance(point, torch.cuda.Event):
        point.synchronize()


def seconds_between(first: Mark, second: Mark) -> float:
    """Returns the seconds between two marks of one device, which it has reached."""
    if isinstance(first, torch.cuda.Event) and isinstance(second, torch.cuda.Event):
        return first.elapsed_time(second) / 1e3
    assert isinstance(first, float) and isinstance(second, float)
    return second - first
