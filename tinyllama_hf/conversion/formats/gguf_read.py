"""Reads a Llama from a GGUF file: the configuration from its metadata, and lazily dequantized tensors."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig

from ...errors import InputError, damaged
from ...gguf.file import PLAIN, GGUFHeader, GGUFTensor, check_readable, read_header, read_values
from ...gguf.vocabulary import NO_TOKENIZER
from ..checkpoint import EMBEDDING, OUTPUT, Checkpoint, LazyTensor, plain_config, positive_number, read_sizes, validate
from .layout import NameMap


NAMES = NameMap(
    "blk.{layer}.{part}.weight",
    {
        "attn_norm": "input_layernorm.weight", "attn_q": "self_attn.q_proj.weight",
        "attn_k": "self_attn.k_proj.weight", "attn_v": "self_attn.v_proj.weight",
        "attn_output": "self_attn.o_proj.weight", "ffn_norm": "post_attention_layernorm.weight",
        "ffn_gate": "mlp.gate_proj.weight", "ffn_up": "mlp.up_proj.weight", "ffn_down": "mlp.down_proj.weight",
    },
    {"token_embd.weight": EMBEDDING, "output_norm.weight": "model.norm.weight", "output.weight": OUTPUT},
)  # fmt: skip
SIZES = {
    "llama.context_length": "max_position_embeddings", "llama.embedding_length": "hidden_size",
    "llama.block_count": "num_hidden_layers", "llama.feed_forward_length": "intermediate_size",
    "llama.attention.head_count": "num_attention_heads", "llama.attention.head_count_kv": "num_key_value_heads",
    "llama.attention.key_length": "head_dim",
}  # fmt: skip
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}
# Other keys that are read or do not concern the weights.
_KNOWN = {f"llama.{key}" for key in (
    "attention.value_length", "attention.layer_norm_rms_epsilon", "rope.dimension_count", "rope.freq_base",
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.finetuned", "rope.scaling.original_context_length",
    "vocab_size", "expert_count", "expert_used_count",
)}  # fmt: skip


def read_gguf(path: Path) -> Checkpoint:
    """Opens a GGUF file of architecture `llama` with tensors in F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q5_K or Q6_K.

    F32, F16 and BF16 tensors keep their dtype; quantized ones become float32.

    Raises:
        InputError: if the file is damaged, has another architecture, or uses features that transformers' Llama lacks.
    """
    header = read_header(path)
    config = _config(header)
    tensors: dict[str, LazyTensor] = {}
    for tensor in header.tensors.values():
        check_readable(path, tensor)
        source, dtype = f"{path}: {tensor.name}", DTYPES.get(tensor.type, torch.float32)
        tensors[tensor.name] = LazyTensor(tensor.shape, dtype, partial(_read, path, tensor), source)
    has_tokenizer = header.metadata.get("tokenizer.ggml.model") not in (None, *NO_TOKENIZER)
    model = path.with_name("tokenizer.model")
    tokenizer = path if has_tokenizer else model if model.is_file() else None
    tensors = NAMES.from_pairwise(tensors, config)
    return validate(Checkpoint(path, "GGUF", config, tensors, tokenizer, notes=_notes(header)))


def _read(path: Path, tensor: GGUFTensor) -> torch.Tensor:
    weight = torch.from_numpy(read_values(path, tensor))
    return weight.view(torch.bfloat16) if tensor.type == "BF16" else weight


def _config(header: GGUFHeader) -> LlamaConfig:
    metadata, path = header.metadata, header.path
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise InputError(f"{path}: general.architecture is {architecture!r}; it must be 'llama'")
    if "rope_freqs.weight" in header.tensors:
        found = "rope_freqs.weight, the scaled rotary embedding of Llama 3.1, does not contain its parameters"
        raise InputError(f"{path}: {found}. Convert the model's own folder")
    if experts := metadata.get("llama.expert_count"):
        raise InputError(f"{path}: llama.expert_count is {experts!r:.80}; mixtures of experts are not supported")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise damaged(path, "token_embd.weight is missing")
    rows = embedding.shape[0]
    config = plain_config(
        path,
        **read_sizes(metadata, SIZES, path),
        vocab_size=rows,
        rms_norm_eps=_real(header, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters=_rope(header),
        tie_word_embeddings="output.weight" not in header.tensors,
        bos_token_id=_token(header, "bos", 1, rows),
        eos_token_id=_token(header, "eos", 2, rows),
    )
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if (size := metadata.get(key, config.head_dim)) != config.head_dim:
            raise InputError(f"{path}: {key} is {size!r:.80}; it must be the head size {config.head_dim}")
    return config


def _real(header: GGUFHeader, key: str, default: float | None = None) -> float:
    """Returns the shortest decimal of a 32-bit float: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(positive_number(header.metadata, key, header.path, default, float))))


def _rope(header: GGUFHeader) -> dict[str, str | float]:
    theta = _real(header, "llama.rope.freq_base", 10000.0)
    rope: dict[str, str | float] = {"rope_type": "default", "rope_theta": theta}
    scaling = header.metadata.get("llama.rope.scaling.type", "none")
    if scaling not in ("none", "linear") or "llama.rope.scale_linear" in header.metadata:
        rule = "supported are none and linear, without llama.rope.scale_linear"
        raise InputError(f"{header.path}: llama.rope.scaling.type is {scaling!r}; {rule}")
    if scaling == "linear":
        rope |= {"rope_type": "linear", "factor": _real(header, "llama.rope.scaling.factor")}
    return rope


def _token(header: GGUFHeader, name: str, default: int, rows: int) -> int | None:
    is_llama = header.metadata.get("tokenizer.ggml.model") == "llama"
    i = header.metadata.get(f"tokenizer.ggml.{name}_token_id", default if is_llama else None)
    return i if type(i) is int and i < rows else None  # loading the tokenizer refuses an invalid one


def _notes(header: GGUFHeader) -> list[str]:
    quantized = sorted({tensor.type for tensor in header.tensors.values()} - PLAIN.keys())
    unknown = [key for key in header.metadata if key.startswith("llama.") and key not in _KNOWN and key not in SIZES]
    notes = [f"dequantized to float32 from {', '.join(quantized)}"] if quantized else []
    return notes + [f"ignored: {key}, an unknown key" for key in unknown]
