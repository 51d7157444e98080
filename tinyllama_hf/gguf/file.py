"""Reads GGUF files: the header, with strict checks, and the values of one tensor at a time.

The reader of the package `gguf` (0.19) does not check lengths. It reads empty arrays past the end of the file, so that
a damaged array length of 2**40 fills the memory (shown in tests/gguf/test_file.py). Here every length is checked
against the rest of the file before anything is read or allocated.
"""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ..errors import InputError, damaged, require


# ggml's types: number -> name, values per block, bytes per block. They equal gguf.constants.GGML_QUANT_SIZES, but
# reading a header should not require that package.
_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
PLAIN = {"F32": "<f4", "F16": "<f2", "BF16": "<i2"}  # names of numpy, which has no bfloat16
QUANTIZED = ("Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K")
# Types of metadata values: number -> numpy's name. 8 is a string, 9 an array.
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
# Far above any vocabulary, so that a damaged length does not take minutes and gigabytes.
_MAX_ITEMS, _MAX_HEADER = 2**22, 2**28
_MAX_DIMENSIONS = 4
_CHUNK = 2**22  # values to dequantize at once


class GGUFTensor(NamedTuple):
    """A tensor in the file: shape in torch's order, ggml's name of its type, and position in bytes."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """The header of a file: metadata by key, with arrays as lists, and tensors by name in the order of the file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    def value(self, key: str, kind: type, default: Any = None) -> Any:
        """Returns a metadata value, or `default` if it is missing.

        Raises:
            InputError: if it does not have the type `kind`.
        """
        found = self.metadata.get(key)
        if found is not None and type(found) is not kind:
            raise damaged(self.path, f"{key} is {str(found)[:40]!r}, not of type {kind.__name__}")
        return default if found is None else found

    def array(self, key: str, kind: type) -> list[Any]:
        """Returns a metadata array, empty if it is missing; raises like [`value`]."""
        items = self.value(key, list, [])
        if not all(type(item) is kind for item in items):
            raise damaged(self.path, f"the items of {key} are not all of type {kind.__name__}")
        return items


def read_header(path: str | os.PathLike) -> GGUFHeader:
    """Reads the metadata and the positions of all tensors.

    Raises:
        InputError: if the file is damaged, or not a little-endian GGUF file of version 2 or 3.
    """
    path = Path(path)
    with path.open("rb") as stream:
        header = _Stream(stream, path)
        tensor_count = header.start()
        metadata: dict[str, Any] = {}
        for _ in range(header.unpack("<Q")):
            key = header.string("a metadata key")
            if not key or key in metadata:
                raise header.damaged(f"the metadata key {key!r} is empty or repeated")
            metadata[key] = header.value(key, header.unpack("<I"))
        infos: dict[str, GGUFTensor] = {}
        for _ in range(tensor_count):
            tensor = header.tensor_info()
            if not tensor.name or tensor.name in infos:
                raise header.damaged(f"the tensor name {tensor.name!r} is empty or repeated")
            infos[tensor.name] = tensor
        return GGUFHeader(path, metadata, _placed(header, metadata, infos))


