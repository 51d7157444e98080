"""Opens the files that hold tensors, whatever their layout: safetensors, torch's zip archives, and folders of either.

Nothing is read but headers until a tensor is asked for, and then only that tensor. Every length in a file is held
against the file's size before it is believed.
"""

import math
import mmap
import struct
import zipfile
import zlib
from functools import partial
from pathlib import Path
from typing import Any

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
}  # fmt: skip
_CHUNK = 1 << 24
_MAX_JSON = 1 << 27  # bytes of an index or a configuration
_MAX_PICKLE = 1 << 24  # bytes of a description; that of a 70B model with its optimiser takes about one million


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a JSON file.

    Raises:
        InputError: if it is no JSON, holds no fields, or is larger than any configuration or index.
    """
    if path.stat().st_size > _MAX_JSON:
        raise damaged(path, f"{path.stat().st_size} bytes of JSON")
    fields = read_json(path)
    if not isinstance(fields, dict):
        raise damaged(path, "it holds no fields")
    return fields


def is_file(path: Path) -> bool:
    """Whether a file of this name is there; a damaged name may be too long for there to be any."""
    try:
        return path.is_file()
    except OSError:
        return False


def open_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file by their names.

    Raises:
        InputError: if the file is damaged or holds a type that torch does not have.
    """
    tensors = {}
    with refuse_damage(path), safe_open(path, framework="pt") as opened:
        for name in opened.keys():
            part = opened.get_slice(name)
            if part.get_dtype() not in SAFETENSORS_DTYPES:
                raise InputError(f"{path}: {name} is of type {part.get_dtype()}; weights are F32, F16 or BF16")
            shape, dtype = tuple(part.get_shape()), SAFETENSORS_DTYPES[part.get_dtype()]
            tensors[name] = LazyTensor(shape, dtype, partial(_read_safetensor, path, name), f"{path}: {name}")
    return tensors


def _read_safetensor(path: Path, name: str) -> torch.Tensor:
    # Opened for each tensor: a file that stays open keeps all that was read of it in memory.
    with refuse_damage(path), safe_open(path, framework="pt") as opened:
        return opened.get_tensor(name).clone()


def open_torch_archive(path: Path) -> Any:
    """What was given to `torch.save`, as plain data with a [`LazyTensor`] in place of each tensor.

    No code of the file is run: see `pickles.py`. The checksum of a record is held the first time that it is read.

    Raises:
        InputError: if the file is damaged, compressed, of torch's older container, or names what it should not.
    """
    archive = _Archive(path)
    return archive.tensors_in(read_pickle(archive.description(), str(path)))


