"""The names of quantizations. Imports neither torch nor bitsandbytes."""

from ..errors import InputError


QUANTIZATIONS = ("none", "int8", "nf4")


def check_quantization_name(quantization: str) -> None:
    """Checks the name of a requested quantization.

    Raises:
        InputError: if the name is unknown.
    """
    if quantization == "fp4":
        raise InputError(
            "--quantization 'fp4': no longer supported. Use 'nf4', which has the same size and a smaller error. "
            "Folders that were saved as fp4 load without the option"
        )
    if quantization not in QUANTIZATIONS:
        raise InputError(
            f"--quantization {quantization!r}: unknown quantization; use none, int8 (8 bit) or nf4 (4 bit)"
        )
