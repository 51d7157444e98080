"""Writes 4-bit linear layers in any layout, with one decoder layer in memory at a time.

With calibration text the scales are activation-aware (search.py). Without it the weights are only rounded, in the same
layout, and the notes say so.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...errors import InputError
from ..checkpoint import EMBEDDING, Checkpoint
from ..formats.llama_write import write_config
from ..writing import Spec, write_safetensors
from .rounding import BITS, quantize_groups
from .search import calibration_tokens, clip_layer, observe_layer, scale_layer


ROUNDING = "rounding (RTN)"
LINEAR = "_proj.weight"  # suffix of the seven linear layers in a decoder layer
OUTPUTS = 32 // BITS  # number of outputs that share a word of zero points


@dataclass(frozen=True)
class FourBitLayout:
    """How a format stores the linear layers.

    Args:
        format (`str`): its name, such as `"awq"`.
        group_size (`int`): number of consecutive inputs that share scale and zero point.
        quantization (`Mapping`): the `quantization_config` in `config.json`.
        specs (`Callable`): takes the outputs and inputs of a layer; returns dtype and shape of the tensors that
            replace its weight, by the last part of their names.
        pack (`Callable`): takes integers, scales and zeros of [`quantize_groups`]; returns these tensors.
        leading (`Mapping`): tensors at the start of the file. Others take a multiple of 4 bytes, so that wider dtypes
            are only aligned there.
    """

    format: str
    group_size: int
    quantization: Mapping[str, Any]
    specs: Callable[[int, int], dict[str, Spec]]
    pack: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Sequence[torch.Tensor]]
    leading: Mapping[str, torch.Tensor] = field(default_factory=dict)


def write_four_bit(
    checkpoint: Checkpoint, folder: Path, calibration: Sequence[str] | None, max_shard_size: int, layout: FourBitLayout
) -> tuple[str, dict[str, str]]:
    """Writes weights and `config.json`.

    Args:
        checkpoint (`Checkpoint`): a complete checkpoint. Its tokenizer encodes the calibration text.
        folder (`Path`): an existing folder.
        calibration (`Sequence[str]`, *optional*): texts like those the model will see; `None` for plain rounding.
        max_shard_size (`int`): largest size of a file in bytes.
        layout (`FourBitLayout`): how the linear layers are stored.

    Returns:
        A note for the user, and the SHA-256 of the weight files by name.

    Raises:
        InputError: before writing, if a tensor does not fit the layout, there is a bias, or the calibration text is
            too short or there is no tokenizer; while writing, if values exceed the float16 range.
    """
    specs = _specs(checkpoint, layout)
    tokens = None if calibration is None else _read_calibration(checkpoint, calibration)
    digests = write_safetensors(folder, specs, _tensors(checkpoint, tokens, layout), max_shard_size)
    write_config(checkpoint.config, folder, dtype=torch.float16, quantization_config=dict(layout.quantization))
    stored = f"{BITS} bit with zero points in groups of {layout.group_size} inputs, the rest float16"
    if tokens is None:
        return f"{ROUNDING}: {stored}. Pass calibration text for activation-aware scales", digests
    text = f"{tokens.shape[0]} sequences of {tokens.shape[1]} tokens"
    return f"{layout.format.upper()}: {stored}; scales and clipping searched on calibration text, {text}", digests


def _read_calibration(checkpoint: Checkpoint, texts: Sequence[str]) -> torch.Tensor:
    tokenizer = checkpoint.load_tokenizer()
    if tokenizer is None:
        fix = f"Add tokenizer.model or tokenizer.json, or omit the calibration text for {ROUNDING}"
        raise InputError(f"{checkpoint.path}: no tokenizer to encode the calibration text. {fix}")
    return calibration_tokens(texts, tokenizer, checkpoint.config)


def _specs(checkpoint: Checkpoint, layout: FourBitLayout) -> dict[str, Spec]:
    """Returns names, dtypes and shapes in the order of the file.

    Raises:
        InputError: if a tensor does not fit the layout.
    """
    specs: dict[str, Spec] = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in layout.leading.items()}
    for name, lazy in checkpoint.tensors.items():
        if name.endswith(".bias"):
            # Biases of v_proj and up_proj would have to be scaled as well. No released Llama has one.
            raise InputError(f"{name}: {layout.format} does not support biases. Use gguf-q8_0")
        if not name.endswith(LINEAR):
            specs[name] = (torch.float16, lazy.shape)
            continue
        rows, width = lazy.shape
        for what, size, rule in (("inputs", width, layout.group_size), ("outputs", rows, OUTPUTS)):
            if size % rule:
                raise InputError(
                    f"{name}: {size} {what}; {layout.format} requires a multiple of {rule}. Use gguf-q8_0"
                )
        module = name.removesuffix("weight")
        specs |= {module + part: spec for part, spec in layout.specs(rows, width).items()}
    return specs


def _tensors(checkpoint: Checkpoint, tokens: torch.Tensor | None, layout: FourBitLayout) -> Iterator[torch.Tensor]:
    """Yields the tensors in the order of [`_specs`], with one decoder layer in memory at a time."""
    yield from layout.leading.values()
    embedding = checkpoint.load(EMBEDDING, torch.float16)
    # [sequences, tokens, hidden], from the embedding as it is stored
    hidden = None if tokens is None else embedding[tokens].float()
    yield embedding
    del embedding
    for i in range(checkpoint.config.num_hidden_layers):
        yield from _layer(checkpoint, f"model.layers.{i}.", hidden, layout)
    for name in checkpoint.tensors:
        if name != EMBEDDING and not name.startswith("model.layers."):
            yield checkpoint.load(name, torch.float16)


def _layer(
    checkpoint: Checkpoint, prefix: str, hidden: torch.Tensor | None, layout: FourBitLayout
) -> Iterator[torch.Tensor]:
    """Yields the tensors of one decoder layer; `hidden` becomes the input of the next layer."""
    names = [name.removeprefix(prefix) for name in checkpoint.tensors if name.startswith(prefix)]
    weights = {name: checkpoint.load(prefix + name, torch.float32) for name in names}
    if hidden is not None:
        seen = observe_layer(checkpoint.config, weights, hidden)
        scale_layer(checkpoint.config, weights, seen, layout.group_size)
        clip_layer(checkpoint.config, weights, seen, layout.group_size)
        del seen
    for name in names:
        weight = weights.pop(name)
        if not name.endswith(LINEAR):
            yield _in_float16(weight, prefix + name, layout)
            continue
        integers, scales, zeros = quantize_groups(weight, layout.group_size)
        yield from layout.pack(integers, _in_float16(scales, prefix + name, layout), zeros)


def _in_float16(tensor: torch.Tensor, name: str, layout: FourBitLayout) -> torch.Tensor:
    tensor = tensor.to(torch.float16)
    if not tensor.isfinite().all():
        rule = f"values above 65504, the float16 maximum that {layout.format} requires"
        raise InputError(f"{name}: {rule}. Use gguf-q8_0")
    return tensor
