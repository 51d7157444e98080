"""Recognises what a file or folder holds, by its containers and key names, and opens it.

The order of Meta's shards, and which of several files in a folder are weights, are in names; llama2.c's file has no mark and
is known by a plausible header and its exact size. Everything else is told by contents.
"""

import json
from pathlib import Path
from typing import Any

import yaml
from transformers import GenerationConfig, LlamaConfig

from ..configuration_tinyllama import TinyLlamaConfig
from ..errors import InputError
from ..provenance import file_sha256, read_json
from ..released import local_folder
from . import lit_gpt, meta
from .checkpoint import EMBEDDING, OUTPUT, Checkpoint, LazyTensor, complete
from .containers import (
    BIN_INDEX,
    SAFETENSORS_INDEX,
    damaged,
    open_safetensors,
    open_sharded,
    open_torch_archive,
    state_dict,
)


# What training wrappers put into the names of keys.
_WRAPPERS = ("module.", "_forward_module.", "_orig_mod.", "_fsdp_wrapped_module.")
# In the order in which they are taken where a folder holds several.
_WEIGHTS = (SAFETENSORS_INDEX, "model.safetensors", BIN_INDEX, "pytorch_model.bin", lit_gpt.WEIGHTS_FILE)
_PROVENANCE = "provenance.json"


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
    return _open_file(path, override)


def _open_folder(folder: Path, config: Path | None) -> Checkpoint:
    if any(folder.glob("consolidated.*.pth")) and not any((folder / name).is_file() for name in _WEIGHTS):
        return meta.read_meta(folder)
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return _open_weights(folder / name, folder, config)
    files = sorted(
        path for pattern in ("*.safetensors", "*.gguf", "*.pth", "*.bin", "*.pt") for path in folder.glob(pattern)
    )
    if len(files) == 1:
        return _open_weights(files[0], folder, config)
    found = f"{len(files)} files that might hold weights ({', '.join(f.name for f in files[:4])}); give one of them" if files \
        else "no weights"  # fmt: skip
    raise InputError(f"{folder}: holds {found}. Known are {', '.join(_WEIGHTS)}, consolidated.*.pth, *.gguf")


def _open_file(path: Path, config: Path | None) -> Checkpoint:
    if path.name.startswith("consolidated.") and path.suffix == ".pth":
        return meta.read_meta(path.parent)
    return _open_weights(path, path, config)


def _open_weights(file: Path, given: Path, config: Path | None) -> Checkpoint:
    """Opens a file of weights, or the shards of an index, by what it begins with."""
    if file.name in (SAFETENSORS_INDEX, BIN_INDEX):
        return _by_keys(open_sharded(file), None, file, given, config)
    with file.open("rb") as opened:
        begin = opened.read(9)
    if begin[:4] == b"GGUF":
        from .gguf_source import read_gguf  # wants numpy's types of the gguf package, which is optional

        return read_gguf(file)
    if begin[:2] == b"PK" or begin[:1] == b"\x80":
        value = open_torch_archive(file)
        training = value if isinstance(value, dict) and isinstance(value.get("model"), dict) else None
        return _by_keys(state_dict(training["model"] if training else value, file), training, file, given, config)
    if begin[8:9] == b"{":
        return _by_keys(open_safetensors(file), None, file, given, config)
    if meta.is_llama2c(file):
        return meta.read_llama2c(file)
    raise damaged(file, f"begins with {begin[:4]!r}: neither safetensors, torch's zip, GGUF nor llama2.c")


def _by_keys(
    tensors: dict[str, LazyTensor], training: dict[str, Any] | None, file: Path, given: Path, config: Path | None
) -> Checkpoint:
    """Tells the layout of a state dict by its keys; `training` is the dict of a training file that it lay in."""
    bare = {_bare(name): tensor for name, tensor in tensors.items()}
    if len(bare) < len(tensors):
        raise InputError(f"{file}: two of its keys differ only in what training wrappers added; it holds two models")
    kind = lit_gpt.layout(bare)
    if kind:
        checkpoint = _lit_gpt(bare, kind, training, file, given, config)
    elif any(name.startswith("model.layers.") for name in bare):
        if _is_quantized(bare):
            raise InputError(f"{file}: holds quantised weights; convert the model that they were made from")
        read = read_llama_config(config or file.parent / "config.json")
        checkpoint = Checkpoint(given, f"Hugging Face, {file.name}", read, bare)
    elif meta.layout(bare):
        raise InputError(f"{file}: holds Meta's tensors; give the folder with consolidated.00.pth and params.json")
    else:
        raise InputError(
            f"{file}: of no known layout of Llama; its first keys are {', '.join(list(bare)[:3]) or 'none'}"
        )
    _add_surroundings(checkpoint, file.parent)
    return complete(checkpoint)


