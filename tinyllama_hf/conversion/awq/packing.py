"""4-bit integers in AWQ's "gemm" layout, as AutoAWQ writes it and vLLM and transformers read it.

A weight is stored as `(integer - zero) * scale`, where zero and scale belong to a group of consecutive inputs of one
output. Unlike GPTQ's, the zeros in the file are not shifted by one.
"""

import torch


BITS = 4
PER_WORD = 32 // BITS
LARGEST = 2**BITS - 1
# Nibble i of a word, from the low end, holds column ORDER[i] of its eight columns.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
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


def pack(integers: torch.Tensor) -> torch.Tensor:
    """Packs `[rows, columns]` integers from 0 to 15 into int32 words `[rows, columns / 8]`; 8 divides `columns`."""
    words = integers.to(torch.int32).unflatten(1, (-1, PER_WORD))[..., list(ORDER)]
    return (words << _shifts()).sum(2, dtype=torch.int32)  # the bits are disjoint; the highest is the sign


def unpack(words: torch.Tensor) -> torch.Tensor:
    """Unpacks int32 words `[rows, columns / 8]` into uint8 `[rows, columns]`, the inverse of [`pack`]."""
    nibbles = (words[..., None] >> _shifts()) & LARGEST
    place = torch.tensor(ORDER).argsort()  # nibble of each column
    return nibbles[..., place].flatten(1).to(torch.uint8)


def _shifts() -> torch.Tensor:
    return torch.arange(0, 32, BITS, dtype=torch.int32)
