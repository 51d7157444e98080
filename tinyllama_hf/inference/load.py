"""Loading a model with its tokenizer for inference."""

import json
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..configuration_tinyllama import TinyLlamaConfig
from ..errors import InputError
from ..modeling_tinyllama import TinyLlamaForCausalLM
from ..released import local_folder
from ..tokenization_tinyllama import load_tokenizer


def load(
    path_or_name: str | os.PathLike, dtype: str | torch.dtype = "auto", device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model in evaluation mode, with its tokenizer.

    Args:
        path_or_name (`str` or `os.PathLike`): a folder, a name of the released ladder, or a Hub id.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`): of the weights; `"auto"` takes the file's.
        device (`str`, *optional*, defaults to `"auto"`): `"auto"` takes a GPU where there is one.

    Returns:
        `(model, tokenizer)`: a `TinyLlamaForCausalLM` for a Llama folder.

    Raises:
        InputError: if it is no model folder, is no Llama, or the device is not there.
    """
    device = choose_device(device)
    folder = model_folder(path_or_name)
    model = TinyLlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.to(device).eval(), load_tokenizer(folder)


def load_stock(folder: Path, device: str = "auto", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Loads a folder with stock transformers alone, as somebody without this package would."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(choose_device(device)).eval()


def model_folder(path_or_name: str | os.PathLike) -> Path:
    """Returns the folder of a model after a look at its `config.json`.

    Raises:
        InputError: if it holds no Llama.
    """
    folder = local_folder(str(path_or_name))
    config = folder / "config.json"
    if not config.is_file():
        raise InputError(f"model {folder}: holds no config.json, so it is no model folder{_milestones_hint(folder)}")
    model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    if model_type not in ("llama", TinyLlamaConfig.model_type):
        raise InputError(f"{config}: model_type {model_type!r} is not a Llama; tinyllama_hf loads Llama folders only")
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