def _bare(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper).replace(f".{wrapper}", ".")
    stripped = any(name.startswith(wrapper) for wrapper in _WRAPPERS)
    return _bare(name) if stripped else name


def _is_quantized(names: dict[str, Any]) -> bool:
    return any(
        name.endswith((".qweight", ".quant_state.bitsandbytes__nf4", ".SCB", ".weight_packed")) for name in names
    )


def _lit_gpt(
    tensors: dict[str, LazyTensor],
    kind: str,
    training: dict[str, Any] | None,
    file: Path,
    given: Path,
    config: Path | None,
) -> Checkpoint:
    config = config or next((p for name in lit_gpt.CONFIG_FILES if (p := file.parent / name).is_file()), None)
    if config and config.name == "config.json":
        read = read_llama_config(config)
    else:
        read = lit_gpt.find_config(_fields(config) if config else None, tensors, str(config or file))
    converted = lit_gpt.to_hugging_face(tensors, read, kind)
    if _are_equal(converted.get(OUTPUT), converted.get(EMBEDDING)):
        read.tie_word_embeddings = True
    layout = f"{'litgpt' if kind == 'C' else 'lit-gpt'}, layout {kind}"
    checkpoint = Checkpoint(given, layout, read, converted)
    if training:
        counted = {name: training[name] for name in ("step_count", "iter_num") if isinstance(training.get(name), int)}
        checkpoint.notes.append(f"a training file {counted or ''}: its optimiser is left behind")
    return checkpoint


def _fields(config: Path) -> dict[str, Any]:
    if config.suffix == ".json":
        fields = read_json(config)
    else:
        try:
            fields = yaml.safe_load(config.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise damaged(config, str(error).splitlines()[0]) from error
    if not isinstance(fields, dict):
        raise damaged(config, "it holds no fields")
    return fields


def _are_equal(a: LazyTensor | None, b: LazyTensor | None) -> bool:
    """Whether two tensors are the same bits: lit-gpt keeps a copy of an embedding that is tied."""
    return a is not None and b is not None and (a.shape, a.dtype) == (b.shape, b.dtype) and a.read().equal(b.read())


def read_llama_config(file: Path) -> LlamaConfig:
    """Reads a `config.json` of a Llama.

    Raises:
        InputError: if there is none, it is no Llama's, is quantised, or has a field that no Llama can have.
    """
    if not file.is_file():
        raise InputError(f"{file}: is missing; it lies beside the weights of a Hugging Face model, or pass --config")
    fields = read_json(file)
    if not isinstance(fields, dict):
        raise damaged(file, "it holds no fields")
    if fields.get("model_type") not in ("llama", TinyLlamaConfig.model_type):
        raise InputError(f"{file}: model_type {fields.get('model_type')!r} is not a Llama; only Llamas are converted")
    if "quantization_config" in fields:
        raise InputError(f"{file}: the weights are quantised already; convert the model that they were made from")
    try:
        config = TinyLlamaConfig.from_llama(LlamaConfig(**fields)).to_llama()
    # transformers' own checks, whose errors have no common base.
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise damaged(file, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    sizes = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
    )
    for name in (*sizes, "intermediate_size", "max_position_embeddings"):
        if not 0 < getattr(config, name) < 2**31:
            raise damaged(file, f"{name} is {getattr(config, name)}")
    return config


def _add_surroundings(checkpoint: Checkpoint, folder: Path) -> None:
    """Tokenizer, generation configuration and provenance that lie beside the weights."""
    if (folder / "tokenizer.model").is_file() or (folder / "tokenizer.json").is_file():
        checkpoint.tokenizer = folder
    if (folder / "generation_config.json").is_file():
        checkpoint.generation = _generation(folder / "generation_config.json")
    if (folder / _PROVENANCE).is_file():
        checkpoint.provenance = read_json(folder / _PROVENANCE)
        _check_hashes(folder, checkpoint.provenance)


def _generation(file: Path) -> dict[str, Any]:
    fields = read_json(file)
    try:
        return json.loads(GenerationConfig(**fields).to_json_string())
    except (TypeError, ValueError, AttributeError) as error:
        raise damaged(file, f"{type(error).__name__}: {error}") from error


def _check_hashes(folder: Path, provenance: Any) -> None:
    """Holds the files of a folder against the hashes that its provenance has, where it was written by a conversion."""
    recorded = provenance.get("sha256") if isinstance(provenance, dict) else None
    for name, digest in (recorded if isinstance(recorded, dict) else {}).items():
        file = folder / Path(name).name
        if not file.is_file():
            raise InputError(f"{file}: is missing, but {_PROVENANCE} beside it names it; fetch it")
        if file_sha256(file) != digest:
            raise damaged(file, f"its SHA-256 is not the one in {_PROVENANCE}")
