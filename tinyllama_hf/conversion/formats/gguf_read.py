"""Reads a Llama from a GGUF file: configuration from its metadata, tensors dequantised one at a time when asked for."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig

from ...errors import InputError
from ...gguf.file import PLAIN, GGUFHeader, GGUFTensor, check_readable, read_header, read_values
from ...gguf.vocabulary import NO_TOKENIZER
from ..checkpoint import EMBEDDING, OUTPUT, Checkpoint, LazyTensor, complete, plain_config
from .rotary import to_half_split


# llama.cpp's names of tensors, in a block and outside, and those of `LlamaForCausalLM`.
BLOCK_NAMES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
OUTER_NAMES = {"token_embd.weight": EMBEDDING, "output_norm.weight": "model.norm.weight", "output.weight": OUTPUT}
_BLOCK = re.compile(r"blk\.(\d{1,6})\.(\w+)\.weight")
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}
# Keys under "llama." that are read, or that say nothing of the weights.
_KNOWN = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "vocab_size", "expert_count",
    "rope.scaling.finetuned", "rope.scaling.original_context_length", "expert_used_count",
}  # fmt: skip


def read_gguf(path: Path) -> Checkpoint:
    """Opens a GGUF file of the architecture `llama`, of the types F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q5_K, Q6_K.

    The tensors of the first three keep their dtype, the others become float32.

    Raises:
        InputError: if the file is damaged, of another architecture, or holds what a Llama of transformers has not.
    """
    header = read_header(path)
    fields = _Fields(header)
    config = fields.config()
    tensors: dict[str, LazyTensor] = {}
    for tensor in header.tensors.values():
        check_readable(path, tensor)
        match = _BLOCK.fullmatch(tensor.name)
        name, heads = OUTER_NAMES.get(tensor.name, tensor.name), None
        if match and match[2] in BLOCK_NAMES:
            name = f"model.layers.{int(match[1])}.{BLOCK_NAMES[match[2]]}.weight"
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(match[2])
        read = partial(_read, path, tensor, heads)
        tensors[name] = LazyTensor(
            tensor.shape, _DTYPES.get(tensor.type, torch.float32), read, f"{path}: {tensor.name}"
        )
    model = header.metadata.get("tokenizer.ggml.model")
    beside = path.with_name("tokenizer.model")
    tokenizer = path if model and model not in NO_TOKENIZER else beside if beside.is_file() else None
    checkpoint = Checkpoint(path, "GGUF", config, tensors, tokenizer, notes=fields.notes())
    return complete(checkpoint)


def _read(path: Path, tensor: GGUFTensor, heads: int | None) -> torch.Tensor:
    values = read_values(path, tensor)
    if tensor.type == "BF16":
        weight = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    else:
        weight = torch.from_numpy(values)
    return to_half_split(weight, heads) if heads else weight


class _Fields:
    """The metadata under `llama.`, each value held against its type and against the tensors."""

    def __init__(self, header: GGUFHeader) -> None:
        self.header, self.path = header, header.path
        architecture = header.metadata.get("general.architecture")
        if architecture != "llama":
            raise InputError(f"{self.path}: general.architecture is {architecture!r}; a Llama's is 'llama'")
        if "rope_freqs.weight" in header.tensors:
            raise InputError(f"{self.path}: has rope_freqs.weight, the rotary scaling of Llama 3.1, from which its "
                             "parameters cannot be told; convert the model's own folder")  # fmt: skip
        if self.number("expert_count", 0):
            raise InputError(f"{self.path}: is a mixture of experts (llama.expert_count); a Llama is dense")

    def number(self, key: str, default: Any = None, kind: type = int) -> Any:
        value = self.header.metadata.get(f"llama.{key}", default)
        if type(value) is not kind or not 0 <= value < float("inf") or (value == 0 and default != 0):
            raise InputError(f"{self.path}: llama.{key} is {str(value)[:40]}; it must be one positive number of the type "
                             f"{kind.__name__}. Fetch or make the file again")  # fmt: skip
        # The shortest decimal of the 32-bit number: 1e-05, not 9.99999974e-06.
        return float(str(np.float32(value))) if kind is float else value

    def config(self) -> LlamaConfig:
        hidden, heads = self.number("embedding_length"), self.number("attention.head_count")
        kv_heads = self.number("attention.head_count_kv", heads)
        head_dim = self.number("attention.key_length", hidden // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self.number(key, head_dim) != head_dim:
                raise InputError(f"{self.path}: llama.{key} is {self.number(key)}, a head has {head_dim}; transformers' "
                                 "Llama has one length for both")  # fmt: skip
        inner, layers = self.number("feed_forward_length"), self.number("block_count")
        if heads % kv_heads:
            raise InputError(f"{self.path}: {heads} query heads cannot share {kv_heads} key and value heads; fetch or make "
                             "the file again")  # fmt: skip
        self._check_shapes(hidden, inner, heads * head_dim, kv_heads * head_dim, layers)
        rows = self.header.tensors["token_embd.weight"].shape[0]
        try:
            return plain_config(
                self.header.path,
                vocab_size=rows,
                hidden_size=hidden,
                intermediate_size=inner,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=kv_heads,
                head_dim=head_dim,
                max_position_embeddings=self.number("context_length"),
                rms_norm_eps=self.number("attention.layer_norm_rms_epsilon", kind=float),
                rope_parameters=self._rope(),
                tie_word_embeddings="output.weight" not in self.header.tensors,
                bos_token_id=self._token("bos", 1, rows),
                eos_token_id=self._token("eos", 2, rows),
            )
        except StrictDataclassError as error:
            raise InputError(f"{self.path}: the metadata are of no Llama of transformers: {error}") from error

    def notes(self) -> list[str]:
        quantised = sorted({tensor.type for tensor in self.header.tensors.values()} - PLAIN.keys())
        unknown = [
            k for k in self.header.metadata if k.startswith("llama.") and k.removeprefix("llama.") not in _KNOWN
        ]
        notes = [f"dequantised to float32 from {', '.join(quantised)}"] if quantised else []
        return notes + [f"left out: {key}, which is not known here" for key in unknown]

    def _token(self, name: str, default: int, rows: int) -> int | None:
        metadata = self.header.metadata
        default = default if metadata.get("tokenizer.ggml.model") == "llama" else None
        i = metadata.get(f"tokenizer.ggml.{name}_token_id", default)
        return i if type(i) is int and i < rows else None  # a wrong one is refused where the tokenizer is read

    def _rope(self) -> dict[str, Any]:
        rope = {"rope_type": "default", "rope_theta": self.number("rope.freq_base", 10000.0, float)}
        scaling = self.header.metadata.get("llama.rope.scaling.type", "none")
        if scaling not in ("none", "linear") or "llama.rope.scale_linear" in self.header.metadata:
            raise InputError(f"{self.path}: llama.rope.scaling.type is {scaling!r} (or llama.rope.scale_linear is set); "
                             "none and linear are read. Convert the model's own folder")  # fmt: skip
        if scaling == "linear":
            rope |= {"rope_type": "linear", "factor": self.number("rope.scaling.factor", kind=float)}
        return rope

    def _check_shapes(self, hidden: int, inner: int, query: int, key: int, layers: int) -> None:
        """Holds the sizes against the tensors, before a model of damaged sizes is built to compare all of them."""
        blocks = {int(match[1]) for name in self.header.tensors if (match := _BLOCK.fullmatch(name))}
        if blocks != set(range(len(blocks))) or len(blocks) != layers:
            raise InputError(f"{self.path}: llama.block_count is {layers}, tensors are there for {len(blocks)} blocks; "
                             "fetch or make the file again")  # fmt: skip
        expected = {"blk.0.attn_q.weight": (query, hidden), "blk.0.attn_k.weight": (key, hidden),
                    "blk.0.ffn_gate.weight": (inner, hidden), "token_embd.weight": (None, hidden)}  # fmt: skip
        for name, shape in expected.items():
            found = self.header.tensors[name].shape if name in self.header.tensors else None
            if found is None or len(found) != 2 or any(b not in (a, None) for a, b in zip(found, shape, strict=True)):
                raise InputError(f"{self.path}: {name} has the shape {list(found) if found else 'of no tensor'}, the "
                                 f"metadata say {[n or 'any' for n in shape]}; fetch or make the file again")  # fmt: skip
