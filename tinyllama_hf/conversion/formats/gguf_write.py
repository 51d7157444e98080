"""Writes a Llama to a GGUF file: metadata and tokenizer, then one tensor after another."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import LlamaConfig

from ...errors import InputError, require
from ...gguf.vocabulary import NO_TOKENIZER
from ..checkpoint import EMBEDDING, OUTPUT, Checkpoint, head_sizes, require_values, rope_parameters
from .gguf_read import DTYPES, NAMES, SIZES
from .gguf_write_tokenizer import add_tokenizer
from .layout import rotated_heads, to_pairwise


if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

_LARGEST_F16 = 65504.0
_STEPS = {"Q8_0": 127, "Q4_0": 8}  # largest value of a block in units of its scale, which is float16


def write_gguf(checkpoint: Checkpoint, folder: Path, kind: str, name: str | None = None) -> list[str]:
    """Writes `model-{kind}.gguf` into a folder.

    Matrices are quantized by the reference implementation of the package `gguf`, or written as float16 if their rows
    do not divide into its blocks. In q4_0 the output matrix is q8_0, which is the embedding of a tied model; see
    benchmarks/gguf_head.py. Vectors are float32, as in llama.cpp. Only one tensor is in memory at a time.

    Args:
        kind (`str`): `"f32"`, `"f16"`, `"bf16"`, `"q8_0"` or `"q4_0"`.
        name (`str`, *optional*): name of the model, by default that of the source file or folder.

    Returns:
        Notes for the user.

    Raises:
        InputError: if llama.cpp does not support the configuration or the tokenizer, or a value exceeds the type's
            range.
    """
    _check_config(checkpoint)
    require("gguf", "gguf", "writing a GGUF file")
    from gguf import GGUFWriter
    from gguf.quants import quant_shape_to_byte_shape

    path = folder / f"model-{kind}.gguf"
    types = _types(checkpoint, kind)
    with contextlib.closing(GGUFWriter(path, "llama")) as writer:
        _add_config(writer, checkpoint.config, kind, name or checkpoint.path.resolve().name)
        tokenizer = checkpoint.load_tokenizer()
        if tokenizer is None:
            writer.add_tokenizer_model(NO_TOKENIZER[0])
            lines = ["the source has no tokenizer, so none was written; llama.cpp can only process ids"]
        else:
            try:
                lines = add_tokenizer(writer, tokenizer, checkpoint.config.vocab_size)
            except InputError as error:
                raise InputError(f"{checkpoint.tokenizer}: {error}") from error
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
        reason = f"{kind} requires a multiple of 32 values per row"
        lines.append(f"{path.name}: written as f16, since {reason}: {', '.join(other)}")
    return lines


def _types(checkpoint: Checkpoint, kind: str) -> dict[str, "GGMLQuantizationType"]:
    """Returns the type of each tensor in the file."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    head = OUTPUT if OUTPUT in checkpoint.tensors else EMBEDDING
    types = {}
    for name, tensor in checkpoint.tensors.items():
        # llama.cpp's quantizer also keeps more than 4 bit for the output matrix.
        wanted = GGMLQuantizationType["Q8_0" if kind == "q4_0" and name == head else kind.upper()]
        if len(tensor.shape) == 1:
            wanted = GGMLQuantizationType.F32
        elif tensor.shape[-1] % GGML_QUANT_SIZES[wanted][0]:
            wanted = GGMLQuantizationType.F16
        types[name] = wanted
    return types


def _values(checkpoint: Checkpoint, name: str, type_: "GGMLQuantizationType") -> np.ndarray:
    """Returns a tensor as it is stored in the file."""
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
        source = checkpoint.tensors[name].source
        raise InputError(f"{source}: value {largest:g} exceeds the range of {type_.name}. Use bf16")
    from gguf.quants import quantize

    return quantize(values, type_)


def _check_config(checkpoint: Checkpoint) -> None:
    rope = rope_parameters(checkpoint.config)
    required = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "partial_rotary_factor": 1.0}
    require_values(checkpoint.config.to_dict() | rope, required, checkpoint.path, "GGUF")
    if rope["rope_type"] not in ("default", "linear"):
        found = f"rope_type is {rope['rope_type']!r}; supported are 'default' and 'linear'"
        raise InputError(f"{checkpoint.path}: {found}. llama.cpp's own converter supports more")


def _add_config(writer: "GGUFWriter", config: LlamaConfig, kind: str, name: str) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType, RopeScalingType

    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    for key, name in SIZES.items():  # always with head_count_kv, which readers otherwise set to head_count
        if name != "head_dim":
            writer.add_uint32(key, getattr(config, name))
    heads, _, width = head_sizes(config)
    if width * heads != config.hidden_size:
        writer.add_key_length(width)
        writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    rope = rope_parameters(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_vocab_size(config.vocab_size)