class _Archive:
    """A zip file as torch writes it: records that are not compressed, one of them a pickle, the others storages."""

    def __init__(self, path: Path):
        self.path = path
        self.checked: set[str] = set()
        with path.open("rb") as file:
            begin = file.read(4)
        if begin[:1] == b"\x80":
            raise InputError(
                f"{path}: a pickle without a container, as torch wrote before 1.6; open it with that torch and save it again"
            )
        if begin != b"PK\x03\x04":
            raise damaged(path, f"it begins with {begin!r}, as no file that torch.save wrote")
        with refuse_damage(path), zipfile.ZipFile(path) as opened:
            records = opened.infolist()
        pickles = [record for record in records if record.filename.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1 or len({record.filename for record in records}) < len(records):
            raise damaged(path, f"{len(pickles)} records data.pkl among {len(records)}")
        self.pickle = pickles[0]
        self.root = self.pickle.filename.removesuffix("data.pkl")
        inside = [record for record in records if record.filename.startswith(self.root)]
        self.records = {record.filename.removeprefix(self.root): record for record in inside}
        size = path.stat().st_size
        for record in records:
            is_packed = record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size
            if is_packed or record.flag_bits & 1:
                raise InputError(f"{path}: {record.filename} is compressed or encrypted, which torch.save never does")
            if record.header_offset < 0 or record.header_offset + record.file_size > size:
                raise damaged(path, f"{record.filename} lies outside the file")
        if "byteorder" in self.records and self._bytes(self.records["byteorder"]) != b"little":
            raise InputError(f"{path}: written on a big-endian machine; save it again on a little-endian one")

    def description(self) -> bytes:
        if self.pickle.file_size > _MAX_PICKLE:
            raise damaged(self.path, f"a pickle of {self.pickle.file_size} bytes")
        return bytes(self._bytes(self.pickle))

    def tensors_in(self, value: Any) -> Any:
        """The same data with lazy tensors, in containers of its own."""
        # What refers to itself, or many times to one thing, would unfold to more than it was written as.
        self.unfolded = 0
        return self._replace(value, "", 0)

    def _replace(self, value: Any, where: str, depth: int) -> Any:
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
        itemsize = stored.storage.dtype.itemsize if stored.storage.dtype else 1
        if record is None or record.file_size != stored.storage.numel * itemsize:
            raise damaged(
                self.path, f"{where} lies in record data/{stored.storage.key}, which is missing or of another size"
            )
        read = partial(self._read, stored, record)
        return LazyTensor(stored.shape, stored.dtype, read, f"{self.path}: {where}")

    def _read(self, stored: StoredTensor, record: zipfile.ZipInfo) -> torch.Tensor:
        """The span of its storage that a tensor covers, in memory of its own."""
        itemsize = stored.dtype.itemsize
        span = 1 + sum((n - 1) * stride for n, stride in zip(stored.shape, stored.strides, strict=True))
        if not math.prod(stored.shape):
            return torch.empty(stored.shape, dtype=stored.dtype)
        data = self._bytes(record, stored.offset * itemsize, span * itemsize)
        flat = torch.frombuffer(data, dtype=stored.dtype)
        return flat.as_strided(stored.shape, stored.strides).contiguous()

    def _bytes(self, record: zipfile.ZipInfo, offset: int = 0, length: int | None = None) -> memoryview:
        """Part of a record, mapped and not copied: memory of one's own would cost more time than all the rest.

        The mapping is private and goes with the last tensor that lies in it. The first time, the whole record goes through
        its checksum.
        """
        if not record.file_size:
            return memoryview(b"")
        with self.path.open("rb") as file:
            begin = self._begin(file, record)
            page = begin % mmap.ALLOCATIONGRANULARITY
            length_from_page = page + record.file_size
            with refuse_damage(self.path):  # the file became shorter
                mapped = mmap.mmap(file.fileno(), length_from_page, access=mmap.ACCESS_COPY, offset=begin - page)
        contents = memoryview(mapped)[page:]
        if record.filename not in self.checked:
            checksum = 0
            for position in range(0, record.file_size, _CHUNK):
                checksum = zlib.crc32(contents[position : position + _CHUNK], checksum)
            if checksum != record.CRC:
                raise damaged(self.path, f"the checksum of {record.filename} does not hold")
            self.checked.add(record.filename)
        return contents[offset : None if length is None else offset + length]

    def _begin(self, file: Any, record: zipfile.ZipInfo) -> int:
        """Where the contents of a record begin, after its local header, whose lengths may differ from the directory's."""
        file.seek(record.header_offset)
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise damaged(self.path, f"{record.filename} has no header where the directory says")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        if file.read(name_length) != record.orig_filename.encode("utf-8" if record.flag_bits & 0x800 else "cp437"):
            raise damaged(self.path, f"{record.filename} has another name in its header")
        return record.header_offset + 30 + name_length + extra_length


def open_sharded(index: Path) -> dict[str, LazyTensor]:
    """The tensors of all shards that an index file names.

    Raises:
        InputError: if a shard is missing or damaged, or holds other tensors than the index says.
    """
    weight_map = read_fields(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise damaged(index, "it has no weight_map of tensor names to files")
    tensors: dict[str, LazyTensor] = {}
    for name in sorted(set(weight_map.values())):
        shard = index.parent / name
        if Path(name).name != name:
            raise damaged(index, f"it names the file {name!r} outside its folder")
        if not is_file(shard):
            raise InputError(f"{shard}: is missing, but {index.name} names it; fetch it")
        is_safetensors = shard.suffix == ".safetensors"
        found = open_safetensors(shard) if is_safetensors else state_dict(open_torch_archive(shard), shard)
        if lacking := [key for key, file in weight_map.items() if file == name and key not in found]:
            raise InputError(f"{shard}: lacks {lacking[0]}, which {index.name} says it holds; fetch both again")
        if twice := found.keys() & tensors.keys():
            raise InputError(f"{shard}: holds {min(twice)}, which another shard holds too; fetch them again")
        tensors |= found
    return tensors


def state_dict(value: Any, path: Path) -> dict[str, LazyTensor]:
    """Takes what an archive holds for a mapping of names to tensors.

    Raises:
        InputError: if it is something else.
    """
    if not isinstance(value, dict) or not value:
        raise InputError(f"{path}: holds a {type(value).__name__} where a state dict of tensors is expected")
    for key, item in value.items():
        if not isinstance(key, str) or not isinstance(item, LazyTensor):
            raise InputError(f"{path}: {key!r:.80} is no tensor under a name; a state dict of tensors is expected")
    return value
