"""Devices with their peak rate and memory and the source of each figure; types by name; sizes as text."""

import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Literal, NamedTuple

from .errors import InputError, did_you_mean


if TYPE_CHECKING:
    import torch

GIB = 2**30
_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class Device(NamedTuple):
    """An accelerator."""

    name: str  # as the driver reports it: `torch.cuda.get_device_name`
    flops: float  # bf16 tensor rate in FLOP/s, dense, with fp32 accumulation
    memory: int  # bytes that torch reports as the total; less than advertised, and less still with ECC
    source: str  # of the rate


# A bf16 product always accumulates in fp32. Data sheets print the rate with sparsity (twice the dense rate), and for
# GeForce also the rate with fp16 accumulation (again twice): training reaches neither.
# The memory is the smallest "total capacity" in torch's out-of-memory messages in public issue threads.
_A100 = "NVIDIA A100 data sheet: 312 TFLOPS BF16, 624 with sparsity"
_H100 = "NVIDIA H100 data sheet: 1979 TFLOPS BF16 with sparsity (SXM), 1513 (PCIe), 1671 (NVL)"
_H200 = "NVIDIA H200 data sheet: 1979 TFLOPS BF16 with sparsity (SXM), 1671 (NVL)"
_GA102 = "NVIDIA GA102 whitepaper: peak BF16 tensor TFLOPS with FP32 accumulate, dense"
_A40 = "NVIDIA A40 data sheet: 149.7 TFLOPS BF16, 299.4 with sparsity"
_L40S = "NVIDIA L40S data sheet: 362.05 TFLOPS BF16, 733 with sparsity"
_AD102 = "NVIDIA Ada whitepaper: peak BF16 tensor TFLOPS with FP32 accumulate, dense"
_GB202 = "NVIDIA RTX Blackwell whitepaper: peak BF16 tensor TFLOPS with FP32 accumulate, dense"

# By the name for the command line.
DEVICES: dict[str, Device] = {
    "h200": Device("NVIDIA H200", 989.5e12, int(139.72 * GIB), _H200),
    "h200-nvl": Device("NVIDIA H200 NVL", 835.5e12, int(139.72 * GIB), _H200),
    "h100": Device("NVIDIA H100 80GB HBM3", 989.5e12, int(79.1 * GIB), _H100),
    "h100-pcie": Device("NVIDIA H100 PCIe", 756.5e12, int(79.1 * GIB), _H100),
    "h100-nvl": Device("NVIDIA H100 NVL", 835.5e12, int(93.0 * GIB), _H100),
    "a100-40g": Device("NVIDIA A100-SXM4-40GB", 312e12, int(39.38 * GIB), _A100),
    "a100-80g": Device("NVIDIA A100-SXM4-80GB", 312e12, int(79.1 * GIB), _A100),
    "a100-40g-pcie": Device("NVIDIA A100-PCIE-40GB", 312e12, int(39.38 * GIB), _A100),
    "a100-80g-pcie": Device("NVIDIA A100 80GB PCIe", 312e12, int(79.1 * GIB), _A100),
    "a40": Device("NVIDIA A40", 149.7e12, int(44.34 * GIB), _A40),
    "l40s": Device("NVIDIA L40S", 362.05e12, int(44.34 * GIB), _L40S),
    "a6000": Device("NVIDIA RTX A6000", 154.8e12, int(47.4 * GIB), _GA102),
    "6000-ada": Device("NVIDIA RTX 6000 Ada Generation", 364.2e12, int(47.4 * GIB), _AD102),
    "3090": Device("NVIDIA GeForce RTX 3090", 71e12, int(23.68 * GIB), _GA102),
    "4090": Device("NVIDIA GeForce RTX 4090", 165.2e12, int(23.64 * GIB), _AD102),
    "5090": Device("NVIDIA GeForce RTX 5090", 209.5e12, int(31.36 * GIB), _GB202),
}  # fmt: skip

_BY_NAME = {device.name: device for device in DEVICES.values()}


def known_device(name: str | None) -> Device | None:
    """Returns the device with this driver name, `None` if it is not listed: a guess would be off by factors."""
    return _BY_NAME.get(name or "")


def find_device(key: str) -> Device:
    """Returns the device with a short name, such as `a100-40g`, or with the driver's name.

    Raises:
        InputError: if it is not listed.
    """
    device = DEVICES.get(key.lower()) or known_device(key)
    if device is not None:
        return device
    kinds = [name for name in DEVICES if name.startswith(f"{key.lower()}-")]
    fix = f"; use {', '.join(kinds)}" if kinds else did_you_mean(key.lower(), DEVICES)
    raise InputError(f"--device {key!r}: unknown device{fix}")


def find_dtype(name: str, valid: Collection[str] = ("fp32", "bf16")) -> "torch.dtype | None":
    """Returns the type with this name, `None` for `"auto"`.

    Raises:
        InputError: if it is not one of the valid names.
    """
    check_dtype(name, valid)
    import torch

    return None if name == "auto" else getattr(torch, _DTYPES[name])


def check_dtype(name: str, valid: Collection[str] = ("fp32", "bf16")) -> None:
    """Checks the name of a type, without importing torch; raises as [`find_dtype`]."""
    if name != "auto" and name not in valid:
        raise InputError(f"--dtype {name!r}: unknown type; use auto, {', '.join(valid)}")


def choose_precision() -> Literal["fp32", "bf16"]:
    """Returns the precision of a recipe that says `auto`: bf16 on a GPU that computes with it, fp32 otherwise."""
    import torch
    from accelerate.utils import parse_flag_from_env

    on_gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    return "bf16" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def check_device(name: str) -> None:
    """Checks the name of a device that runs a model, without importing torch.

    Raises:
        InputError: if it is not `auto`, `cpu`, `cuda` or `cuda:N`.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise InputError(f"--device {name!r}: unknown device; use auto, cpu, cuda or cuda:N")


def format_bytes(num_bytes: float) -> str:
    """Formats a size in powers of ten: `4.61 GB`, or below one GB `46.1 MB`."""
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"
