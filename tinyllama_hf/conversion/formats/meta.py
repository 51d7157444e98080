"""Reads Meta's layout: `consolidated.*.pth` with `params.json`, possibly in model-parallel shards."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from ...errors import InputError, damaged
from ..checkpoint import EMBEDDING, OUTPUT, Checkpoint, LazyTensor, plain_config, positive_number, read_sizes, validate
from ..reading.containers import as_state_dict, open_torch_archive, read_fields
from .layout import NameMap


NAMES = NameMap(
    "layers.{layer}.{part}.weight",
    {
        "attention.wq": "self_attn.q_proj.weight", "attention.wk": "self_attn.k_proj.weight",
        "attention.wv": "self_attn.v_proj.weight", "attention.wo": "self_attn.o_proj.weight",
        "feed_forward.w1": "mlp.gate_proj.weight", "feed_forward.w3": "mlp.up_proj.weight",
        "feed_forward.w2": "mlp.down_proj.weight", "attention_norm": "input_layernorm.weight",
        "ffn_norm": "post_attention_layernorm.weight",
    },
    {"tok_embeddings.weight": EMBEDDING, "norm.weight": "model.norm.weight", "output.weight": OUTPUT},
)  # fmt: skip
_SIZES = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
          "n_kv_heads": "num_key_value_heads"}  # fmt: skip
# Tensors that are split over the model-parallel shards by rows or by columns; each shard has all of the norms.
_BY_ROWS = ("attention.wq", "attention.wk", "attention.wv", "feed_forward.w1", "feed_forward.w3", "output.weight")
_BY_COLUMNS = ("attention.wo", "feed_forward.w2")
_CONTEXT_NOTE = "max_position_embeddings is 4096 as in Llama 2, since Meta's files do not contain it. Check it"
_TIKTOKEN_NOTE = "tokenizer.model is not a SentencePiece model. Use tokenizer.json from the Hugging Face folder"


def read_meta(folder: Path) -> Checkpoint:
    """Opens a folder with `consolidated.*.pth` and `params.json`.

    The files do not contain the context length. The configuration gets Llama 2's 4096, with a note for the user.

    Raises:
        InputError: if a file is missing or damaged, or the shards belong to different models.
    """
    files = sorted(folder.glob("consolidated.*.pth"), key=_number)
    numbers = [_number(file) for file in files]
    if numbers != list(range(len(files))):
        found = f"shards {numbers} of consolidated.*.pth, which must be numbered from 0 without gaps"
        raise InputError(f"{folder}: {found}. Download the missing ones")
    params_file = folder / "params.json"
    if not params_file.is_file():
        raise InputError(f"{params_file}: file not found; it contains the number of heads. Download it")
    params = read_fields(params_file)
    shards = [as_state_dict(open_torch_archive(file), file) for file in files]
    if any(shard.keys() != shards[0].keys() for shard in shards):
        raise damaged(folder, "its shards contain different tensors")
    hidden = positive_number(params, "dim", params_file)
    merged = {name: _merge(name, [shard[name] for shard in shards], hidden) for name in shards[0]}
    config = _config(params, params_file, merged)
    tokenizer = next((p for p in (folder / "tokenizer.model", folder.parent / "tokenizer.model") if p.is_file()), None)
    notes = [_CONTEXT_NOTE]
    if tokenizer is not None and tokenizer.read_bytes()[:1] != b"\n":  # the first byte of every SentencePiece model
        tokenizer = None
        notes = [_TIKTOKEN_NOTE, _CONTEXT_NOTE]
    tensors = NAMES.from_pairwise(merged, config)
    return validate(Checkpoint(folder, f"Meta, {len(files)} file(s)", config, tensors, tokenizer, notes=notes))


def _number(file: Path) -> int:
    digits = file.name.split(".")[1]
    if not digits.isdecimal():
        raise InputError(f"{file}: not a shard of Meta's. They are named consolidated.00.pth and so on")
    return int(digits)


def _config(params: Mapping[str, Any], where: Path, tensors: Mapping[str, LazyTensor]) -> LlamaConfig:
    if params.get("use_scaled_rope"):
        found = "use_scaled_rope is set, but the file does not contain the scaling parameters of Llama 3.1"
        raise InputError(f"{where}: {found}. Convert the model's Hugging Face folder")
    embedding, gate = "tok_embeddings.weight", "layers.0.feed_forward.w1.weight"
    for name in (embedding, gate):
        if name not in tensors or not tensors[name].shape:
            raise damaged(where.parent, f"{name} is missing or has no rows")
    number = partial(positive_number, params, where=where, kind=float)
    return plain_config(
        where,
        **read_sizes(params, _SIZES, where),
        vocab_size=tensors[embedding].shape[0],
        intermediate_size=tensors[gate].shape[0],
        max_position_embeddings=4096,
        rms_norm_eps=number("norm_eps", default=1e-5),
        rope_parameters={"rope_type": "default", "rope_theta": number("rope_theta", default=10000.0)},
        tie_word_embeddings="output.weight" not in tensors,
    )


def _merge(name: str, parts: list[LazyTensor], hidden: int) -> LazyTensor:
    """Joins the model-parallel parts of a tensor."""
    first = parts[0]
    if len(parts) == 1:
        return first
    kind = NAMES.layer_and_part(name)[1] or name
    if kind == "tok_embeddings.weight":  # split by columns in Llama 1 and 2, by rows in Llama 3
        dim = 0 if first.shape[-1:] == (hidden,) else 1
    elif kind in _BY_ROWS + _BY_COLUMNS:
        dim = int(kind in _BY_COLUMNS)
    else:
        return first.map(lambda whole: _same_in_all(whole, parts))
    if len(first.shape) != 2 or any((part.shape, part.dtype) != (first.shape, first.dtype) for part in parts):
        raise damaged(first.source, "the shapes or dtypes in the shards differ")
    rows, columns = first.shape
    shape = (rows * len(parts), columns) if dim == 0 else (rows, columns * len(parts))
    return first.map(lambda whole: torch.cat([whole, *(part.read() for part in parts[1:])], dim), shape)


def _same_in_all(whole: torch.Tensor, parts: list[LazyTensor]) -> torch.Tensor:
    """Returns a tensor that every shard contains, after comparing all copies."""
    if other := next((part for part in parts[1:] if not part.read().equal(whole)), None):
        raise damaged(other.source, f"it differs from {parts[0].source}")
    return whole
