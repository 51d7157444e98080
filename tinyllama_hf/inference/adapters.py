"""PEFT adapters on top of a loaded model."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError, one_line, require
from ..files import read_json
from ..progress import quiet_bitsandbytes
from ..released import TOKENIZER_FILES, local_folder
from ..text import read_text
from ..tokenization_tinyllama import load_tokenizer


# Whole matrices, in the spellings that PEFT saves them under.
_EMBEDDING = (".embed_tokens.weight", ".embed_tokens.base_layer.weight")
_HEAD = (".lm_head.weight", ".lm_head.base_layer.weight")


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
    # With it PEFT (0.21.2) imports the module that `megatron_core` names.
    if read_json(folder / "adapter_config.json").get("megatron_config"):
        raise InputError(f"adapter {folder}: adapter_config.json has megatron_config, which imports code; remove it")
    if not any((folder / f"adapter_model.{kind}").is_file() for kind in ("safetensors", "bin")):
        raise InputError(f"adapter {folder}: holds no adapter_model.safetensors; fetch or make it again")
    return folder


def tokenizer_with(adapter: str | os.PathLike | None, model: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer to use a model with: the one that is saved with the adapter, or the model's; the same for the template.

    Args:
        adapter (`str` or `os.PathLike`, *optional*): folder or Hub id.
        model (`str` or `os.PathLike`): folder, released name or Hub id.

    Raises:
        InputError: as [`adapter_folder`] and `load_tokenizer`.
    """
    folder = adapter and adapter_folder(adapter)
    if folder and any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return load_tokenizer(folder)
    tokenizer = load_tokenizer(model)
    if folder and (folder / "chat_template.jinja").is_file():
        tokenizer.chat_template = read_text(folder / "chat_template.jinja")
    return tokenizer


def add_adapter(model: PreTrainedModel, folder: Path, num_tokens: int = 0, trainable: bool = False) -> Any:
    """Puts an adapter into a model, in place, in the precision that it was saved in.

    Embeddings are resized to the rows that the adapter was saved with, which it then replaces by its own.

    Args:
        model (`PreTrainedModel`): plain or quantised.
        folder (`Path`): from [`adapter_folder`].
        num_tokens (`int`, *optional*, defaults to 0): of the tokenizer, each of which needs a row.
        trainable (`bool`, *optional*, defaults to `False`): let its weights, and only those, ask for gradients.

    Returns:
        The model itself, whose `save_pretrained` then writes the adapter; PEFT's wrapper around it if `trainable`.

    Raises:
        InputError: if it is damaged, incomplete, or was made for another model.
    """
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    fix = f"give the model that it was trained on ({base!r}), or fetch or make it again"
    try:
        weights = load_peft_weights(str(folder), device="cpu")
        _resize(model, weights, num_tokens, folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT (0.21.2) warns of transformers' names, and of what is checked below
            # Not by the model's own `load_adapter` (transformers 5.23), which rounds the adapter to the type of the model.
            wrapped = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable).eval()
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        raise InputError(f"adapter {folder}: cannot be put on this model ({one_line(error)}); {fix}") from error
    saved, parameters = weights.keys(), dict(wrapped.named_parameters(remove_duplicate=False))
    # Resized modules PEFT (0.21.2) saves twice, once under their full names without that of the adapter.
    known = {*parameters, *(name.replace(".default.", ".") for name in parameters)}
    wanted = get_peft_model_state_dict(wrapped, parameters, save_embedding_layers=False).keys()
    for what, keys in (
        ("missing", wanted - saved),
        ("for no layer of this model", saved - wanted - known),
    ):
        if keys:
            raise InputError(f"adapter {folder}: {len(keys)} weights are {what}, {min(keys)} first; {fix}")
    if trainable:
        return wrapped
    model._hf_peft_config_loaded = True  # as `load_adapter` does, for saving
    return model


def _resize(model: PreTrainedModel, weights: dict[str, torch.Tensor], num_tokens: int, folder: Path) -> None:
    """Gives the embeddings the rows that the adapter has, where it has all of them: new rows are random otherwise."""
    rows, head_rows = ({len(t) for name, t in weights.items() if name.endswith(ends)} for ends in (_EMBEDDING, _HEAD))
    if (
        len(rows) == 1
        and (rows == head_rows or model.config.tie_word_embeddings)
        and rows != {model.config.vocab_size}
    ):
        model.resize_token_embeddings(*rows, mean_resizing=False)
        model.eval()
    if num_tokens > model.config.vocab_size:
        raise InputError(
            f"adapter {folder}: its tokenizer has {num_tokens} tokens, and the embeddings {model.config.vocab_size} rows; save "
            "the adapter with its embeddings: model.save_pretrained(FOLDER, save_embedding_layers=True)"
        )
