"""The names of quantizations. Imports neither torch nor the libraries that quantize."""

from ..errors import InputError


QUANTIZATIONS = ("none", "int8", "nf4", "int4", "fp8")
# The quantizations of torchao, with the lowest compute capability of an NVIDIA GPU that has their kernels.
GPU_CAPABILITIES = {"int4": (8, 0), "fp8": (8, 9)}


def check_quantization_name(quantization: str, device: str = "auto") -> None:
    """Checks the name of a requested quantization.

    Args:
        quantization (`str`): the name.
        device (`str`, *optional*, defaults to `"auto"`): the requested device; `"cpu"` has no kernels for int4 and
            fp8. GPUs are checked when the model is loaded.

    Raises:
        InputError: if the name is unknown, or the device does not support it.
    """
    if quantization == "fp4":
        raise InputError(
            "--quantization 'fp4': no longer supported. Use 'nf4', which has the same size and a smaller error. "
            "Folders that were saved as fp4 load without the option"
        )
    if quantization not in QUANTIZATIONS:
        raise InputError(
            f"--quantization {quantization!r}: unknown quantization; use none, int8 (8 bit) or nf4 (4 bit), or on an "
            "NVIDIA GPU int4 (4 bit) or fp8 (8 bit)"
        )
    if device == "cpu" and quantization in GPU_CAPABILITIES:
        raise unsupported_device(quantization, "a CPU")


def arithmetic_dtype(quantization: str, dtype: str) -> str:
    """Returns torch's name of the dtype that a model computes in, given the wanted one. int4 and fp8 need bf16."""
    return "bfloat16" if quantization in GPU_CAPABILITIES else dtype


def unsupported_device(quantization: str, device: str) -> InputError:
    """Returns the error for a device that lacks the kernels of a quantization."""
    major, minor = GPU_CAPABILITIES[quantization]
    return InputError(
        f"--quantization {quantization}: needs an NVIDIA GPU with compute capability {major}.{minor} or higher, not "
        f"{device}. Quantize the model to nf4 instead, which runs on every device"
    )
