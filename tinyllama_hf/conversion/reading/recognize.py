"""Recognises what a file or folder holds, by its containers and key names, and opens it.

The order of Meta's shards, and which of several files in a folder are weights, are in names; llama2.c's file has no mark and
is known by a plausible header and its exact size. Everything else is told by contents.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml
from transformers import GenerationConfig, LlamaConfig, PreTrainedConfig

from ...configuration_tinyllama import TinyLlamaConfig
from ...errors import InputError, damaged, refuse_damage
from ...provenance import file_sha256
from ...released import local_folder
from ..awq.read import dequantized, is_awq
from ..checkpoint import EMBEDDING, OUTPUT, Checkpoint, LazyTensor, are_equal, complete
from ..formats import lit_gpt, meta
from ..formats.gguf_read import read_gguf
from ..formats.llama2c import read_llama2c
from .containers import (
    BIN_INDEX,
    SAFETENSORS_INDEX,
    is_file,
    open_safetensors,
    open_sharded,
    open_torch_archive,
    read_fields,
    state_dict,
)


# What training wrappers put into the names of keys.
_WRAPPERS = ("module.", "_forward_module.", "_orig_mod.", "_fsdp_wrapped_module.")
# In the order in which they are taken where a folder holds several.
_WEIGHTS = (SAFETENSORS_INDEX, "model.safetensors", BIN_INDEX, "pytorch_model.bin", lit_gpt.WEIGHTS_FILE)
_SUFFIXES = (".safetensors", ".gguf", ".pth", ".bin", ".pt")
_PROVENANCE = "provenance.json"
# What the names of quantized weights end in.
_QUANTIZED = (".qweight", ".quant_state.bitsandbytes__nf4", ".SCB", ".weight_packed")
_MAX_YAML = 1 << 16  # bytes
# What a `config.json` says of the architecture. The rest is left aside: it can name kernels to be downloaded and run
# (`attn_implementation`), or make labels by the billion (`num_labels`).
_FIELDS = {field.name for field in dataclasses.fields(LlamaConfig)} - {
    field.name for field in dataclasses.fields(PreTrainedConfig)
} | {"rope_theta", "rope_scaling", "partial_rotary_factor"}


def open_checkpoint(source: str | Path, config: str | Path | None = None) -> Checkpoint:
    """Opens a checkpoint of any known layout; nothing but headers and configurations is read yet.

    Args:
        source (`str` or `Path`): a file, a folder, a name of the released ladder or a Hub id.
        config (`str` or `Path`, *optional*): a `config.json`, `model_config.yaml` or `lit_config.json` to take in place of
            what the source brings.

    Raises:
        InputError: if nothing is recognised, or it is damaged, incomplete, or no Llama.
    """
    path = local_folder(str(source))
    override = None if config is None else Path(config)
    if override is not None and not override.is_file():
        raise InputError(f"--config {override}: no such file")
    if path.is_dir():
        return _open_folder(path, override)
    if path.name.startswith("consolidated.") and path.suffix == ".pth":
        return _open_folder(path.parent, override)
    return _open_weights(path, path, override)


def _open_folder(folder: Path, config: Path | None) -> Checkpoint:
    if any(folder.glob("consolidated.*.pth")) and not any((folder / name).is_file() for name in _WEIGHTS):
        _refuse_config(config, "Meta's files")
        return meta.read_meta(folder)
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return _open_weights(folder / name, folder, config)
    files = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES)
    if len(files) == 1:
        return _open_weights(files[0], folder, config)
    names = ", ".join(file.name for file in files[:4])
    found = f"{len(files)} files that might hold weights ({names}); give one of them" if files else "no weights"
    raise InputError(f"{folder}: holds {found}. Known are {', '.join(_WEIGHTS)}, consolidated.*.pth, *.gguf")


def _refuse_config(config: Path | None, what: str) -> None:
    if config is not None:
        raise InputError(f"--config {config}: {what} bring their own configuration; leave it out")


def _open_weights(file: Path, given: Path, config: Path | None) -> Checkpoint:
    """Opens a file of weights, or the shards of an index, by what it begins with."""
    if file.name in (SAFETENSORS_INDEX, BIN_INDEX):
        return _by_keys(open_sharded(file), file, given, config)
    with file.open("rb") as opened:
        begin = opened.read(9)
    if begin[:4] == b"GGUF":
        _refuse_config(config, "GGUF files")
        checkpoint = read_gguf(file)
        _add_provenance(checkpoint, file.parent)
        return checkpoint
    # Before the others: the length that a header begins with may be any number, and look like theirs.
    if begin[4:] == b"\0\0\0\0{":
        return _by_keys(open_safetensors(file), file, given, config)
    if begin[:2] == b"PK" or begin[:1] == b"\x80":
        value = open_torch_archive(file)
        is_training = isinstance(value, dict) and isinstance(value.get("model"), dict)
        checkpoint = _by_keys(state_dict(value["model"] if is_training else value, file), file, given, config)
        if is_training:
            counted = {name: value[name] for name in ("step_count", "iter_num") if isinstance(value.get(name), int)}
            checkpoint.notes.append(f"a training file {counted or ''}: its optimiser is left behind")
        return checkpoint
    if checkpoint := read_llama2c(file):
        _refuse_config(config, "llama2.c's files")
        return checkpoint
    raise damaged(file, f"begins with {begin[:4]!r}: neither safetensors, torch's zip, GGUF nor llama2.c")


def _by_keys(tensors: dict[str, LazyTensor], file: Path, given: Path, config: Path | None) -> Checkpoint:
    """Tells the layout of a state dict by its keys."""
    bare = {_bare(name): tensor for name, tensor in tensors.items()}
    if len(bare) < len(tensors):
        raise InputError(f"{file}: two of its keys differ only in what training wrappers added; it holds two models")
    kind = lit_gpt.layout(bare)
    if kind:
        checkpoint = _lit_gpt(bare, kind, file, given, config)
    elif any(name.startswith("model.layers.") for name in bare):
        checkpoint = _hugging_face(bare, file, given, config or file.parent / "config.json")
    elif meta.is_meta(bare):
        raise InputError(f"{file}: holds Meta's tensors; give the folder with consolidated.00.pth and params.json")
    else:
        raise InputError(
            f"{file}: of no known layout of Llama; its first keys are {', '.join(list(bare)[:3]) or 'none'}"
        )
    _add_surroundings(checkpoint, file.parent)
    if kind:  # the configurations of lit-gpt do not have them
        for name in ("bos_token_id", "eos_token_id"):
            setattr(checkpoint.config, name, (checkpoint.generation or {}).get(name, getattr(checkpoint.config, name)))
    return complete(checkpoint)


def _hugging_face(tensors: dict[str, LazyTensor], file: Path, given: Path, config: Path) -> Checkpoint:
    fields = _config_fields(config)
    quantization = fields.get("quantization_config")
    if is_awq(quantization):
        dequantized_tensors = dequantized(tensors, quantization, str(config))
        return Checkpoint(given, "AWQ, dequantised", _llama_config(fields, config), dequantized_tensors)
    if quantization is not None or any(name.endswith(_QUANTIZED) for name in tensors):
        raise InputError(f"{file}: holds quantised weights; convert the model that they were made from")
    return Checkpoint(given, f"Hugging Face, {file.name}", _llama_config(fields, config), tensors)


def _bare(name: str) -> str:
    before = None
    while name != before:
        before = name
        for wrapper in _WRAPPERS:
            name = name.removeprefix(wrapper).replace(f".{wrapper}", ".")
    return name


def _lit_gpt(tensors: dict[str, LazyTensor], kind: str, file: Path, given: Path, config: Path | None) -> Checkpoint:
    names = (*lit_gpt.CONFIG_FILES, "config.json")
    config = config or next((p for name in names if (p := file.parent / name).is_file()), None)
    if config is None:
        read = lit_gpt.config_from_shapes(tensors, str(file))
    elif config.name == "config.json":
        read = read_llama_config(config)
    else:
        read = lit_gpt.config_from_fields(_fields(config), str(config), lit_gpt.vocab_rows(tensors, str(config)))
    converted = lit_gpt.to_hugging_face(tensors, read)
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
        # A few lines that refer to each other make billions of values.
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, yaml.SafeLoader)):
            raise damaged(config, "it has aliases, which litgpt never writes")
        fields = yaml.safe_load(text)
        str(fields)  # a number of so many digits that Python does not print it is a ValueError
    if not isinstance(fields, dict):
        raise damaged(config, "it holds no fields")
    return fields


def read_llama_config(file: Path, quantized: bool = False) -> LlamaConfig:
    """Reads a `config.json` of a Llama; one that says that the weights are `quantized` only where that is known.

    Raises:
        InputError: if there is none, it is no Llama's, is quantised, or has a field that no Llama can have.
    """
    fields = _config_fields(file)
    if fields.get("quantization_config") is not None and not quantized:
        raise InputError(f"{file}: the weights are quantised already; convert the model that they were made from")
    return _llama_config(fields, file)


def _config_fields(file: Path) -> dict[str, Any]:
    if not is_file(file):
        raise InputError(f"{file}: is missing; it lies beside the weights of a Hugging Face model, or pass --config")
    return read_fields(file)


def _llama_config(fields: dict[str, Any], file: Path) -> LlamaConfig:
    if fields.get("model_type") not in ("llama", TinyLlamaConfig.model_type):
        raise InputError(f"{file}: model_type {fields.get('model_type')!r} is not a Llama; only Llamas are converted")
    with refuse_damage(file):
        config = LlamaConfig(**{name: value for name, value in fields.items() if name in _FIELDS})
        return TinyLlamaConfig.from_llama(config).to_llama()


def _add_surroundings(checkpoint: Checkpoint, folder: Path) -> None:
    """Tokenizer, generation configuration and provenance that lie beside the weights."""
    if (folder / "tokenizer.model").is_file() or (folder / "tokenizer.json").is_file():
        checkpoint.tokenizer = folder
    if (folder / "generation_config.json").is_file():
        checkpoint.generation = _generation(folder / "generation_config.json")
    _add_provenance(checkpoint, folder)


def _generation(file: Path) -> dict[str, Any]:
    fields = read_fields(file)
    with refuse_damage(file):
        return json.loads(GenerationConfig(**fields).to_json_string())


def _add_provenance(checkpoint: Checkpoint, folder: Path) -> None:
    """Reads the record of a folder, and holds its files, or the one that was given, against the hashes in it."""
    if not (folder / _PROVENANCE).is_file():
        return
    checkpoint.provenance = read_fields(folder / _PROVENANCE)
    recorded = checkpoint.provenance.get("sha256")
    for name, digest in (recorded if isinstance(recorded, dict) else {}).items():
        file = folder / Path(name).name
        if checkpoint.path.is_file() and checkpoint.path.name != file.name:
            continue
        if not is_file(file):
            raise InputError(f"{file}: is missing, but {_PROVENANCE} beside it names it; fetch it")
        if file_sha256(file) != digest:
            raise damaged(file, f"its SHA-256 is not the one in {_PROVENANCE}")
