"""The target `awq`: linear layers in 4 bit, in the layout that vLLM, AutoAWQ and transformers read.

With calibration text the scales are activation-aware (search.py); without it the weights are only rounded, and
nothing here calls that AWQ. The files are of the same format either way.
"""

import copy
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
# What readers take from config.json. They make every linear layer a 4-bit one that is not named here.
QUANTIZATION = {"quant_method": "awq", "bits": BITS, "group_size": GROUP_SIZE, "zero_point": True, "version": "gemm",
                "modules_to_not_convert": ["lm_head"]}  # fmt: skip
LINEAR = "_proj.weight"  # how the names of a decoder layer's seven linear layers end


def write_awq(
    checkpoint: Checkpoint, folder: Path, calibration: Sequence[str] | None, max_shard_size: int
) -> tuple[str, dict[str, str]]:
    """Writes weights, `config.json` and `generation_config.json`; decoder layers go through memory one by one.

    Args:
        checkpoint (`Checkpoint`): a complete one; its tokenizer reads the calibration text.
        folder (`Path`): where to write; exists.
        calibration (`Sequence[str]`, *optional*): texts like those that the model will see; `None` for plain rounding.
        max_shard_size (`int`): bytes of a file.

    Returns:
        What was done, in a line for people, and SHA-256 by name of the files with weights.

    Raises:
        InputError: before anything is written, for a width that the layout cannot hold, a bias, or calibration text
            without a tokenizer or too short; while writing, for values beyond float16.
    """
    specs = _specs(checkpoint)
    tokens = None if calibration is None else _read_calibration(checkpoint, calibration)
    digests = write_safetensors(folder, specs, _tensors(checkpoint, tokens), max_shard_size)
    config = copy.deepcopy(checkpoint.config)
    config.quantization_config = copy.deepcopy(QUANTIZATION)
    write_config(config, folder, torch.float16)
    layout = f"{BITS} bit with zero points in groups of {GROUP_SIZE} inputs, the rest float16"
    if tokens is None:
        return f"{ROUNDING}: {layout}; give calibration text for activation-aware scales", digests
    text = f"{tokens.shape[0]} sequences of {tokens.shape[1]} tokens"
    return f"AWQ: {layout}; scales and clipping searched on calibration text, {text}", digests


def _read_calibration(checkpoint: Checkpoint, texts: Sequence[str]) -> torch.Tensor:
    tokenizer = checkpoint.load_tokenizer()
    if tokenizer is None:
        raise InputError(
            f"{checkpoint.path}: has no tokenizer, which the calibration text needs; put tokenizer.model or tokenizer.json "
            f"beside it, or give no calibration text for {ROUNDING}"
        )
    return calibration_tokens(texts, tokenizer, checkpoint.config)


def _specs(checkpoint: Checkpoint) -> dict[str, Spec]:
    """Names, dtypes and shapes of the file, in its order: every tensor is a multiple of 4 bytes long, as int32 wants.

    Raises:
        InputError: for a tensor that the layout cannot hold.
    """
    specs: dict[str, Spec] = {}
    for name, lazy in checkpoint.tensors.items():
        if name.endswith(".bias"):
            # v_proj's and up_proj's would have to be scaled as well; no released Llama has one.
            raise InputError(f"{name}: the format awq is written for linear layers without a bias; use gguf-q8_0")
        if not name.endswith(LINEAR):
            specs[name] = (torch.float16, lazy.shape)
            continue
        rows, width = lazy.shape
        for what, size, rule in (("inputs", width, GROUP_SIZE), ("outputs", rows, PER_WORD)):
            if size % rule:
                raise InputError(f"{name}: has {size} {what}, and the format awq takes multiples of {rule} only; "
                                 "use gguf-q8_0")  # fmt: skip
        module, groups = name.removesuffix("weight"), width // GROUP_SIZE
        specs[f"{module}qweight"] = (torch.int32, (width, rows // PER_WORD))
        specs[f"{module}qzeros"] = (torch.int32, (groups, rows // PER_WORD))
        specs[f"{module}scales"] = (torch.float16, (groups, rows))
    return specs


def _tensors(checkpoint: Checkpoint, tokens: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """The tensors of the file in the order of [`_specs`], a decoder layer in memory at a time."""
    embedding = checkpoint.load(EMBEDDING, torch.float16)
    # [sequences, tokens, hidden], of the embedding that readers will find
    hidden = None if tokens is None else embedding[tokens].float()
    yield embedding
    del embedding
    for i in range(checkpoint.config.num_hidden_layers):
        yield from _layer(checkpoint, f"model.layers.{i}.", hidden)
    for name in checkpoint.tensors:
        if name != EMBEDDING and not name.startswith("model.layers."):
            yield checkpoint.load(name, torch.float16)


def _layer(checkpoint: Checkpoint, prefix: str, hidden: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """The tensors of one decoder layer; `hidden` becomes the input of the next one."""
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
        raise InputError(f"{name}: has values that the format awq cannot hold in float16, which ends at 65504; use "
                         "gguf-q8_0")  # fmt: skip
    return tensor
