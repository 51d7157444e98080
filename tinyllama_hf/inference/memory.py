"""Memory of generation: whether a batch fits, before it is tried."""

from pathlib import Path

import psutil  # accelerate requires it
import torch
from transformers import PreTrainedModel

from ..errors import InputError
from .kv_cache import cache_size


# Left for what the allocator cannot use and, on a GPU, the CUDA context.
MEMORY_RESERVE = 0.1


def check_fits(model: PreTrainedModel, batch_size: int, context: int) -> None:
    """Refuses a batch whose keys and values would not fit the free memory of the model's device.

    Args:
        model (`PreTrainedModel`): a loaded Llama, quantised or not.
        batch_size (`int`): sequences at a time.
        context (`int`): tokens of the longest, prompt and continuation.

    Raises:
        InputError: naming `--batch-size` and the largest that fits.
    """
    free = free_memory(model.device)
    usable = int((1 - MEMORY_RESERVE) * free)
    needed = cache_size(model.config, batch_size, context, model.dtype).total
    if needed > usable:
        largest = usable * batch_size // needed
        fix = f"the largest that fits is {largest}" if largest else "not even 1 fits; shorten the sequences"
        raise InputError(
            f"--batch-size {batch_size}: keys and values of {context:,} tokens each take {gigabytes(needed)}, and "
            f"{gigabytes(usable)} of {model.device} can be used; {fix}"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device now; on a CPU those that can be taken without swapping, in the container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, _container_free())


def gigabytes(num_bytes: float) -> str:
    """`4.61 GB`, of 10^9 bytes."""
    return f"{num_bytes / 1e9:,.2f} GB"


def _container_free(root: Path = Path("/sys/fs/cgroup")) -> float:
    """What the limit of a container leaves; psutil (7.2) sees the host's memory alone."""
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            allowed = (root / limit).read_text().strip()
            taken = int((root / used).read_text())
            statistics = (root / limit).with_name("memory.stat").read_text()
        except OSError:
            continue
        if allowed.isdigit():
            lines = dict(line.split() for line in statistics.splitlines())
            return int(allowed) - taken + int(lines[cache])
    return float("inf")
