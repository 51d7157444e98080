"""Words of AWQ's "gemm" layout, as AutoAWQ writes them and vLLM and transformers read them.

Unlike GPTQ's, the zeros in the file are not shifted by one.
"""

import torch

from ..quantized.rounding import BITS, LARGEST


PER_WORD = 32 // BITS
# Nibble i of a word, from the low end, holds column ORDER[i] of its eight columns.
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


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
