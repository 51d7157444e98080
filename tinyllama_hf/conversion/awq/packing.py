"""Numbers of 4 bits in the "gemm" layout that AutoAWQ writes and vLLM and transformers read.

A weight `w` is kept as `(integer - zero) * scale`, where zero and scale belong to a group of consecutive inputs of one
output. Both stay as they are in the file: zeros are not shifted by one, as GPTQ's are.
"""

import torch


BITS = 4
PER_WORD = 32 // BITS
LARGEST = 2**BITS - 1
# Nibble i of a word, from its low end, holds the column ORDER[i] of its eight.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SMALLEST_SCALE = 2.0**-24  # of float16; a group of zeros would divide by zero


def quantize_groups(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rounds a weight to 16 levels between the lowest and the highest of each group, zero being one of the levels.

    The scale is rounded to float16 before it divides, so that the integers are the nearest ones for the scale that a
    reader finds in the file.

    Args:
        weight (`torch.Tensor`): `[out, in]`, finite, float32 or less.
        group_size (`int`): consecutive inputs that share scale and zero; divides `in`.

    Returns:
        Integers `[out, in]` (uint8, 0 to 15), scales `[out, in / group_size]` (float16, infinite where a group spans
        more than 15 times what float16 holds) and zeros `[out, in / group_size]` (uint8, 0 to 15).
    """
    groups = weight.float().unflatten(1, (-1, group_size))  # [out, in / group_size, group_size]
    # A group all above or below zero has no zero point within 0 to 15 unless its range is widened to zero.
    lowest, highest = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scales = ((highest - lowest) / LARGEST).to(torch.float16).clamp(min=SMALLEST_SCALE)
    step = scales.float()
    zeros = (-lowest / step).round().clamp(0, LARGEST)
    integers = (groups / step[..., None]).round().add(zeros[..., None]).clamp(0, LARGEST)
    return integers.flatten(1).to(torch.uint8), scales, zeros.to(torch.uint8)


def dequantize_groups(integers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """The weight that readers compute with.

    Args:
        integers, scales, zeros (`torch.Tensor`): as of [`quantize_groups`].

    Returns:
        `[out, in]`, float16: the product is rounded once, as in the published kernels.
    """
    groups = integers.to(torch.float16).unflatten(1, (scales.shape[1], -1))
    return ((groups - zeros[..., None]) * scales[..., None]).flatten(1)


def pack(integers: torch.Tensor) -> torch.Tensor:
    """Packs eight neighbouring columns into one word.

    Args:
        integers (`torch.Tensor`): `[rows, columns]`, 0 to 15; 8 divides `columns`.

    Returns:
        `[rows, columns / 8]`, int32.
    """
    words = integers.to(torch.int32).unflatten(1, (-1, PER_WORD))[..., list(ORDER)]
    return (words << _shifts()).sum(2, dtype=torch.int32)  # the bits are disjoint; the highest becomes the sign


def unpack(words: torch.Tensor) -> torch.Tensor:
    """Undoes [`pack`]: `[rows, columns / 8]` (int32) to `[rows, columns]` (uint8)."""
    nibbles = (words[..., None] >> _shifts()) & LARGEST
    place = torch.tensor(ORDER).argsort()  # where each column's nibble stands
    return nibbles[..., place].flatten(1).to(torch.uint8)


def _shifts() -> torch.Tensor:
    return torch.arange(0, 32, BITS, dtype=torch.int32)
