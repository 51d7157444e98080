"""Writes a plain Llama folder: safetensors, configuration, generation configuration."""

import copy
from pathlib import Path

import torch
from transformers import LlamaConfig

from ...files import write_json
from ..checkpoint import EMBEDDING, Checkpoint
from ..writing import write_safetensors


def write_llama(
    checkpoint: Checkpoint, folder: Path, dtype: torch.dtype | None, max_shard_size: int
) -> dict[str, str]:
    """Writes weights and `config.json`, tensor by tensor; `dtype` of `None` keeps each one's.

    Returns:
        SHA-256 by name of the files with weights.
    """
    kinds = {name: dtype or tensor.dtype for name, tensor in checkpoint.tensors.items()}
    # The wider first: see `write_safetensors`.
    names = sorted(kinds, key=lambda name: -kinds[name].itemsize)
    specs = {name: (kinds[name], checkpoint.tensors[name].shape) for name in names}
    digests = write_safetensors(folder, specs, (checkpoint.load(name, kinds[name]) for name in names), max_shard_size)
    write_config(checkpoint.config, folder, kinds[EMBEDDING])
    return digests


def write_config(config: LlamaConfig, folder: Path, dtype: torch.dtype) -> None:
    """Writes `config.json`, with the dtype that readers are to take."""
    config = copy.deepcopy(config)
    config.dtype = dtype
    config.save_pretrained(folder)


def write_generation_config(checkpoint: Checkpoint, folder: Path, padding: int | None) -> None:
    """Writes `generation_config.json`: the source's, else the ids of begin, end and padding.

    As it is, and not through transformers, which reads settings that it refuses to write (a temperature without
    `do_sample`, as the first Llama 2 folders had).
    """
    config = checkpoint.config
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id, "pad_token_id": padding}
    fields = checkpoint.generation if checkpoint.generation is not None else ids
    write_json(folder / "generation_config.json", {name: value for name, value in fields.items() if value is not None})
