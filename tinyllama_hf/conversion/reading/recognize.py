"""Detects the layout of a file or folder and opens it.

The layout is detected from containers and tensor names. File names only matter for the order of Meta's shards and to
find the weights in a folder. llama2.c's format has no magic number; it is recognized by its header and exact size.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import GenerationConfig, LlamaConfig, PreTrainedConfig

from ...configuration_tinyllama import TinyLlamaConfig
from ...errors import InputError, damaged, refuse_damage
from ...provenance import file_sha256
from ...released import local_folder
from ..awq.read import dequantize_awq, is_awq
from ..checkpoint import EMBEDDING, OUTPUT, Checkpoint, LazyTensor, are_equal, validate
from ..formats import lit_gpt, meta
from ..formats.gguf_read import read_gguf
from ..formats.llama2c import read_llama2c
from ..quantized.w4a16 import dequantize_w4a16, is_compressed
from .containers import (
    BIN_INDEX,
    SAFETENSORS_INDEX,
    as_state_dict,
    open_safetensors,
    open_sharded,
    open_torch_archive,
    read_fields,
)


# Parts that training wrappers add to tensor names.
_WRAPPERS = ("module", "_forward_module", "_orig_mod", "_fsdp_wrapped_module")
# In order of preference.
_WEIGHTS = (SAFETENSORS_INDEX, "model.safetensors", BIN_INDEX, "pytorch_model.bin", lit_gpt.WEIGHTS_FILE)
_SUFFIXES = (".safetensors", ".gguf", ".pth", ".bin", ".pt")
_PROVENANCE = "provenance.json"
# Suffixes of the names of quantized weights.
_QUANTIZED = (".qweight", ".quant_state.bitsandbytes__nf4", ".SCB", ".weight_packed", "._weight_qdata")
_MAX_YAML = 1 << 16  # bytes
# The fields of `config.json` that describe the architecture. Others are ignored: they could name kernels to download
# and run (`attn_implementation`) or create billions of labels (`num_labels`).
_FIELDS = {field.name for field in dataclasses.fields(LlamaConfig)} - {
    field.name for field in dataclasses.fields(PreTrainedConfig)
} | {"rope_theta", "rope_scaling", "partial_rotary_factor"}


def open_checkpoint(source: str | Path, config: str | Path | None = None) -> Checkpoint:
    """Opens a checkpoint in any supported layout. Only headers and configurations are read.

    Args:
        source (`str` or `Path`): a file, a folder, a released name or a Hub id.
        config (`str` or `Path`, *optional*): a `config.json`, `model_config.yaml` or `lit_config.json` to use instead
            of the source's.

    Raises:
        InputError: if the layout is unknown, or the checkpoint is damaged, incomplete, or not a Llama.
    """
    path = local_folder(str(source))
    override = None if config is None else Path(config)
    if override is not None and not override.is_file():
        raise InputError(f"--config {override}: file not found")
    if path.is_dir():
        return _open_folder(path, override)
    if path.name.startswith("consolidated.") and path.suffix == ".pth":
        return _open_folder(path.parent, override)
    return _open_weights(path, path, override)


def _open_folder(folder: Path, config: Path | None) -> Checkpoint:
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        fix = f"Merge it first: tinyllama-hf merge BASE {folder} --output FOLDER. For llama.cpp, use --to gguf-lora"
        raise InputError(f"{folder}: an adapter, not a model. {fix}")
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return _open_weights(folder / name, folder, config)
    if any(folder.glob("consolidated.*.pth")):
        _refuse_config(config, "Meta's files")
        return meta.read_meta(folder)
    files = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES)
    if len(files) == 1:
        return _open_weights(files[0], folder, config)
    names = ", ".join(file.name for file in files[:4])
    found = f"{len(files)} possible weight files ({names}). Pass one of them" if files else "no weights"
    raise InputError(f"{folder}: {found}. Expected are {', '.join(_WEIGHTS)}, consolidated.*.pth or *.gguf")


def _refuse_config(config: Path | None, what: str) -> None:
    if config is not None:
        raise InputError(f"--config {config}: {what} contain their own configuration. Omit --config")


def _open_weights(file: Path, given: Path, config: Path | None) -> Checkpoint:
    """Opens a weight file, or the shards of an index, by its first bytes."""
    if file.name in (SAFETENSORS_INDEX, BIN_INDEX):
        return _by_keys(open_sharded(file), file, given, config)
    with file.open("rb") as opened:
        begin = opened.read(9)
    if begin[:4] == b"GGUF":
        _refuse_config(config, "GGUF files")
        checkpoint = read_gguf(file)
        _add_provenance(checkpoint, file.parent)
        return checkpoint
    # Checked first, since the length at the start of a header could look like the start of the others.
    if begin[4:] == b"\0\0\0\0{":
        return _by_keys(open_safetensors(file), file, given, config)
    if begin[:2] == b"PK" or begin[:1] == b"\x80":
        value = open_torch_archive(file)
        is_training = isinstance(value, dict) and isinstance(value.get("model"), dict)
        checkpoint = _by_keys(as_state_dict(value["model"] if is_training else value, file), file, given, config)
        if is_training:
            counted = {name: value[name] for name in ("step_count", "iter_num") if isinstance(value.get(name), int)}
            checkpoint.notes.append(f"the optimizer of the training checkpoint {counted or ''} was ignored")
        return checkpoint
    if llama2c := read_llama2c(file):
        _refuse_config(config, "llama2.c's files")
        return llama2c
    raise damaged(file, f"it begins with {begin[:4]!r}, unlike safetensors, torch's zip, GGUF and llama2.c files")


def _by_keys(tensors: dict[str, LazyTensor], file: Path, given: Path, config: Path | None) -> Checkpoint:
    """Opens a state dict and the other files in its folder; the layout is detected from the tensor names."""
    bare = {".".join(p for p in name.split(".") if p not in _WRAPPERS): tensor for name, tensor in tensors.items()}
    if len(bare) < len(tensors):
        raise InputError(f"{file}: two tensor names differ only in the prefix of a training wrapper. Remove one model")
    kind = lit_gpt.find_layout(bare)
    if kind:
        checkpoint = _lit_gpt(bare, kind, file, given, config)
    elif any(name.startswith("model.layers.") for name in bare):
        checkpoint = _hugging_face(bare, file, given, config or file.parent / "config.json")
    elif any(meta.NAMES.layer_and_part(name)[1] == "attention.wq" for name in bare):
        raise InputError(f"{file}: contains Meta's tensors. Pass the folder with consolidated.00.pth and params.json")
    else:
        raise InputError(f"{file}: unknown layout; its first tensors are {', '.join(list(bare)[:3]) or 'none'}")
    folder = file.parent
    if (folder / "tokenizer.model").is_file() or (folder / "tokenizer.json").is_file():
        checkpoint.tokenizer = folder
    if (folder / "generation_config.json").is_file():
        generation = read_fields(folder / "generation_config.json")
        with refuse_damage(folder / "generation_config.json"):
            checkpoint.generation = json.loads(GenerationConfig(**generation).to_json_string())
    _add_provenance(checkpoint, folder)
    if kind:  # lit-gpt's configurations do not contain these ids
        for name in ("bos_token_id", "eos_token_id"):
            setattr(checkpoint.config, name, (checkpoint.generation or {}).get(name, getattr(checkpoint.config, name)))
    return validate(checkpoint)


def _hugging_face(tensors: dict[str, LazyTensor], file: Path, given: Path, config: Path) -> Checkpoint:
    llama, quantization = read_llama_config(config)
    if quantization and is_awq(quantization):
        return Checkpoint(given, "AWQ, dequantized", llama, dequantize_awq(tensors, quantization, str(config)))
    if quantization and is_compressed(quantization):
        weights = dequantize_w4a16(tensors, quantization, str(config))
        return Checkpoint(given, "W4A16 of compressed-tensors, dequantized", llama, weights)
    is_fp8 = any(tensor.dtype == torch.float8_e4m3fn for tensor in tensors.values())
    if quantization is not None or is_fp8 or any(name.endswith(_QUANTIZED) for name in tensors):
        raise InputError(f"{file}: the weights are quantized. Convert the original model")
    return Checkpoint(given, f"Hugging Face, {file.name}", llama, tensors)


def _lit_gpt(tensors: dict[str, LazyTensor], kind: str, file: Path, given: Path, config: Path | None) -> Checkpoint:
    names = (*lit_gpt.CONFIG_FILES, "config.json")
    config = config or next((p for name in names if (p := file.parent / name).is_file()), None)
    if config is None:
        read = lit_gpt.config_from_shapes(tensors, str(file))
    elif config.name == "config.json":
        read, _ = read_llama_config(config)
    else:
        read = lit_gpt.config_from_fields(_fields(config), str(config), lit_gpt.vocab_rows(tensors, str(config)))
    converted = lit_gpt.to_llama_tensors(tensors, read)
    if are_equal(converted.get(OUTPUT), converted.get(EMBEDDING)):
        read.tie_word_embeddings = True
    return Checkpoint(given, f"{'litgpt' if kind == 'C' else 'lit-gpt'}, layout {kind}", read, converted)


def _fields(config: Path) -> dict[str, Any]:
    if config.suffix == ".json":
        return read_fields(config)
    if config.stat().st_size > _MAX_YAML:
        raise damaged(config, f"{config.stat().st_size} bytes of YAML")
    with refuse_damage(config):
        text = config.read_text(encoding="utf-8")
        # With aliases, a few lines could expand to billions of values.
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, yaml.SafeLoader)):
            raise damaged(config, "aliases, which litgpt never writes")
        fields = yaml.safe_load(text)
        str(fields)  # raises a ValueError for numbers with too many digits to print
    if not isinstance(fields, dict):
        raise damaged(config, "not a YAML mapping")
    return fields


def read_llama_config(file: Path) -> tuple[LlamaConfig, Any]:
    """Reads the `config.json` of a Llama.

    Returns:
        The configuration, and its `quantization_config`, which is `None` if the weights are not quantized.

    Raises:
        InputError: if the file is missing, not a Llama's, or has invalid fields.
    """
    if not os.path.isfile(file):  # unlike `Path.is_file`, without an error for a damaged name that is too long
        raise InputError(f"{file}: file not found. Add it to the folder, or pass --config")
    fields = read_fields(file)
    if fields.get("model_type") not in ("llama", TinyLlamaConfig.model_type):
        raise InputError(f"{file}: model_type is {fields.get('model_type')!r}; it must be 'llama'")
    with refuse_damage(file):
        config = LlamaConfig(**{name: value for name, value in fields.items() if name in _FIELDS})
        return TinyLlamaConfig.from_llama(config).to_llama(), fields.get("quantization_config")


def _add_provenance(checkpoint: Checkpoint, folder: Path) -> None:
    """Adds the folder's provenance and verifies the hashes in it: of all files, or of the one file that was opened."""
    if not (folder / _PROVENANCE).is_file():
        return
    checkpoint.provenance = read_fields(folder / _PROVENANCE)
    recorded = checkpoint.provenance.get("sha256")
    for name, digest in (recorded if isinstance(recorded, dict) else {}).items():
        file = folder / Path(name).name
        if checkpoint.path.is_file() and checkpoint.path.name != file.name:
            continue
        if not os.path.isfile(file):
            raise InputError(f"{file}: file not found, but listed in {_PROVENANCE}. Download it")
        if file_sha256(file) != digest:
            raise damaged(file, f"its SHA-256 differs from the one in {_PROVENANCE}")
