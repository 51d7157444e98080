"""Formats and arguments of a conversion, checked without importing torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, did_you_mean
from ..files import read_json


# Upper bound of the bytes per parameter in the output, to check the free disk space.
NUMBER_BYTES = {"gguf-f32": 4, "gguf-f16": 2, "gguf-bf16": 2, "gguf-q8_0": 1.1, "gguf-q4_0": 0.6, "w4a16": 2,
                "awq": 2}  # fmt: skip
FORMATS = ("llama", "litgpt", *NUMBER_BYTES)
_K_QUANTS = ("q3_k_m", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")
# Formats written by other programs, and the format that each of these programs reads.
HAND_OFF = {**{f"gguf-{kind}": "gguf-f16" for kind in _K_QUANTS}, "gptq": "llama"}
LORA = "gguf-lora"  # of an adapter; the other formats are of models
CALIBRATED = ("w4a16", "awq")  # the scales are searched on calibration text
MAX_SHARD_SIZE = "5GB"
DTYPES = ("fp32", "bf16", "fp16")


def check_arguments(
    to: str, dtype: str, max_shard_size: str, calibration: Sequence, base: Any, of_models: Mapping[str, Any]
) -> None:
    """Checks the arguments of [`convert`] against the format.

    Args:
        of_models (`Mapping[str, Any]`): by their names, the options that an adapter does not have.

    Raises:
        InputError: if the format is unknown or does not take an argument.
    """
    if to not in (*FORMATS, *HAND_OFF, LORA):
        raise InputError(f"--to {to!r}: unknown format{did_you_mean(to, (*FORMATS, *HAND_OFF, LORA))}")
    if base is not None and to != LORA:
        raise InputError(f"--base {base}: only used by {LORA}, not by {to}. Remove it")
    if given := [name for name, value in of_models.items() if value] if to == LORA else ():
        raise InputError(f"{given[0]}: changes a model, and {LORA} holds an adapter. Remove it")
    if dtype != "auto" and to not in ("llama", "litgpt"):
        raise InputError(f"--dtype {dtype}: the format {to} has fixed dtypes. Use --dtype with llama or litgpt")
    if max_shard_size != MAX_SHARD_SIZE and (to == "litgpt" or to.startswith("gguf-")):
        raise InputError(f"--max-shard-size {max_shard_size}: {to} is a single file. Use it with llama, w4a16 or awq")
    if calibration and to not in CALIBRATED:
        raise InputError(f"--calibration: only used by {' and '.join(CALIBRATED)}, not by {to}. Remove it")
    for path in calibration:
        if not Path(path).is_file():
            raise InputError(f"--calibration {path}: file not found")


def check_destination(to: str, output: Path, source: str | Path, force: bool) -> None:
    """Checks the output of a conversion, which is a file for `gguf-lora` and a folder for other formats.

    Raises:
        InputError: if it cannot be written.
    """
    if to != LORA:
        return check_output(output, source, force)
    if output.suffix != ".gguf" or output.is_dir():
        raise InputError(f"--output {output}: {LORA} is one file. Give a name that ends in .gguf")
    _check_parents(output)
    if output.exists() and not force:
        raise InputError(f"--output {output}: already exists. Choose another name, or pass --force to replace it")
    if output.exists() and not _is_gguf(output):
        raise InputError(f"--output {output}: not a GGUF file, so --force does not replace it. Choose another name")


def _is_gguf(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def _check_parents(output: Path) -> None:
    if blocked := next((path for path in output.absolute().parents if path.exists() and not path.is_dir()), None):
        raise InputError(f"--output {output}: {blocked} is a file. Choose another folder")


def check_output(
    output: Path, source: str | Path, force: bool, record: str = "conversion", option: str = "--force"
) -> None:
    """Refuses an output folder with contents, unless `force` is set and the same command wrote it.

    Args:
        record (`str`, *optional*, defaults to `"conversion"`): key of `provenance.json` that only this command writes.
        option (`str`, *optional*, defaults to `"--force"`): its option that sets `force`, for the messages.

    Raises:
        InputError: if the folder cannot be written.
    """
    _check_parents(output)
    given = Path(source)
    if given.exists() and given.resolve().is_relative_to(output.resolve()):
        raise InputError(f"--output {output}: contains the source {source}. Choose another folder")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not force:
        raise InputError(f"--output {output}: already exists. Choose another folder, or pass {option} to replace it")
    file = output / "provenance.json"
    written = read_json(file) if file.is_file() else None
    if not isinstance(written, dict) or record not in written:
        fix = "Choose another folder, or remove it yourself"
        raise InputError(f"--output {output}: not written by a {record}, so {option} does not replace it. {fix}")
