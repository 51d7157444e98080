"""Writes the format `awq`: 4-bit linear layers in the layout that vLLM, AutoAWQ and transformers read.

With calibration text the scales are activation-aware (search.py). Without it the weights are only rounded, in the same
format, and the notes do not call it AWQ.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ...errors import InputError
from ..checkpoint import EMBEDDING, Checkpoint
from ..formats.llama_write import write_config
from ..writing import Spec, write_safetensors
from .packing import BITS, PER_WORD, pack, quantize_groups
from .search import calibration_tokens, clip_layer, observe_layer, scale_layer


GROUP_SIZE = 128
ROUNDING = "rounding (RTN)"
# `quantization_config` in config.json. Readers expect 4 bit in every linear layer that is not listed.
QUANTIZATION = {"quant_method": "awq", "bits": BITS, "group_size": GROUP_SIZE, "zero_point": True, "version": "gemm",
                "modules_to_not_convert": ["lm_head"]}  # fmt: skip
LINEAR = "_proj.weight"  # suffix of the seven linear layers in a decoder layer


def write_awq(
    checkpoint: Checkpoint, folder: Path, calibration: Sequence[str] | None, max_shard_size: int
) -> tuple[str, dict[str, str]]:
    """Writes weights and `config.json`, with one decoder layer in memory at a time.

    Args:
        checkpoint (`Checkpoint`): a complete checkpoint. Its tokenizer encodes the calibration text.
        folder (`Path`): an existing folder.
        calibration (`Sequence[str]`, *optional*): texts like those the model will see; `None` for plain rounding.
        max_shard_size (`int`): largest size of a file in bytes.

    Returns:
        A note for the user, and the SHA-256 of the weight files by name.

    Raises:
        InputError: before writing, if a tensor does not fit the layout, there is a bias, or the calibration text is
            too short or there is no tokenizer; while writing, if values exceed the float16 range.
    """
    specs = _specs(checkpoint)
    tokens = None if calibration is None else _read_calibration(checkpoint, calibration)
    digests = write_safetensors(folder, specs, _tensors(checkpoint, tokens), max_shard_size)
    write_config(checkpoint.config, folder, dtype=torch.float16, quantization_config=dict(QUANTIZATION))
    layout = f"{BITS} bit with zero points in groups of {GROUP_SIZE} inputs, the rest float16"
    if tokens is None:
        return f"{ROUNDING}: {layout}. Pass calibration text for activation-aware scales", digests
    text = f"{tokens.shape[0]} sequences of {tokens.shape[1]} tokens"
    return f"AWQ: {layout}; scales and clipping searched on calibration text, {text}", digests


def _read_calibration(checkpoint: Checkpoint, texts: Sequence[str]) -> torch.Tensor:
    tokenizer = checkpoint.load_tokenizer()
    if tokenizer is None:
        fix = f"Add tokenizer.model or tokenizer.json, or omit the calibration text for {ROUNDING}"
        raise InputError(f"{checkpoint.path}: no tokenizer to encode the calibration text. {fix}")
    return calibration_tokens(texts, tokenizer, checkpoint.config)


def _specs(checkpoint: Checkpoint) -> dict[str, Spec]:
    """Returns names, dtypes and shapes in the order of the file.

    Every tensor takes a multiple of 4 bytes, so that int32 is aligned.

    Raises:
        InputError: if a tensor does not fit the layout.
    """
    specs: dict[str, Spec] = {}
    for name, lazy in checkpoint.tensors.items():
        if name.endswith(".bias"):
            # Biases of v_proj and up_proj would have to be scaled as well. No released Llama has one.
            raise InputError(f"{name}: awq does not support biases. Use gguf-q8_0")
        if not name.endswith(LINEAR):
            specs[name] = (torch.float16, lazy.shape)
            continue
        rows, width = lazy.shape
        for what, size, rule in (("inputs", width, GROUP_SIZE), ("outputs", rows, PER_WORD)):
            if size % rule:
                raise InputError(f"{name}: {size} {what}; awq requires a multiple of {rule}. Use gguf-q8_0")
        module, groups = name.removesuffix("weight"), width // GROUP_SIZE
        specs[f"{module}qweight"] = (torch.int32, (width, rows // PER_WORD))
        specs[f"{module}qzeros"] = (torch.int32, (groups, rows // PER_WORD))
        specs[f"{module}scales"] = (torch.float16, (groups, rows))
    return specs


def _tensors(checkpoint: Checkpoint, tokens: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """Yields the tensors in the order of [`_specs`], with one decoder layer in memory at a time."""
    embedding = checkpoint.load(EMBEDDING, torch.float16)
    # [sequences, tokens, hidden], from the embedding as it is stored
    hidden = None if tokens is None else embedding[tokens].float()
    yield embedding
    del embedding
    for i in range(checkpoint.config.num_hidden_layers):
        yield from _layer(checkpoint, f"model.layers.{i}.", hidden)
    for name in checkpoint.tensors:
        if name != EMBEDDING and not name.startswith("model.layers."):
            yield checkpoint.load(name, torch.float16)


def _layer(checkpoint: Checkpoint, prefix: str, hidden: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """Yields the tensors of one decoder layer; `hidden` becomes the input of the next layer."""
    names = [name.removeprefix(prefix) for name in checkpoint.tensors if name.startswith(prefix)]
    weights = {name: checkpoint.load(prefix + name, torch.float32) for name in names}
    if hidden is not None:
        seen = observe_layer(checkpoint.config, weights, hidden)
        scale_layer(checkpoint.config, weights, seen, GROUP_SIZE)
        clip_layer(checkpoint.config, weights, seen, GROUP_SIZE)
        del seen
    for name in names:
        weight = weights.pop(name)
        if not name.endswith(LINEAR):
            yield _in_float16(weight, prefix + name)
            continue
        integers, scales, zeros = quantize_groups(weight, GROUP_SIZE)
        yield pack(integers.T)
        yield pack(zeros.T)
        yield _in_float16(scales.T, prefix + name)


def _in_float16(tensor: torch.Tensor, name: str) -> torch.Tensor:
    tensor = tensor.to(torch.float16)
    if not tensor.isfinite().all():
        raise InputError(f"{name}: values above 65504, the float16 maximum that awq requires. Use gguf-q8_0")
    return tensor
