"""Model folders to publish: their kind, their files, and checks that they are complete."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from ..conversion.awq.read import is_awq
from ..conversion.checkpoint import LazyTensor, expected_shapes
from ..conversion.quantized.w4a16 import is_compressed
from ..conversion.reading.containers import SAFETENSORS_INDEX, open_safetensors, open_sharded, read_fields
from ..conversion.reading.recognize import open_checkpoint, read_llama_config
from ..errors import InputError
from ..portable import hub_id, portable
from ..pretrain.milestones import CONFIG_FILE
from ..quantization.quantized_model import saved_quantization
from ..released import released


PROVENANCE_FILE = "provenance.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_WEIGHTS = ("model.safetensors", SAFETENSORS_INDEX, "model-*-of-*.safetensors")
# Files to publish, by kind, and with all kinds. Others (logs, held-out rows, temporary files) are not published.
_FILES = dict.fromkeys(("trained", "llama", "awq", "w4a16", "quantized"), ("config.json", *_WEIGHTS)) | {
    "gguf": ("*.gguf",),
    "adapter": (ADAPTER_CONFIG, ADAPTER_WEIGHTS),
}
_OTHER_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    PROVENANCE_FILE,
)
# Files that an earlier version of a revision may have had, also as a folder of another kind: deleted if they are no
# longer part of it. Of GGUF files only those named as by `convert`.
OUTDATED = (
    *("config.json", *_WEIGHTS, "model-*.gguf", ADAPTER_CONFIG, ADAPTER_WEIGHTS),
    *(*_OTHER_FILES, CONFIG_FILE, "loss.png", "trajectory.png"),
)
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


class ModelFolder(NamedTuple):
    """A complete model folder.

    Attributes:
        path (`Path`): the folder.
        kind (`str`): `"trained"` (by this package), `"llama"` (plain, of other origin), `"quantized"` (by
            bitsandbytes or torchao), `"awq"`, `"w4a16"`, `"gguf"`, or `"adapter"` (of PEFT).
        files (`list[Path]`): the files to publish.
        config (`dict`): content of `config.json` or `adapter_config.json`.
        record (`dict`): content of `provenance.json` without paths and names of this machine; empty if there is none.
        num_parameters (`int`): counted from the headers of the weights, shared weights once.
        name (`str`): name of the model in score files, which is that of the folder.
        base (`str`, *optional*): Hub id of the base model, with `@REVISION` if it is not main.
    """

    path: Path
    kind: str
    files: list[Path]
    config: dict[str, Any]
    record: dict[str, Any]
    num_parameters: int
    name: str
    base: str | None = None


def open_trained_folder(folder: Path, base: str | None = None) -> ModelFolder:
    """Opens a milestone or a fine-tuned model, and checks every file that a stock loader reads (of weights the
    headers).

    Args:
        folder (`Path`): the model folder.
        base (`str`, *optional*): Hub id of the base model of fine-tuning, if the record does not have it.

    Raises:
        InputError: if it is not a plain Llama folder with provenance, or a file is missing or damaged.
    """
    needed = ("config.json", *_TOKENIZER, CONFIG_FILE, PROVENANCE_FILE)
    _require(folder, needed, "recreate the folder with recipes/pretrain.py or recipes/sft.py")
    try:
        yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{folder / CONFIG_FILE}: damaged, not valid YAML. Copy the model again") from error
    model = _plain(folder, "trained")
    if not is_trained(model.record):
        raise InputError(
            f"{folder / PROVENANCE_FILE}: has neither `tokens` (pretraining) nor `base_model` (fine-tuning), which "
            "the card needs. Copy the model again"
        )
    return model._replace(base=base or _hub_name(model.record.get("base_model", {}).get("path")))


def open_folder(folder: Path, base: str | None = None) -> ModelFolder:
    """Opens a model folder of any kind; otherwise as [`open_trained_folder`].

    Args:
        folder (`Path`): the model folder.
        base (`str`, *optional*): Hub id of the base model, if the folder does not record it.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        return _adapter(folder, base)
    if is_trained(_record(folder)):
        return open_trained_folder(folder, base)
    if (folder / "config.json").is_file():
        saved = read_fields(folder / "config.json").get("quantization_config")
        kind = "llama" if saved is None else "awq" if is_awq(saved) else "quantized"
        kind = "w4a16" if is_compressed(saved) else kind
        model = _quantized(folder) if kind == "quantized" else _plain(folder, kind)
    elif any(folder.glob("*.gguf")):
        checkpoint = open_checkpoint(folder)
        model = _model(folder, "gguf", checkpoint.config.to_dict(), checkpoint.tensors)
    else:
        raise InputError(
            f"{folder}: holds neither milestones nor a model (config.json, {ADAPTER_CONFIG} or one GGUF file). Give "
            "the output_dir of a run, or a model folder. Convert litgpt checkpoints first: "
            f"tinyllama-hf convert {folder} --to llama --output NEW"
        )
    made_from = model.record.get("conversion", {}).get("source") or model.record.get("merge", {}).get("base", {}).get(
        "path"
    )
    return model._replace(base=base or _hub_name(made_from))


