"""Opens files with tensors in any layout: safetensors, torch's zip archives, and shards of either.

Only headers are read until a tensor is requested, and then only that tensor. Every length in a file is checked against
the size of the file.
"""

import math
import os
import struct
import zipfile
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from ...errors import InputError, damaged, refuse_damage
from ...files import read_json
from ..checkpoint import LazyTensor
from .pickles import StoredTensor, read_pickle


SAFETENSORS_INDEX, BIN_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip
_CHUNK = 1 << 24
_MAX_JSON = 1 << 27  # bytes of an index or a configuration
_MAX_PICKLE = 1 << 24  # bytes of a pickle; that of a 70B model with its optimizer has about one million


def read_fields(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
        InputError: if the file is not valid JSON, not an object, or larger than any configuration or index.
    """
    if path.stat().st_size > _MAX_JSON:
        raise damaged(path, f"{path.stat().st_size} bytes of JSON")
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise damaged(path, "not a JSON object")
    return fields


def open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Returns the tensors of a safetensors file by name.

    Raises:
        InputError: if the file is damaged or has an unsupported dtype.
    """
    tensors = {}
    with refuse_damage(path), safe_open(path, framework="pt") as opened:
        for name in opened.keys():
            part = opened.get_slice(name)
            if part.get_dtype() not in SAFETENSORS_DTYPES:
                raise InputError(f"{path}: {name} has dtype {part.get_dtype()}; it must be F32, F16 or BF16")
            shape, dtype = tuple(part.get_shape()), SAFETENSORS_DTYPES[part.get_dtype()]
            tensors[name] = LazyTensor(shape, dtype, partial(_read_safetensor, path, name), f"{path}: {name}")
    return tensors


def _read_safetensor(path: Path, name: str) -> torch.Tensor:
    # Opened for each tensor, since an open file keeps everything that was read from it in memory.
    with refuse_damage(path), safe_open(path, framework="pt") as opened:
        return opened.get_tensor(name).clone()


def open_torch_archive(path: Path) -> Any:
    """Returns the contents of a `torch.save` file as plain data, with a [`LazyTensor`] for each tensor.

    No code of the file is run, see `pickles.py`. The checksum of a record is verified when it is first read.

    Raises:
        InputError: if the file is damaged, compressed, in torch's old container, or contains forbidden names.
    """
    return _Archive(path).contents()


class _Archive:
    """A zip file as torch writes it: uncompressed records, one of them a pickle and the others storages."""

    def __init__(self, path: Path):
        self.path = path
        self.checked: set[str] = set()
        with path.open("rb") as file:
            if file.read(1) == b"\x80":
                raise InputError(f"{path}: a pickle without a container. Save it again with torch 1.6 or later")
        with refuse_damage(path), zipfile.ZipFile(path) as opened:
            records = opened.infolist()
        pickles = [record for record in records if record.filename.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1 or len({record.filename for record in records}) < len(records):
            raise damaged(path, f"{len(pickles)} records data.pkl among {len(records)}")
        self.pickle = pickles[0]
        root = self.pickle.filename.removesuffix("data.pkl")
        self.records = {r.filename.removeprefix(root): r for r in records if r.filename.startswith(root)}
        for record in records:
            is_packed = record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size
            if is_packed or record.flag_bits & 1:
                raise InputError(f"{path}: {record.filename} is compressed or encrypted. Use files of torch.save")
        if "byteorder" in self.records and self._bytes(self.records["byteorder"]) != b"little":
            raise InputError(f"{path}: big-endian. Save it again on a little-endian machine")

    def contents(self) -> Any:
        """Returns the data of the pickle with lazy tensors."""
        if self.pickle.file_size > _MAX_PICKLE:
            raise damaged(self.path, f"a pickle of {self.pickle.file_size} bytes")
        self.unfolded = 0
        return self._replace(read_pickle(bytes(self._bytes(self.pickle)), str(self.path)), "", 0)

    def _replace(self, value: Any, where: str, depth: int) -> Any:
        # Bounded, since data that refers to itself or repeatedly to one object unfolds without limit.
        self.unfolded += 1
        if depth > 20 or self.unfolded > self.pickle.file_size:
            raise damaged(self.path, "its pickle refers to itself")
        if isinstance(value, StoredTensor):
            return self._lazy(value, where)
        if isinstance(value, dict):
            return {key: self._replace(item, f"{where}.{key}".lstrip("."), depth + 1) for key, item in value.items()}
        if isinstance(value, list) or type(value) is tuple:
            return [self._replace(item, where, depth + 1) for item in value]
        return value

    def _lazy(self, stored: StoredTensor, where: str) -> LazyTensor:
        record = self.records.get(f"data/{stored.storage.key}")
        if record is None or record.file_size != stored.storage.num_bytes:
            raise damaged(self.path, f"{where}: record data/{stored.storage.key} is missing or of another size")
        read = partial(self._read, stored, record)
        return LazyTensor(stored.shape, stored.dtype, read, f"{self.path}: {where}")

    def _read(self, stored: StoredTensor, record: zipfile.ZipInfo) -> torch.Tensor:
        """Reads the part of a storage that a tensor covers."""
        if not math.prod(stored.shape):
            return torch.empty(stored.shape, dtype=stored.dtype)
        span = 1 + sum((n - 1) * stride for n, stride in zip(stored.shape, stored.strides, strict=True))
        offset = stored.offset * stored.dtype.itemsize
        flat = torch.frombuffer(self._bytes(record), dtype=stored.dtype, count=span, offset=offset)
        return flat.as_strided(stored.shape, stored.strides).contiguous()

    def _bytes(self, record: zipfile.ZipInfo) -> memoryview:
        """Maps a record into memory; copying it would take longer than everything else.

        The mapping is private and ends with the last tensor in it. The first call verifies the checksum of the record.
        """
        if not record.file_size:
            return memoryview(b"")
        with refuse_damage(self.path):  # for positions outside the file, which may have become shorter
            contents = np.memmap(self.path, np.uint8, "c", self._begin(record), (record.file_size,)).data
        if record.filename not in self.checked:
            checksum = 0
            for position in range(0, record.file_size, _CHUNK):
                checksum = zlib.crc32(contents[position : position + _CHUNK], checksum)
            if checksum != record.CRC:
                raise damaged(self.path, f"wrong checksum of {record.filename}")
            self.checked.add(record.filename)
        return contents

    def _begin(self, record: zipfile.ZipInfo) -> int:
        """Returns the position of a record's contents after its local header, which can differ from the directory."""
        with self.path.open("rb") as file:
            file.seek(record.header_offset)
            header = file.read(30)
            if len(header) < 30 or header[:4] != b"PK\x03\x04":
                raise damaged(self.path, f"{record.filename} has no header at its position")
            name_length, extra_length = struct.unpack("<HH", header[26:30])
            if file.read(name_length) != record.orig_filename.encode("utf-8" if record.flag_bits & 0x800 else "cp437"):
                raise damaged(self.path, f"{record.filename} has another name in its header")
        return record.header_offset + 30 + name_length + extra_length


def open_sharded(index: Path) -> dict[str, LazyTensor]:
    """Returns the tensors of all shards in an index file.

    Raises:
        InputError: if a shard is missing, damaged, or inconsistent with the index.
    """
    weight_map = read_fields(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise damaged(index, "it has no weight_map of tensor names to files")
    tensors: dict[str, LazyTensor] = {}
    for name in sorted(set(weight_map.values())):
        shard = index.parent / name
        if Path(name).name != name:
            raise damaged(index, f"it refers to {name!r} outside its folder")
        if not os.path.isfile(shard):  # unlike `Path.is_file`, without an error for a damaged name that is too long
            raise InputError(f"{shard}: file not found, but listed in {index.name}. Download it")
        is_safetensors = shard.suffix == ".safetensors"
        found = open_safetensors(shard) if is_safetensors else as_state_dict(open_torch_archive(shard), shard)
        if lacking := [key for key, file in weight_map.items() if file == name and key not in found]:
            raise damaged(shard, f"{lacking[0]} is missing, but listed in {index.name}")
        if twice := found.keys() & tensors.keys():
            raise damaged(shard, f"{min(twice)} is also in another shard")
        tensors |= found
    return tensors


def as_state_dict(value: Any, path: Path) -> dict[str, LazyTensor]:
    """Returns the contents of an archive as a state dict.

    Raises:
        InputError: if they are not a dict of tensors.
    """
    if not isinstance(value, dict) or not value:
        raise InputError(f"{path}: contains a {type(value).__name__}; it must be a state dict of tensors")
    for key, item in value.items():
        if not isinstance(key, str) or not isinstance(item, LazyTensor):
            raise InputError(f"{path}: {key!r:.80} is not a named tensor; it must be a state dict of tensors")
    return value
