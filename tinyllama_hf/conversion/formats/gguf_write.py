"""Writes a Llama as a GGUF file: metadata and tokenizer first, then one tensor after another."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import LlamaConfig

from ...errors import InputError, did_you_mean, require
from ...gguf.vocabulary import NO_TOKENIZER
from ..checkpoint import EMBEDDING, OUTPUT, Checkpoint, require_values
from .gguf_read import DTYPES, NAMES, SIZES
from .gguf_write_tokenizer import add_tokenizer
from .rotary import rotated_heads, to_pairwise


if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

# Kind of the file: names of its type and of the file's in the package `gguf`.
KINDS = {"f32": ("F32", "ALL_F32"), "f16": ("F16", "MOSTLY_F16"), "bf16": ("BF16", "MOSTLY_BF16"),
         "q8_0": ("Q8_0", "MOSTLY_Q8_0"), "q4_0": ("Q4_0", "MOSTLY_Q4_0")}  # fmt: skip
_LARGEST_F16 = 65504.0
_STEPS = {"Q8_0": 127, "Q4_0": 8}  # a block's largest value is so many of its scales, which are float16


def write_gguf(checkpoint: Checkpoint, folder: Path, kind: str, name: str | None = None) -> list[str]:
    """Writes `model-{kind}.gguf` into a folder.

    Vectors stay float32, as llama.cpp has them. Matrices get the type of the file by the reference of the package
    `gguf`; those whose rows do not divide into its blocks are written as float16. In q4_0 the matrix that gives the logits,
    which is the embedding where both are tied, is q8_0: see benchmarks/gguf_head.py. Memory holds one tensor at a time.

    Args:
        kind (`str`): `"f32"`, `"f16"`, `"bf16"`, `"q8_0"` or `"q4_0"`.
        name (`str`, *optional*): of the model, defaults to that of the file or folder it came from.

    Returns:
        Lines for the user.

    Raises:
        InputError: for what llama.cpp's Llama or its tokenizers do not have, and for values beyond the type's range.
    """
    if kind not in KINDS:
        raise InputError(f"gguf kind {kind!r} does not exist{did_you_mean(kind, KINDS)}")
    _check_config(checkpoint)
    require("gguf", "gguf", "writing a GGUF file")
    from gguf import GGUFWriter
    from gguf.quants import quant_shape_to_byte_shape

    path = folder / f"model-{kind}.gguf"
    types = _types(checkpoint, kind)
    with contextlib.closing(GGUFWriter(path, "llama")) as writer:
        _add_config(writer, checkpoint.config, kind, name or checkpoint.path.resolve().name)
        lines = _add_tokenizer(writer, checkpoint)
        for name, type_ in types.items():
            shape = checkpoint.tensors[name].shape
            num_bytes = int(np.prod(quant_shape_to_byte_shape(shape, type_)))
            writer.add_tensor_info(NAMES.from_llama(name), shape, np.dtype(np.float32), num_bytes, raw_dtype=type_)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, type_ in types.items():
            writer.write_tensor_data(_values(checkpoint, name, type_))
    other = [NAMES.from_llama(name) for name, type_ in types.items() if type_.name == "F16"]
    if other and kind in ("q8_0", "q4_0"):
        lines.append(
            f"{path.name}: rows that are no multiple of 32 values cannot be {kind}; written as f16: {', '.join(other)}"
        )
    return lines


def head_type(kind: str) -> str:
    """The type of the matrix that gives the logits: llama.cpp's quantizer keeps more of it than 4 bit, too."""
    return "Q8_0" if kind == "q4_0" else KINDS[kind][0]


def _types(checkpoint: Checkpoint, kind: str) -> dict[str, "GGMLQuantizationType"]:
    """The type of each tensor in the file."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    head = OUTPUT if OUTPUT in checkpoint.tensors else EMBEDDING
    types = {}
    for name, tensor in checkpoint.tensors.items():
        wanted = GGMLQuantizationType[head_type(kind) if name == head else KINDS[kind][0]]
        if len(tensor.shape) == 1:
            wanted = GGMLQuantizationType.F32
        elif tensor.shape[-1] % GGML_QUANT_SIZES[wanted][0]:
            wanted = GGMLQuantizationType.F16
        types[name] = wanted
    return types


def _values(checkpoint: Checkpoint, name: str, type_: "GGMLQuantizationType") -> np.ndarray:
    """One tensor as it lies in the file."""
    dtype = DTYPES.get(type_.name, torch.float32)
    weight = checkpoint.load(name, dtype)
    if heads := rotated_heads(checkpoint.config, name):
        weight = to_pairwise(weight, heads)
    if dtype == torch.bfloat16:
        weight = weight.view(torch.int16)  # numpy has no bfloat16
    values = weight.contiguous().numpy()
    if type_.name not in _STEPS:
        return values
    largest = max(float(values.max()), -float(values.min()))
    if largest > _LARGEST_F16 * _STEPS[type_.name]:
        raise InputError(
            f"{checkpoint.tensors[name].source}: has the value {largest:g}, beyond the range of {type_.name}; nothing was "
            "written. Use bf16"
        )
    from gguf.quants import quantize

    return quantize(values, type_)


def _check_config(checkpoint: Checkpoint) -> None:
    rope = checkpoint.config.rope_parameters
    required = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "partial_rotary_factor": 1.0}
    require_values(checkpoint.config.to_dict() | rope, required, checkpoint.path, "GGUF")
    if rope["rope_type"] not in ("default", "linear"):
        raise InputError(
            f"{checkpoint.path}: the rotary scaling is of the type {rope['rope_type']!r}; written to GGUF are none and "
            "'linear'. llama.cpp's own converter knows more"
        )


def _add_config(writer: "GGUFWriter", config: LlamaConfig, kind: str, name: str) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType, RopeScalingType

    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType[KINDS[kind][1]])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    for key, name in SIZES.items():  # head_count_kv too: without it, readers take as many as query heads
        if name != "head_dim":
            writer.add_uint32(key, getattr(config, name))
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: "GGUFWriter", checkpoint: Checkpoint) -> list[str]:
    tokenizer = checkpoint.load_tokenizer()
    if tokenizer is None:
        writer.add_tokenizer_model(NO_TOKENIZER[0])
        return ["the source has no tokenizer, so the file has none either; llama.cpp will take ids alone"]
    try:
        return add_tokenizer(writer, tokenizer, checkpoint.config.vocab_size)
    except InputError as error:
        raise InputError(f"{checkpoint.tokenizer}: {error}") from error