def is_trained(record: dict[str, Any]) -> bool:
    """Whether a record is of pretraining or fine-tuning. A converted folder has such a record nested in its own."""
    return bool(record.keys() & {"tokens", "base_model"})


def _plain(folder: Path, kind: str) -> ModelFolder:
    """Opens a folder with plain, AWQ or W4A16 weights; all tensors of the configuration must be present."""
    config = _llama_fields(folder)
    return _model(folder, kind, config, open_checkpoint(folder).tensors)


def _quantized(folder: Path) -> ModelFolder:
    """Opens a folder that bitsandbytes or torchao saved: the matrices of the layers have packed shapes."""
    config = _llama_fields(folder)
    saved_quantization(config, str(folder))
    index = folder / SAFETENSORS_INDEX
    tensors = open_sharded(index) if index.is_file() else open_safetensors(folder / "model.safetensors")
    llama, _ = read_llama_config(folder / "config.json")
    shapes = expected_shapes(llama)
    packed = (torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn)
    tensors = {name.replace("._weight_qdata", ".weight"): tensor for name, tensor in tensors.items()}  # of torchao
    for name, shape in shapes.items():
        is_packed = name in tensors and tensors[name].dtype in packed
        if name not in tensors or not (is_packed or tensors[name].shape == shape):
            found = f"has shape {list(tensors[name].shape)}" if name in tensors else "is missing"
            raise InputError(
                f"{folder}: {name} {found}; config.json requires {list(shape)}. Download or recreate the folder"
            )
    return _model(folder, "quantized", config, {name: tensors[name]._replace(shape=s) for name, s in shapes.items()})


def _adapter(folder: Path, base: str | None) -> ModelFolder:
    """Opens an adapter, which needs a base model that others can load."""
    config, weights = read_fields(folder / ADAPTER_CONFIG), folder / ADAPTER_WEIGHTS
    if not isinstance(config.get("peft_type"), str):
        raise InputError(f"{folder / ADAPTER_CONFIG}: peft_type is missing. Download or recreate the adapter")
    _require(folder, (ADAPTER_WEIGHTS,), "save the adapter again with save_pretrained")
    tensors = open_safetensors(weights)
    if not tensors:
        raise InputError(f"{weights}: holds no tensors. Save the adapter again")
    given = config.get("base_model_name_or_path")
    if not (base := base or _hub_name(given, config.get("revision"))):
        raise InputError(
            f"{folder / ADAPTER_CONFIG}: the base model {given!r} is not on the Hub, and the adapter cannot be loaded "
            "without it. Publish the base model first, and name it with --base-model USER/NAME"
        )
    return _model(folder, "adapter", config, tensors)._replace(base=base)


def _model(folder: Path, kind: str, config: dict[str, Any], tensors: dict[str, LazyTensor]) -> ModelFolder:
    for name in _TOKENIZER:
        if (folder / name).is_file():
            read_fields(folder / name)
    patterns = (*_FILES[kind], *_OTHER_FILES, *([CONFIG_FILE] if kind == "trained" else ()))
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    num_parameters = sum(torch.Size(tensor.shape).numel() for tensor in tensors.values())
    config, record = portable(config, names=False), portable(_record(folder))
    return ModelFolder(folder, kind, files, config, record, num_parameters, folder.resolve().name)


def _llama_fields(folder: Path) -> dict[str, Any]:
    """The configuration of a folder, which must be a Llama with all the files that a stock loader needs."""
    fix = "copy or recreate it; `load_tokenizer(SOURCE).save_pretrained(FOLDER)` writes a tokenizer"
    _require(folder, ("config.json", *_TOKENIZER), fix)
    config = read_fields(folder / "config.json")
    if config.get("model_type") != "llama":
        raise InputError(
            f"{folder / 'config.json'}: model_type is {config.get('model_type')!r}; only plain Llama folders "
            "(model_type 'llama') are published, since any client can load them. Save the model with save_as_llama"
        )
    if not any((folder / name).is_file() for name in _WEIGHTS[:2]):
        raise InputError(f"{folder}: model.safetensors is missing. Download or recreate the folder")
    return config


def _require(folder: Path, names: Sequence[str], fix: str) -> None:
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise InputError(f"model {folder}: {missing[0]} is missing; {fix}")


def _record(folder: Path) -> dict[str, Any]:
    return read_fields(folder / PROVENANCE_FILE) if (folder / PROVENANCE_FILE).is_file() else {}


def _hub_name(given: Any, revision: str | None = None) -> str | None:
    """The Hub id of a model, `None` if it was a local folder."""
    if not isinstance(given, str):
        return None
    if fetched := hub_id(given):
        return fetched
    known = {model.name: model.hub for model in released()}
    if given in known:
        return known[given]
    is_id = given.count("/") == 1 and not given.startswith((".", "/", "~")) and not Path(given).parent.exists()
    return f"{given}@{revision}" if is_id and revision else given if is_id else None
