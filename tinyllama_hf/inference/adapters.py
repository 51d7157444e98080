"""PEFT adapters on top of a loaded model."""

import os
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from ..errors import InputError, require
from ..progress import quiet_bitsandbytes
from ..provenance import read_json
from ..released import TOKENIZER_FILES, local_folder


_FIX = "give the model that it was trained on, or fetch or make it again"


def adapter_folder(path_or_id: str | os.PathLike) -> Path:
    """Returns the folder of a PEFT adapter.

    Raises:
        InputError: if it holds none or only a part, or PEFT is not installed.
    """
    quiet_bitsandbytes()  # which PEFT imports
    require("peft", "finetune", "an adapter")
    folder = local_folder(str(path_or_id), ("adapter_config.json", "adapter_model.safetensors", *TOKENIZER_FILES))
    if not (folder / "adapter_model.safetensors").is_file():
        folder = local_folder(str(path_or_id), ("adapter_model.bin",))
    if not (folder / "adapter_config.json").is_file():
        # A fine-tuned model has its adapter, which is merged already, in a folder of its own.
        hint = (
            f"; did you mean {folder / 'adapter'}?" if (folder / "adapter" / "adapter_config.json").is_file() else ""
        )
        raise InputError(f"adapter {folder}: holds no adapter_config.json, so it is no PEFT adapter{hint}")
    if read_json(folder / "adapter_config.json").get(
        "megatron_config"
    ):  # with it PEFT imports the module `megatron_core`
        raise InputError(
            f"adapter {folder}: adapter_config.json has megatron_config, which imports code; remove the field"
        )
    if not any((folder / f"adapter_model.{kind}").is_file() for kind in ("safetensors", "bin")):
        raise InputError(f"adapter {folder}: holds no adapter_model.safetensors; fetch or make it again")
    return folder


def add_adapter(model: PreTrainedModel, folder: Path, trainable: bool = False) -> Any:
    """Puts an adapter into a model, in place, in the precision that it was saved in.

    Args:
        model (`PreTrainedModel`): plain or quantised.
        folder (`Path`): from [`adapter_folder`].
        trainable (`bool`, *optional*, defaults to `False`): let its weights, and only those, ask for gradients.

    Returns:
        The model itself, whose `save_pretrained` then writes the adapter; PEFT's wrapper around it if `trainable`.

    Raises:
        InputError: if it is damaged, incomplete, or was made for another model.
    """
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT (0.21.2) warns of transformers' names, and of what is checked below
            # Not by the model's own `load_adapter` (transformers 5.23), which rounds the adapter to the type of the model.
            wrapped = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable).eval()
        saved = load_peft_weights(str(folder), device="cpu").keys()
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        raise InputError(f"adapter {folder}: cannot be put on this model ({one_line(error)}); {_FIX}") from error
    parameters = dict(wrapped.named_parameters())
    wanted = get_peft_model_state_dict(wrapped, parameters, save_embedding_layers=False).keys()
    for what, keys in (
        ("missing", wanted - saved),
        ("for no layer of this model", saved - wanted - parameters.keys()),
    ):
        if keys:
            raise InputError(f"adapter {folder}: {len(keys)} weights are {what}, {min(keys)} first; {_FIX}")
    if trainable:
        return wrapped
    model._hf_peft_config_loaded = True  # as `load_adapter` does, for saving
    return model


def one_line(error: Exception) -> str:
    """What a library says, short enough for a message."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text if len(text) <= 200 else text[:200] + '...'}"
