"""Writes files tensor by tensor, with at most two tensors in memory."""

import collections
import hashlib
import io
import json
import math
import pickle
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..files import write_json
from .reading.containers import SAFETENSORS_DTYPES, SAFETENSORS_INDEX
from .reading.pickles import STORAGES


Spec = tuple[torch.dtype, tuple[int, ...]]  # of a tensor that will be written
_SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_STORAGES = {dtype: getattr(torch, name) for name, dtype in STORAGES.items()}


def prefetch(items: Iterable[Any]) -> Iterator[Any]:
    """Yields the same items, each computed while the previous one is in use, so that reading overlaps with writing."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = reader.submit(next, iterator, end)
            yield item


def write_safetensors(
    folder: Path, specs: Mapping[str, Spec], tensors: Iterable[torch.Tensor], max_shard_size: int
) -> dict[str, str]:
    """Writes `model.safetensors`, or shards of at most `max_shard_size` bytes with an index.

    A tensor larger than a shard is written to a separate shard.

    Args:
        specs (`Mapping[str, tuple]`): dtype and shape by name.
        tensors (`Iterable[torch.Tensor]`): the tensors in the order of `specs`. Tensors are written without gaps, so
            wider dtypes must come first for aligned values.

    Returns:
        The SHA-256 of the weight files by name.
    """
    shards: list[dict[str, Spec]] = [{}]
    for name, spec in specs.items():
        if shards[-1] and sum(map(_num_bytes, shards[-1].values())) + _num_bytes(spec) > max_shard_size:
            shards.append({})
        shards[-1][name] = spec
    number = len(shards)
    names = ["model.safetensors"]
    if number > 1:
        names = [f"model-{i:05}-of-{number:05}.safetensors" for i in range(1, number + 1)]
    coming = iter(tensors)
    digests = {file: _write_shard(folder / file, shard, coming) for file, shard in zip(names, shards, strict=True)}
    if number > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(map(_num_bytes, specs.values()))
        write_json(folder / SAFETENSORS_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return digests


def _write_shard(path: Path, specs: Mapping[str, Spec], tensors: Iterator[torch.Tensor]) -> str:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        end = offset + _num_bytes(spec)
        header[name] = {"dtype": _SAFETENSORS_NAMES[spec[0]], "shape": spec[1], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256(begin)

    def hashed() -> Iterator[memoryview]:
        for name, spec in specs.items():
            raw = _raw(next(tensors), spec, name)
            digest.update(raw)
            yield raw

    with path.open("wb") as file:
        file.write(begin)
        for raw in prefetch(hashed()):
            file.write(raw)
    return digest.hexdigest()


def write_torch_archive(path: Path, specs: Mapping[str, Spec], tensors: Iterable[torch.Tensor]) -> None:
    """Writes a state dict like `torch.save`, for `torch.load(weights_only=True)` with or without `mmap`.

    `torch.save` needs the whole state dict in memory. This uses the writer of its container, which takes one record
    after another. It is private; `torch.save` and litgpt's converter use it too.
    """
    description = io.BytesIO()
    _Pickler(description, protocol=2).dump({name: _Stored(i, *spec) for i, (name, spec) in enumerate(specs.items())})
    writer = torch._C.PyTorchFileWriter(str(path))
    writer.write_record("data.pkl", description.getvalue(), len(description.getvalue()))
    writer.write_record("byteorder", b"little", len(b"little"))
    for i, ((name, spec), tensor) in enumerate(zip(specs.items(), tensors, strict=True)):
        _raw(tensor, spec, name)
        storage = tensor.contiguous().untyped_storage()
        writer.write_record(f"data/{i}", storage, _num_bytes(spec))  # type: ignore[arg-type]  # torch.save passes it too
    writer.write_end_of_file()


class _Record(NamedTuple):
    number: int
    dtype: torch.dtype
    numel: int


class _Stored:
    """Pickles as a tensor at the start of a separate record."""

    def __init__(self, number: int, dtype: torch.dtype, shape: tuple[int, ...]):
        self.record, self.shape = _Record(number, dtype, math.prod(shape)), shape

    def __reduce__(self) -> tuple[Any, tuple]:
        strides = tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        hooks: dict[str, Any] = collections.OrderedDict()
        return torch._utils._rebuild_tensor_v2, (self.record, 0, self.shape, strides, False, hooks)


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        is_record = isinstance(value, _Record)
        return ("storage", _STORAGES[value.dtype], str(value.number), "cpu", value.numel) if is_record else None


def _num_bytes(spec: Spec) -> int:
    dtype, shape = spec
    return math.prod(shape) * dtype.itemsize


def _raw(tensor: torch.Tensor, spec: Spec, name: str) -> memoryview:
    """Returns the bytes of a tensor after checking it against its spec."""
    assert (tensor.dtype, tuple(tensor.shape)) == (spec[0], tuple(spec[1])), name
    # Flattened, since a contiguous tensor with one column can have another stride than 1 there.
    return tensor.flatten().view(torch.uint8).numpy().data
