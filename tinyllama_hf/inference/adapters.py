"""Loads PEFT adapters on top of a model."""

import os
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..errors import InputError, one_line, require
from ..files import read_json
from ..progress import quiet_bitsandbytes
from ..released import TOKENIZER_FILES, local_folder
from ..text import read_text
from ..tokenization_tinyllama import load_tokenizer


# Names under which PEFT saves whole matrices.
_EMBEDDING = (".embed_tokens.weight", ".embed_tokens.base_layer.weight")
_HEAD = (".lm_head.weight", ".lm_head.base_layer.weight")


def adapter_folder(path_or_id: str | os.PathLike) -> Path:
    """Returns the folder of a PEFT adapter.

    Raises:
        InputError: if files are missing, or PEFT is not installed.
    """
    quiet_bitsandbytes()  # imported by PEFT
    require("peft", "finetune", "an adapter")
    folder = local_folder(str(path_or_id), ("adapter_config.json", "adapter_model.safetensors", *TOKENIZER_FILES))
    if not (folder / "adapter_model.safetensors").is_file():
        folder = local_folder(str(path_or_id), ("adapter_model.bin",))
    if not (folder / "adapter_config.json").is_file():
        # A fine-tuned model contains the merged adapter in a subfolder.
        inside = folder / "adapter"
        hint = f"; did you mean {inside}?" if (inside / "adapter_config.json").is_file() else ""
        raise InputError(f"adapter {folder}: holds no adapter_config.json, so it is not a PEFT adapter{hint}")
    # If this is set, PEFT (0.21.2) imports the module that `megatron_core` names.
    if read_json(folder / "adapter_config.json").get("megatron_config"):
        raise InputError(f"adapter {folder}: megatron_config in adapter_config.json makes PEFT import code; remove it")
    if not any((folder / f"adapter_model.{kind}").is_file() for kind in ("safetensors", "bin")):
        raise InputError(f"adapter {folder}: holds no adapter_model.safetensors; download or save it again")
    return folder


def load_adapted_tokenizer(adapter: str | os.PathLike | None, model: str | os.PathLike) -> PreTrainedTokenizerFast:
    """Loads the tokenizer saved with the adapter if there is one, else the model's; likewise the chat template.

    Args:
        adapter (`str` or `os.PathLike`, *optional*): folder or Hub id.
        model (`str` or `os.PathLike`): folder, released name or Hub id.

    Raises:
        InputError: as in [`adapter_folder`] and `load_tokenizer`.
    """
    folder = adapter and adapter_folder(adapter)
    if folder and any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return load_tokenizer(folder)
    tokenizer = load_tokenizer(model)
    if folder and (folder / "chat_template.jinja").is_file():
        tokenizer.chat_template = read_text(folder / "chat_template.jinja")
    return tokenizer


def add_adapter(model: PreTrainedModel, folder: Path, num_tokens: int = 0, trainable: bool = False) -> Any:
    """Adds an adapter to a model, in place, in the dtype that the adapter was saved with.

    If the adapter was saved with embeddings of another size, the model's are resized to it.

    Args:
        model (`PreTrainedModel`): plain or quantized.
        folder (`Path`): from [`adapter_folder`].
        num_tokens (`int`, *optional*, defaults to 0): size of the tokenizer's vocabulary; the embeddings need at least
            as many rows.
        trainable (`bool`, *optional*, defaults to `False`): require gradients of the adapter's weights, and of no
            others.

    Returns:
        The model itself, for which `save_pretrained` then writes the adapter; with `trainable`, PEFT's wrapper around
        it.

    Raises:
        InputError: if the adapter is damaged, incomplete, or was trained on another model.
    """
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights

    config = read_json(folder / "adapter_config.json")
    base = config.get("base_model_name_or_path")
    fix = f"give the model it was trained on ({base!r}), or download or save the adapter again"
    try:
        weights = load_peft_weights(str(folder), device="cpu")
        _check_tied(model, weights, config.get("modules_to_save") or (), f"adapter {folder}: {{}}; {fix}")
        _resize(model, weights, num_tokens, folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's (0.21.2), about names in transformers, and keys: see below
            # Not `model.load_adapter` (transformers 5.23), which rounds the adapter to the dtype of the model.
            wrapped = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable).eval()
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        raise InputError(f"adapter {folder}: does not fit this model ({one_line(error)}); {fix}") from error
    saved, parameters = weights.keys(), dict(wrapped.named_parameters(remove_duplicate=False))
    # PEFT (0.21.2) saves resized modules twice, the second time with their full names but without the adapter's name.
    known = {*parameters, *(name.replace(".default.", ".") for name in parameters)}
    wanted = get_peft_model_state_dict(wrapped, parameters, save_embedding_layers=False).keys()
    problems = {"are missing": wanted - saved, "belong to no layer of this model": saved - wanted - known}
    for problem, keys in problems.items():
        if keys:
            raise InputError(f"adapter {folder}: {len(keys)} weights {problem}, the first is {min(keys)}; {fix}")
    if trainable:
        return wrapped
    model._hf_peft_config_loaded = True  # as `load_adapter` does, for saving
    return model


def _check_tied(
    model: PreTrainedModel, weights: dict[str, torch.Tensor], trained: Collection[str], error: str
) -> None:
    """Refuses embeddings of an untied model on a tied one, which has one matrix for both and would lose the other.

    Matrices in `modules_to_save` are not affected: PEFT keeps them apart from the model's.
    """
    found = [tensor for ends in (_EMBEDDING, _HEAD) for name, tensor in weights.items() if name.endswith(ends)]
    is_untied = len(found) == 2 and not found[0].equal(found[1])
    if model.config.tie_word_embeddings and is_untied and not {"embed_tokens", "lm_head"} & set(trained):
        raise InputError(error.format("has another output matrix than embeddings, and this model has one for both"))


def _resize(model: PreTrainedModel, weights: dict[str, torch.Tensor], num_tokens: int, folder: Path) -> None:
    """Resizes the embeddings if the adapter contains all their rows, which would be random otherwise."""
    rows, head_rows = ({len(t) for name, t in weights.items() if name.endswith(ends)} for ends in (_EMBEDDING, _HEAD))
    is_complete = len(rows) == 1 and (rows == head_rows or model.config.tie_word_embeddings)
    if is_complete and rows != {model.config.vocab_size}:
        model.resize_token_embeddings(rows.pop(), mean_resizing=False)
        model.eval()
    if num_tokens > model.config.vocab_size:
        raise InputError(
            f"adapter {folder}: its tokenizer has {num_tokens} tokens, but the embeddings have "
            f"{model.config.vocab_size} rows. Save the adapter with its embeddings: model.save_pretrained(FOLDER, "
            "save_embedding_layers=True)"
        )
