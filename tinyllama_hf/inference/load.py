"""Loading a model with its tokenizer for inference."""

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..configuration_tinyllama import TinyLlamaConfig
from ..errors import InputError
from ..modeling_tinyllama import TinyLlamaForCausalLM
from ..provenance import read_json
from ..released import local_folder
from ..tokenization_tinyllama import load_tokenizer
from .quantization import QuantizedTinyLlama, check_quantization, quantization_config


def load(
    path_or_name: str | os.PathLike,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    quantization: str = "none",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model in evaluation mode, with its tokenizer.

    Args:
        path_or_name (`str` or `os.PathLike`): a folder, a name of the released ladder, or a Hub id.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): of the weights; `"auto"` takes the file's.
        device (`str`, *optional*, defaults to `"auto"`): `"auto"` takes a GPU where there is one.
        quantization (`str`, *optional*, defaults to `"none"`): `"int8"` or `"nf4"` (4 bit) through bitsandbytes, for
            inference: such a model refuses to be saved, moved or trained.

    Returns:
        `(model, tokenizer)`: a `TinyLlamaForCausalLM` for a Llama folder.

    Raises:
        InputError: if it is no model folder, is no Llama, is damaged or incomplete, or the device or the package for
            the quantisation is not there.
    """
    device = choose_device(device)
    check_quantization(quantization)
    folder = model_folder(path_or_name)
    if quantization == "none":
        return _load_weights(TinyLlamaForCausalLM, folder, dtype).to(device).eval(), load_tokenizer(folder)
    config = quantization_config(quantization, device)
    model = _load_weights(QuantizedTinyLlama, folder, dtype, quantization_config=config, device_map=device)
    model.seal()
    return model, load_tokenizer(folder)


def load_stock(
    folder: Path, device: str = "auto", dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a folder with stock transformers alone, as somebody without this package would; errors as [`load`]."""
    device = choose_device(device)
    model = _load_weights(AutoModelForCausalLM, folder, dtype, trust_remote_code=False).to(device).eval()
    try:
        return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"model {folder}: its tokenizer cannot be loaded ({_first_line(error)})") from error


def _load_weights(kind: type, folder: Path, dtype: str | torch.dtype, **options: Any) -> PreTrainedModel:
    """Loads every weight; the library would draw a missing one at random, and only mention it."""
    try:
        model, report = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"model {folder}: cannot be loaded ({_first_line(error)}); fetch or make it again") from error
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"model {folder}: {len(missing)} weights are missing, {missing[0]} first; fetch or make it again"
        )
    return model


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def model_folder(path_or_name: str | os.PathLike) -> Path:
    """Returns the folder of a model after a look at its `config.json`.

    Raises:
        InputError: if it holds no Llama.
    """
    folder = local_folder(str(path_or_name))
    config = folder / "config.json"
    if not config.is_file():
        raise InputError(f"model {folder}: holds no config.json, so it is no model folder{_milestones_hint(folder)}")
    fields = read_json(config)
    model_type = fields.get("model_type")
    if model_type not in ("llama", TinyLlamaConfig.model_type):
        raise InputError(f"{config}: model_type {model_type!r} is not a Llama; tinyllama_hf loads Llama folders only")
    if "quantization_config" in fields:
        raise InputError(
            f"{config}: the weights are quantised already; give the unquantised model, and quantise when loading"
        )
    return folder


def _milestones_hint(folder: Path) -> str:
    inside = sorted(path.parent for path in folder.glob("milestones/*/config.json")) if folder.is_dir() else []
    return f"; did you mean {inside[-1]}?" if inside else ""


def choose_device(device: str) -> str:
    """Turns `"auto"` into the best device here, and refuses one that is not there.

    Raises:
        InputError: if the name is no device, or none of that kind exists.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise InputError(f"--device {device!r}: no device; use auto, cpu, cuda or cuda:N") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {device}: this machine has no GPU that torch can use; use cpu or auto")
    if kind not in ("cpu", "cuda"):
        raise InputError(f"--device {device!r}: is not supported; use auto, cpu, cuda or cuda:N")
    return device
