"""4-bit integers with a scale and a zero point per group of inputs, as AWQ and W4A16 store them.

A weight is `(integer - zero) * scale`, where zero and scale belong to a group of consecutive inputs of one output.
"""

import torch


BITS = 4
LARGEST = 2**BITS - 1
SMALLEST_SCALE = 2.0**-24  # smallest float16; avoids division by zero for a group of zeros


def quantize_groups(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rounds a weight to 16 levels between the minimum and maximum of each group; zero is one of the levels.

    The scale is rounded to float16 before the division, so the integers are the nearest ones for the stored scale.

    Args:
        weight (`torch.Tensor`): `[out, in]`, finite, at most float32.
        group_size (`int`): number of consecutive inputs that share scale and zero; divides `in`.

    Returns:
        Integers `[out, in]` (uint8, 0 to 15), scales `[out, in / group_size]` (float16, infinite if a group spans more
        than 15 times the float16 range) and zeros `[out, in / group_size]` (uint8, 0 to 15).
    """
    groups = weight.float().unflatten(1, (-1, group_size))  # [out, in / group_size, group_size]
    # Without zero in its range, a group of only positive or only negative values has no zero point from 0 to 15.
    lowest, highest = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scales = ((highest - lowest) / LARGEST).to(torch.float16).clamp(min=SMALLEST_SCALE)
    step = scales.float()
    zeros = (-lowest / step).round().clamp(0, LARGEST)
    integers = (groups / step[..., None]).round().add(zeros[..., None]).clamp(0, LARGEST)
    return integers.flatten(1).to(torch.uint8), scales, zeros.to(torch.uint8)


def dequantize_groups(integers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Returns the weight that readers compute with.

    Args:
        integers, scales, zeros (`torch.Tensor`): the results of [`quantize_groups`].

    Returns:
        The weight `[out, in]` in float16. The product is rounded once, as in the published kernels.
    """
    groups = integers.to(torch.float16).unflatten(1, (scales.shape[1], -1))
    return ((groups - zeros[..., None]) * scales[..., None]).flatten(1)
