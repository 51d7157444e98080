"""Writes a plain Llama folder: safetensors, configuration, generation configuration, tokenizer."""

import copy
from pathlib import Path

import torch
from transformers import GenerationConfig

from .checkpoint import EMBEDDING, Checkpoint
from .writing import ahead, write_safetensors


def write_llama(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype | None, max_shard_size: int) -> None:
    """Writes weights, `config.json` and `generation_config.json`, tensor by tensor; `dtype` of `None` keeps each one's."""
    kinds = {name: dtype or tensor.dtype for name, tensor in checkpoint.tensors.items()}
    # The wider first: see `write_safetensors`.
    names = sorted(kinds, key=lambda name: -kinds[name].itemsize)
    specs = {name: (kinds[name], checkpoint.tensors[name].shape) for name in names}
    write_safetensors(folder, specs, ahead(checkpoint.load(name, kinds[name]) for name in names), max_shard_size)
    write_configs(checkpoint, folder, kinds[EMBEDDING])


def write_configs(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype) -> None:
    """Writes `config.json` with the dtype, and the generation configuration of the source or Llama's."""
    config = copy.deepcopy(checkpoint.config)
    config.dtype = dtype
    config.save_pretrained(folder)
    fields = checkpoint.generation
    if fields is None:  # padding is <unk>, as everywhere in this package
        fields = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id, "pad_token_id": 0}
    GenerationConfig(**fields).save_pretrained(folder)
