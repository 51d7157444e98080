"""Reads llama2.c's first format: seven integers, then float32 tensors in a fixed order, with Meta's row order."""

import math
import struct
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ...errors import damaged
from ..checkpoint import Checkpoint, LazyTensor, plain_config, validate
from .meta import NAMES


_HEADER = struct.Struct("<7i")
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
          "vocab_size", "max_position_embeddings")  # fmt: skip


def read_llama2c(path: Path) -> Checkpoint | None:
    """Opens a file of llama2.c's first format. A negative vocabulary size in the header means an untied output.

    The format has no magic number. It is recognized by a plausible header with exactly the matching file size.

    Returns:
        `None` if the file is not of this format.
    """
    header = _read_header(path)
    if header is None:
        return None
    layers, vocab = header[2], header[5]
    tensors: dict[str, LazyTensor] = {}
    position = _HEADER.size
    for kind, shape in _parts(header):
        in_layers = kind in NAMES.inside
        one = shape[1:] if in_layers else shape
        for layer in range(layers if in_layers else 1):
            name = NAMES.block.format(layer=layer, part=kind) if in_layers else kind
            tensors[name] = LazyTensor(one, torch.float32, partial(_read, path, position, one), f"{path}: {name}")
            position += 4 * math.prod(one)
    if path.stat().st_size != position:
        return None
    sizes = dict(zip(_SIZES, header, strict=True)) | {"vocab_size": abs(vocab)}
    config = plain_config(path, **sizes, tie_word_embeddings=vocab > 0)
    model = path.with_name("tokenizer.model")
    tokenizer = model if model.is_file() else None
    return validate(Checkpoint(path, "llama2.c", config, NAMES.from_pairwise(tensors, config), tokenizer))


def _read_header(path: Path) -> tuple[int, ...] | None:
    with path.open("rb") as file:
        data = file.read(_HEADER.size)
    if len(data) < _HEADER.size:
        return None
    hidden, inner, layers, heads, groups, vocab, context = header = _HEADER.unpack(data)
    sizes = (hidden, inner, layers, heads, groups, abs(vocab), context)
    is_plausible = all(0 < size < 2**20 for size in sizes) and layers < 2**10
    if not is_plausible or hidden % heads or heads % groups or hidden // heads % 2:
        return None
    return header


def _parts(header: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Returns kinds of tensors and their shapes in the order of the file, each kind for all layers together."""
    hidden, inner, layers, heads, groups, vocab, context = header
    key = hidden // heads * groups
    return [
        ("tok_embeddings.weight", (abs(vocab), hidden)), ("attention_norm", (layers, hidden)),
        ("attention.wq", (layers, hidden, hidden)), ("attention.wk", (layers, key, hidden)),
        ("attention.wv", (layers, key, hidden)), ("attention.wo", (layers, hidden, hidden)),
        ("ffn_norm", (layers, hidden)), ("feed_forward.w1", (layers, inner, hidden)),
        ("feed_forward.w2", (layers, hidden, inner)), ("feed_forward.w3", (layers, inner, hidden)),
        ("norm.weight", (hidden,)), ("rope.freqs", (2, context, hidden // heads // 2)),
        *([("output.weight", (-vocab, hidden))] if vocab < 0 else []),
    ]  # fmt: skip


def _read(path: Path, position: int, shape: tuple[int, ...]) -> torch.Tensor:
    values = np.fromfile(path, "<f4", math.prod(shape), offset=position)
    if values.size != math.prod(shape):
        raise damaged(path, "it ends early")
    return torch.from_numpy(values).view(shape)
