"""Models to evaluate: model folders or the milestones of a run, plain or quantized."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError
from ..files import read_json
from ..inference.load import load, load_stock, model_folder, stock_tokenizer
from ..pretrain.milestones import CONFIG_FILE, find_run, list_milestones, read_record
from ..quantization.names import GPU_CAPABILITIES
from ..quantization.quantized_model import (
    cast_unquantized,
    check_quantization,
    choose_quantization,
    saved_quantization,
)
from .score_files import ScoredModel


def describe_model(folder: Path, quantization: str = "none", name: str = "") -> ScoredModel:
    """Returns the description of a model folder. Loads no weights.

    Args:
        folder (`Path`): a model folder.
        quantization (`str`, *optional*, defaults to `"none"`): quantization to apply while loading. A folder that was
            saved quantized keeps its own.
        name (`str`, *optional*): defaults to the name of the folder.

    Raises:
        InputError: if the folder was saved with another quantization, or the backend is not installed.
    """
    config = folder / "config.json"
    kind = choose_quantization(quantization, saved_quantization(read_json(config), str(config)), str(folder))
    check_quantization(kind)
    name = name or folder.name
    is_milestone = (folder / "provenance.json").is_file() and (folder / CONFIG_FILE).is_file()
    made = read_record(folder) if is_milestone else {}
    return ScoredModel(
        name=name if kind == "none" else f"{name} ({kind})",
        path=str(folder),
        quantization=kind,
        step=made.get("step"),
        tokens=made.get("tokens"),
    )


def list_eval_models(models: Sequence[str], quantization: str = "none") -> list[ScoredModel]:
    """Returns the models to evaluate: all milestones if `models` is one run, else each model. Loads no weights.

    Raises:
        InputError: as [`describe_model`]; if a model does not exist, or a run has no milestone yet.
    """
    if run := find_run(models):
        return [describe_model(folder, quantization) for folder in require_milestones(run)]
    folders = {name: model_folder(name, quantized=True) for name in models}
    return [
        describe_model(folder, quantization, "" if Path(name).is_dir() else name) for name, folder in folders.items()
    ]


def load_eval_model(
    model: ScoredModel, device: str = "auto", dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads model and tokenizer as stock transformers classes.

    A model that is quantized here gives the same outputs, bit for bit, as a folder that was saved after
    `load(..., quantization=...)`.

    Args:
        model (`ScoredModel`): the model to load.
        device (`str`, *optional*, defaults to `"auto"`): the device to run on.
        dtype (`torch.dtype`, *optional*, defaults to fp32): dtype of all weights that are not quantized; in
            an int4 or fp8 model they are bf16, which the kernels require.

    Raises:
        InputError: as [`load_stock`].
    """
    folder, kind = model.folder, model.quantization
    if kind in GPU_CAPABILITIES:
        return load_stock(folder, device, torch.bfloat16, kind)
    if saved_quantization(read_json(folder / "config.json"), str(folder)) == kind:
        loaded, tokenizer = load_stock(folder, device, dtype)
    else:
        loaded, _ = load(folder, device=device, quantization=kind, trainable=True)
        tokenizer = stock_tokenizer(folder)
    cast_unquantized(loaded, dtype)  # after quantization, which starts from the dtype of the file
    return loaded, tokenizer


def require_milestones(run: Path) -> list[Path]:
    """Returns the milestones of a run in the order of their steps.

    Raises:
        InputError: if the run has no milestone yet.
    """
    folders = list_milestones(run)
    if not folders:
        raise InputError(f"run {run}: has no milestone yet. Wait for the first one, or start the training")
    return folders
