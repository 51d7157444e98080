"""Writes a plain Llama folder: safetensors, configuration, generation configuration."""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from ...files import write_json
from ..checkpoint import EMBEDDING, Checkpoint
from ..writing import write_safetensors


def write_llama(
    checkpoint: Checkpoint, folder: Path, dtype: torch.dtype | None, max_shard_size: int
) -> dict[str, str]:
    """Writes weights and `config.json` tensor by tensor; `dtype=None` keeps the dtype of each tensor.

    Returns:
        The SHA-256 of the weight files by name.
    """
    kinds = {name: dtype or tensor.dtype for name, tensor in checkpoint.tensors.items()}
    # Wider dtypes first, see `write_safetensors`.
    names = sorted(kinds, key=lambda name: -kinds[name].itemsize)
    specs = {name: (kinds[name], checkpoint.tensors[name].shape) for name in names}
    digests = write_safetensors(folder, specs, (checkpoint.load(name, kinds[name]) for name in names), max_shard_size)
    write_config(checkpoint.config, folder, dtype=kinds[EMBEDDING])
    return digests


def write_config(config: LlamaConfig, folder: Path, **fields: Any) -> None:
    """Writes `config.json` with other or additional values of fields, such as the dtype that readers should use."""
    config = copy.deepcopy(config)
    config.update(fields)
    config.save_pretrained(folder)


def write_generation_config(checkpoint: Checkpoint, folder: Path, padding: int | None) -> None:
    """Writes `generation_config.json`: the source's, or the ids of begin-of-sequence, end-of-sequence and padding.

    It is written without transformers, which refuses to write some settings that it reads, such as the temperature
    without `do_sample` of the first Llama 2 folders.
    """
    config = checkpoint.config
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id, "pad_token_id": padding}
    fields = checkpoint.generation if checkpoint.generation is not None else ids
    write_json(folder / "generation_config.json", {name: value for name, value in fields.items() if value is not None})
