"""Small checkpoints in every container, and containers with arbitrary pickles, to test damaged and hostile files."""

import io
import json
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from tests.conversion import layouts
from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, convert
from tinyllama_hf.errors import InputError


ROWS = 512  # those of the tests' tokenizers


def small_model(rows: int = ROWS) -> tuple[dict[str, torch.Tensor], LlamaConfig]:
    """Weights and configuration of a minimal model with two layers and grouped-query attention."""
    torch.manual_seed(0)
    config = TinyLlamaConfig(
        vocab_size=rows, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = TinyLlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.1)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}, config.to_llama()


def write_folder(folder: Path, weights: Mapping[str, torch.Tensor], config: LlamaConfig) -> Path:
    """A Hugging Face folder with one `model.safetensors`."""
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    save_file(dict(weights), folder / "model.safetensors", {"format": "pt"})
    return folder


def write_sharded(folder: Path, weights: Mapping[str, torch.Tensor], config: LlamaConfig, suffix: str) -> Path:
    """A Hugging Face folder with two shards and an index; `suffix` is `"safetensors"` or `"bin"`."""
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    stem, names = {"safetensors": "model", "bin": "pytorch_model"}[suffix], list(weights)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file, shard = f"{stem}-{i:05}-of-00002.{suffix}", {name: weights[name] for name in part}
        save_file(shard, folder / file, {"format": "pt"}) if suffix == "safetensors" else torch.save(
            shard, folder / file
        )
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_lit_gpt(folder: Path, weights: Mapping[str, torch.Tensor], config: LlamaConfig, kind: str = "A") -> Path:
    """A lit-gpt folder with weights in the container of TinyLlama's exporter."""
    folder.mkdir(parents=True)
    layouts.write_as_tinyllama(folder / "lit_model.pth", layouts.lit_gpt(weights, config, kind))
    (folder / "lit_config.json").write_text(json.dumps(layouts.lit_gpt_fields(config)))
    return folder


def write_archive(path: Path, description: bytes, records: Mapping[str, bytes] | None = None) -> Path:
    """An archive from torch's writer, with any bytes as its pickle."""
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, data in {"data.pkl": description, **(records or {})}.items():
        writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    return path


def write_zip(path: Path, entries: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> Path:
    """A zip file from Python's writer, which allows duplicate names and compression."""
    with zipfile.ZipFile(path, "w", compression) as opened:
        for name, data in entries:
            opened.writestr(name, data)
    return path


def records(path: Path) -> dict[str, bytes]:
    """The records of an archive, without its folder name and without the records that the writer adds."""
    with zipfile.ZipFile(path) as opened:
        found = {info.filename.partition("/")[2]: opened.read(info) for info in opened.infolist()}
    return {name: data for name, data in found.items() if not name.startswith(".") and name != "version"}


def patched_pickle(archive: bytes, change: Any) -> bytes:
    """The archive with another pickle of the same length and the matching checksum in both places."""
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        info = next(info for info in opened.infolist() if info.filename.endswith("/data.pkl"))
        begin = archive.index(before := opened.read(info))
    after = change(before)
    if len(after) != len(before):
        raise ValueError("another length")
    old, new = (zlib.crc32(data).to_bytes(4, "little") for data in (before, after))
    return (archive[:begin] + after + archive[begin + len(before) :]).replace(old, new)


class Call:
    """Pickles as a function call, which `pickle.loads` executes."""

    def __init__(self, function: Any, *arguments: Any):
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


class Record:
    """Pickles as a persistent id, like torch's storages."""

    def __init__(self, *identity: Any):
        self.identity = identity


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.identity if isinstance(value, Record) else None


def dumps(value: Any, protocol: int = 2) -> bytes:
    """The pickle of a value that may contain `Call` and `Record`."""
    description = io.BytesIO()
    _Pickler(description, protocol).dump(value)
    return description.getvalue()


def stored(
    shape: tuple, strides: tuple, numel: int, key: Any = "0", storage: Any = torch.FloatStorage, offset: Any = 0
):
    """A tensor for `dumps`, with any numbers."""
    record = Record("storage", storage, key, "cpu", numel)
    return Call(torch._utils._rebuild_tensor_v2, record, offset, shape, strides, False, {})


def changed(weights: Mapping[str, torch.Tensor], name: str, change: Any) -> dict[str, torch.Tensor]:
    """The weights with one tensor changed."""
    return {**weights, name: change(weights[name].clone())}


def filled(value: float) -> Any:
    """A change for `changed` that sets one value."""

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[3] = value
        return tensor

    return fill


def refuse(source: Path, message: str, folder: Path, to: str = "llama", **options: Any) -> None:
    """Asserts that converting is refused with this message and leaves a folder unchanged."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError, match=message):
        convert(source, to, folder / "out", **options)
    assert sorted(folder.rglob("*")) == before
