"""Writes the format `awq`: 4-bit linear layers in the layout that vLLM, AutoAWQ and transformers read."""

from collections.abc import Sequence
from pathlib import Path

import torch

from ..checkpoint import Checkpoint
from ..quantized.four_bit import FourBitLayout, write_four_bit
from ..quantized.rounding import BITS
from ..writing import Spec
from .packing import PER_WORD, pack


GROUP_SIZE = 128
# `quantization_config` in config.json. Readers expect 4 bit in every linear layer that is not listed.
QUANTIZATION = {"quant_method": "awq", "bits": BITS, "group_size": GROUP_SIZE, "zero_point": True, "version": "gemm",
                "modules_to_not_convert": ["lm_head"]}  # fmt: skip


def write_awq(
    checkpoint: Checkpoint, folder: Path, calibration: Sequence[str] | None, max_shard_size: int
) -> tuple[str, dict[str, str]]:
    """Writes weights and `config.json`; see [`write_four_bit`]."""
    layout = FourBitLayout("awq", GROUP_SIZE, QUANTIZATION, _specs, _pack)
    return write_four_bit(checkpoint, folder, calibration, max_shard_size, layout)


def _specs(rows: int, width: int) -> dict[str, Spec]:
    groups = width // GROUP_SIZE
    return {
        "qweight": (torch.int32, (width, rows // PER_WORD)),
        "qzeros": (torch.int32, (groups, rows // PER_WORD)),
        "scales": (torch.float16, (groups, rows)),
    }


def _pack(integers: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return pack(integers.T), pack(zeros.T), scales.T
