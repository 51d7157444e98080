"""The models that are evaluated: folders or a run's milestones, quantised as they were saved or as is asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError
from ..files import read_json
from ..inference.load import load, load_stock, model_folder, stock_tokenizer
from ..pretrain.milestones import CONFIG_FILE, MILESTONES_FOLDER, list_milestones, read_record
from ..quantization.bitsandbytes import cast_plain, check_quantization, chosen_quantization, quantization_of


class Evaluated(NamedTuple):
    """A model to evaluate.

    Attributes:
        folder (`Path`): where it lies.
        name (`str`): with the quantisation behind it, `"my-model (nf4)"`, so that no reader takes its scores for the plain
            model's.
        quantization (`str`): one of `QUANTIZATIONS`.
    """

    folder: Path
    name: str
    quantization: str

    def record(self) -> dict[str, Any]:
        """As it stands in a score file, a milestone with its `step` and `tokens`."""
        is_milestone = (self.folder / "provenance.json").is_file() and (self.folder / CONFIG_FILE).is_file()
        made = read_record(self.folder) if is_milestone else {}
        place = {key: made[key] for key in ("step", "tokens") if key in made}
        return {"name": self.name, "path": str(self.folder), "quantization": self.quantization, **place}


def evaluated(folder: Path, quantization: str = "none", name: str = "") -> Evaluated:
    """What is evaluated of a folder; loads nothing.

    Args:
        folder (`Path`): a model folder.
        quantization (`str`, *optional*, defaults to `"none"`): to quantise it while it is loaded; a folder that was saved
            quantised has its own.
        name (`str`, *optional*): defaults to the folder's.

    Raises:
        InputError: if the folder has another quantisation already, or the backend is missing.
    """
    config = folder / "config.json"
    kind = chosen_quantization(quantization, quantization_of(read_json(config), str(config)), str(folder))
    check_quantization(kind)
    name = name or folder.name
    return Evaluated(folder, name if kind == "none" else f"{name} ({kind})", kind)


def models_to_score(models: Sequence[str], quantization: str = "none") -> list[Evaluated]:
    """The models of an evaluation: the milestones of a run if one is named, else each folder or name; loads nothing.

    Raises:
        InputError: as [`evaluated`]; if a model does not exist, or a run has no milestone yet.
    """
    if run := the_run(models):
        return [evaluated(folder, quantization) for folder in milestones_of(run)]
    folders = {name: model_folder(name, quantized=True) for name in models}
    return [evaluated(folder, quantization, "" if Path(name).is_dir() else name) for name, folder in folders.items()]


def load_evaluated(
    model: Evaluated, device: str = "auto", dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads model and tokenizer as stock classes.

    A model that is quantised here computes bit for bit what its folder does, saved after `load(..., quantization=...)`.

    Args:
        model (`Evaluated`): what is evaluated.
        device (`str`, *optional*, defaults to `"auto"`): where it is to run.
        dtype (`torch.dtype`, *optional*, defaults to fp32): of all that is not quantised.

    Raises:
        InputError: as [`load_stock`].
    """
    folder, kind = model.folder, model.quantization
    if quantization_of(read_json(folder / "config.json"), str(folder)) == kind:
        loaded, tokenizer = load_stock(folder, device, dtype)
    else:
        loaded, _ = load(folder, device=device, quantization=kind, trainable=True)
        tokenizer = stock_tokenizer(folder)
    cast_plain(loaded, dtype)  # a model is quantised in its file's type
    return loaded, tokenizer


def the_run(models: Sequence[str]) -> Path | None:
    """The run that is meant, if one folder with milestones is named."""
    return Path(models[0]) if len(models) == 1 and (Path(models[0]) / MILESTONES_FOLDER).is_dir() else None


def milestones_of(run: Path) -> list[Path]:
    """The milestones of a run, in the order of their steps.

    Raises:
        InputError: if there is none yet.
    """
    folders = list_milestones(run)
    if not folders:
        raise InputError(f"run {run}: has no milestone yet; wait for the first, or train it")
    return folders