def read_values(path: Path, tensor: GGUFTensor) -> np.ndarray:
    """Reads one tensor.

    Returns:
        `np.ndarray` of the tensor's shape: float32 and float16 unchanged, bfloat16 as int16 bits, and quantized
        tensors dequantized to float32 by the reference implementation of the package `gguf`.

    Raises:
        InputError: if the file has become shorter since its header was read.
    """
    data = np.fromfile(path, np.uint8, count=tensor.num_bytes, offset=tensor.offset)
    if data.size != tensor.num_bytes:
        raise InputError(f"{path}: ends within {tensor.name}; the file was changed while it was read")
    if tensor.type in PLAIN:
        return data.view(PLAIN[tensor.type]).reshape(tensor.shape)
    require("gguf", "gguf", f"{path}: dequantizing {tensor.type}")
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[tensor.type]
    rows = data.reshape(math.prod(tensor.shape[:-1]), -1)
    values = np.empty((len(rows), tensor.shape[-1]), np.float32)
    step = max(1, _CHUNK // tensor.shape[-1])
    for start in range(0, len(rows), step):
        with np.errstate(all="ignore"):  # values that are not finite are found by `Checkpoint.load`
            values[start : start + step] = dequantize(rows[start : start + step], kind)
    return values.reshape(tensor.shape)


def check_readable(path: Path, tensor: GGUFTensor) -> None:
    """Raises an `InputError` if [`read_values`] does not support the type of a tensor."""
    if tensor.type not in PLAIN and tensor.type not in QUANTIZED:
        types = ", ".join((*PLAIN, *QUANTIZED))
        fix = "Convert it to F16 with llama.cpp's llama-quantize --allow-requantize"
        raise InputError(f"{path}: {tensor.name} has the unsupported type {tensor.type}; supported: {types}. {fix}")


def _placed(header: "_Stream", metadata: dict[str, Any], infos: dict[str, GGUFTensor]) -> dict[str, GGUFTensor]:
    """Returns the tensors with offsets from the start of the file, after checking that they fill it without gaps."""
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise header.damaged(f"general.alignment is {alignment!r}, not a power of two")
    start = -(-header.position // alignment) * alignment
    end = 0
    for tensor in sorted(infos.values(), key=lambda tensor: tensor.offset):
        # As in llama.cpp: a gap or a rest would be a tensor that a damaged number hides.
        if tensor.offset != -(-end // alignment) * alignment:
            reason = f"overlaps with another tensor, leaves a gap, or is not aligned to {alignment}"
            raise header.damaged(f"{tensor.name} {reason}")
        end = tensor.offset + tensor.num_bytes
        if start + end > header.size:
            raise header.damaged(f"{tensor.name} ends at byte {start + end}, but the file at {header.size}")
    if header.size - start - end >= alignment:
        raise header.damaged(f"{header.size - start - end} bytes after its last tensor")
    return {name: tensor._replace(offset=start + tensor.offset) for name, tensor in infos.items()}


class _Stream:
    """Reads a file from its start, checking every length against the rest of the file."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self.stream, self.path = stream, path
        self.size = os.fstat(stream.fileno()).st_size
        self.position = 0

    def damaged(self, what: str) -> InputError:
        return damaged(self.path, what)

    def take(self, length: int, what: str) -> bytes:
        if length > self.size - self.position:
            left = self.size - self.position
            raise self.damaged(f"{what} at byte {self.position} has a length of {length} bytes, but {left} are left")
        self.position += length
        if self.position > _MAX_HEADER:
            raise self.damaged(f"its header is longer than {_MAX_HEADER} bytes")
        data = self.stream.read(length)
        if len(data) != length:
            raise self.damaged("it became shorter while it was read")
        return data

    def unpack(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form), "a number"))[0]

    def string(self, what: str) -> str:
        length = self.unpack("<Q")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damaged(f"{what} before byte {self.position} is not UTF-8") from error

    def start(self) -> int:
        """Checks magic and version; returns the number of tensors."""
        if self.take(min(4, self.size), "the magic") != b"GGUF":
            raise self.damaged("it does not begin with GGUF")
        version = self.unpack("<I")
        if version not in (2, 3):
            swapped = version and not version & 0xFFFF
            raise self.damaged("big-endian" if swapped else f"version {version}; supported are 2 and 3")
        return self.unpack("<Q")

    def value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self.string(key)
        if kind in _SCALARS:
            return self.numbers(key, kind, 1)[0]
        if kind != _ARRAY:
            raise self.damaged(f"{key} has the unknown type {kind}")
        items, length = self.unpack("<I"), self.unpack("<Q")
        if items not in _SCALARS and items != _STRING:
            raise self.damaged(f"{key} is an array of type {items}, neither numbers nor strings")
        if length > _MAX_ITEMS or (items == _STRING and length * 8 > self.size - self.position):
            raise self.damaged(f"{key} has a length of {length} items")
        return [self.string(key) for _ in range(length)] if items == _STRING else self.numbers(key, items, length)

    def numbers(self, key: str, kind: int, length: int) -> list[Any]:
        data = self.take(length * np.dtype(_SCALARS[kind]).itemsize, key)
        if kind == 7 and data.strip(b"\x00\x01"):
            raise self.damaged(f"{key} is neither true nor false")
        return np.frombuffer(data, _SCALARS[kind]).tolist()

    def tensor_info(self) -> GGUFTensor:
        """Reads the description of a tensor; its offset counts from the start of the values."""
        name = self.string("a tensor's name")
        dimensions = self.unpack("<I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self.damaged(f"{name} has {dimensions} dimensions")
        shape = struct.unpack(f"<{dimensions}Q", self.take(8 * dimensions, name))[::-1]
        number, offset = self.unpack("<I"), self.unpack("<Q")
        if number not in _TYPES:
            raise self.damaged(f"{name} has the unknown type {number}")
        kind, block, block_bytes = _TYPES[number]
        if 0 in shape or shape[-1] % block:
            raise self.damaged(f"{name} has the shape {list(shape)}; rows of {kind} must be multiples of {block}")
        # Python's integers, so that a product of damaged lengths does not overflow.
        return GGUFTensor(name, shape, kind, offset, math.prod(shape) // block * block_bytes)
