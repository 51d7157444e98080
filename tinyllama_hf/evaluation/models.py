"""Models to evaluate: model folders or the milestones of a run, plain or quantized."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError
from ..files import read_json
from ..inference.load import load, load_stock, model_folder, stock_tokenizer
from ..inference.packed_weights import pack_weights
from ..pretrain.milestones import CONFIG_FILE, find_run, list_milestones, read_record
from ..quantization.names import GPU_CAPABILITIES
from ..quantization.quantized_model import (
    cast_unquantized,
    check_quantization,
    choose_quantization,
    saved_quantization,
)
from .score_files import ScoredModel


def describe_model(
    folder: Path, quantization: str = "none", name: str = "", adapter: str | None = None
) -> ScoredModel:
    """Returns the description of a model folder. Loads no weights.

    Args:
        folder (`Path`): a model folder.
        quantization (`str`, *optional*, defaults to `"none"`): quantization to apply while loading. A folder that was
            saved quantized keeps its own.
        name (`str`, *optional*): defaults to the name of the folder.
        adapter (`str`, *optional*): folder or Hub id of an adapter on top of it.

    Raises:
        InputError: if the folder was saved with another quantization, or the backend is not installed.
    """
    config = folder / "config.json"
    kind = choose_quantization(quantization, saved_quantization(read_json(config), str(config)), str(folder))
    check_quantization(kind)
    name = name or folder.name
    is_milestone = (folder / "provenance.json").is_file() and (folder / CONFIG_FILE).is_file()
    made = read_record(folder) if is_milestone else {}
    parts = [*([f"with {Path(adapter).name}"] if adapter else []), *([kind] if kind != "none" else [])]
    return ScoredModel(
        name=f"{name} ({', '.join(parts)})" if parts else name,
        path=str(folder),
        quantization=kind,
        adapter=adapter,
        step=made.get("step"),
        tokens=made.get("tokens"),
    )


def list_eval_models(
    models: Sequence[str], quantization: str = "none", adapter: str | None = None
) -> list[ScoredModel]:
    """Returns the models to evaluate: all milestones if `models` is one run, else each model. Loads no weights.

    An adapter is loaded on top of each of them.

    Raises:
        InputError: as [`describe_model`]; if a model does not exist, or a run has no milestone yet.
    """
    if run := find_run(models):
        return [describe_model(folder, quantization, adapter=adapter) for folder in require_milestones(run)]
    folders = {name: model_folder(name, quantized=True) for name in models}
    return [
        describe_model(folder, quantization, "" if Path(name).is_dir() else name, adapter)
        for name, folder in folders.items()
    ]


def load_eval_model(
    model: ScoredModel, device: str = "auto", dtype: torch.dtype | None = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads model and tokenizer as stock transformers classes. If an adapter has a tokenizer, that is used.

    A model that is quantized here gives the same outputs, bit for bit, as a folder that was saved after
    `load(..., quantization=...)`.

    Args:
        model (`ScoredModel`): the model to load.
        device (`str`, *optional*, defaults to `"auto"`): the device to run on.
        dtype (`torch.dtype`, *optional*, defaults to fp32): dtype of all weights that are not quantized, `None` for
            the saved one. In int4 and fp8 models they are always bf16, which the kernels require.

    Raises:
        InputError: as [`load_stock`]; for an adapter on an int4 or fp8 model.
    """
    folder, kind = model.folder, model.quantization
    wanted: str | torch.dtype = dtype or "auto"
    tokenizer: PreTrainedTokenizerBase
    if kind in GPU_CAPABILITIES and not model.adapter:  # with an adapter, `load` refuses
        return load_stock(folder, device, torch.bfloat16, kind)
    if model.adapter:
        # PEFT's wrapper is removed: its `forward` is not that of a model in transformers.
        adapted, tokenizer = load(folder, wanted, device, kind, adapter=model.adapter, trainable=True)
        loaded = cast(Any, adapted).get_base_model()
    elif saved_quantization(read_json(folder / "config.json"), str(folder)) == kind:
        loaded, tokenizer = load_stock(folder, device, wanted)
    else:
        loaded, _ = load(folder, device=device, quantization=kind, trainable=True)
        tokenizer = stock_tokenizer(folder)
    if dtype:
        cast_unquantized(loaded, dtype)  # after quantization, which starts from the dtype of the file
    if not model.adapter:
        pack_weights(loaded)
    return loaded.eval(), tokenizer


def require_milestones(run: Path) -> list[Path]:
    """Returns the milestones of a run in the order of their steps.

    Raises:
        InputError: if the run has no milestone yet.
    """
    folders = list_milestones(run)
    if not folders:
        raise InputError(f"run {run}: has no milestone yet. Wait for the first one, or start the training")
    return folders
