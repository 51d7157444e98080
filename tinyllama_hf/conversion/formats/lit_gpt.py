"""Reads four layouts of lit-gpt and litgpt, and writes the current one.

All of them store q, k and v in one tensor. Layouts A (TinyLlama's), A' (A with xformers' packed MLP) and B (litgpt
before 2025) order the rows by key/value group: its query heads, its key head, its value head. Layout C (litgpt since
2025) has all of q, then k, then v. The shapes are the same, so only the tensor names tell the layouts apart.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig

from ...errors import InputError, damaged
from ...presets import PRESETS
from ..checkpoint import (
    EMBEDDING,
    OUTPUT,
    Checkpoint,
    LazyTensor,
    head_sizes,
    plain_config,
    positive_number,
    read_sizes,
    require_values,
    rope_parameters,
)
from ..writing import prefetch, write_torch_archive
from .layout import NameMap


CONFIG_FILES = ("model_config.yaml", "lit_config.json")  # litgpt's, lit-gpt's
WEIGHTS_FILE = "lit_model.pth"
_GROUPED, _FUSED, _PACKED_MLP = "attn.attn.weight", "attn.qkv.weight", "mlp.swiglu.w12.weight"
# Without the tensors that combine several of `LlamaForCausalLM`.
NAMES = NameMap(
    "transformer.h.{layer}.{part}",
    {
        "norm_1.weight": "input_layernorm.weight", "norm_2.weight": "post_attention_layernorm.weight",
        "attn.proj.weight": "self_attn.o_proj.weight",
        "mlp.swiglu.w1.weight": "mlp.gate_proj.weight", "mlp.swiglu.w2.weight": "mlp.up_proj.weight",
        "mlp.swiglu.w3.weight": "mlp.down_proj.weight", "mlp.fc_1.weight": "mlp.gate_proj.weight",
        "mlp.fc_2.weight": "mlp.up_proj.weight", "mlp.proj.weight": "mlp.down_proj.weight",
    },
    {"transformer.wte.weight": EMBEDDING, "transformer.ln_f.weight": "model.norm.weight", "lm_head.weight": OUTPUT},
)  # fmt: skip
SIZES = {
    "block_size": "max_position_embeddings", "n_layer": "num_hidden_layers", "n_embd": "hidden_size",
    "n_head": "num_attention_heads", "head_size": "head_dim", "n_query_groups": "num_key_value_heads",
}  # fmt: skip
# lit-gpt's names of fields, and litgpt's.
_RENAMED = {"_mlp_class": "mlp_class_name", "_norm_class": "norm_class_name", "condense_ratio": "rope_condense_ratio"}
# Options of lit-gpt's and litgpt's `Config` that change what a model computes, with the value of a Llama.
_REQUIRED = {
    "rotary_percentage": 1.0, "parallel_residual": False, "bias": False, "attn_bias": False, "lm_head_bias": False,
    "norm_qk": False, "post_attention_norm": False, "post_mlp_norm": False, "scale_embeddings": False, "n_expert": 0,
    "sliding_window_size": None, "attention_logit_softcapping": None, "final_logit_softcapping": None,
    "attention_scores_scalar": None, "rope_interleave": False, "latent_attention": None, "rope_local_base_freq": None,
    "shared_attention_norm": False, "mlp_class_name": "LLaMAMLP", "norm_1": True, "norm_2": True,
}  # fmt: skip


def find_layout(names: Mapping[str, Any]) -> str | None:
    """Returns which of the four layouts has these tensor names, or `None`."""
    parts = {NAMES.layer_and_part(name)[1] for name in names}
    if _FUSED in parts:
        return "C"
    if _GROUPED not in parts:
        return None
    return "A'" if _PACKED_MLP in parts else "A" if any("swiglu" in part for part in parts) else "B"


def config_from_fields(fields: Mapping[str, Any], where: str, rows: int) -> LlamaConfig:
    """Returns the Llama configuration for the fields of `model_config.yaml` or `lit_config.json`.

    Args:
        fields (`Mapping[str, Any]`): contents of the file.
        where (`str`): the file, for messages.
        rows (`int`): rows of the embedding, which lit-gpt pads (`padded_vocab_size`).

    Raises:
        InputError: if the model is not a Llama, or a field is missing or invalid.
    """
    fields = dict(fields)
    for old, new in _RENAMED.items():
        if old in fields:
            fields[new] = fields.pop(old)
    require_values(fields, _REQUIRED, where, "a Llama")
    if fields.get("norm_class_name", "RMSNorm") not in ("RMSNorm", "FusedRMSNorm"):
        raise InputError(f"{where}: norm_class_name is {fields['norm_class_name']!r}; a Llama supports only 'RMSNorm'")
    sizes = read_sizes(fields, SIZES, where)
    return plain_config(
        where,
        **sizes,
        vocab_size=rows,
        intermediate_size=positive_number(fields, "intermediate_size", where, 4 * sizes["hidden_size"]),
        rms_norm_eps=positive_number(fields, "norm_eps", where, 1e-5, float),
        rope_parameters=_rope(fields, where),
    )


def _rope(fields: Mapping[str, Any], where: str) -> dict[str, str | float]:
    theta = positive_number(fields, "rope_base", where, 10000, float)
    rope: dict[str, str | float] = {"rope_type": "default", "rope_theta": theta}
    ratio = positive_number(fields, "rope_condense_ratio", where, 1, float)
    adjustments = fields.get("rope_adjustments")
    if ratio != 1:
        rope |= {"rope_type": "linear", "factor": ratio}
    if adjustments is not None:
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len")
        if not isinstance(adjustments, Mapping) or set(adjustments) != set(names) or ratio != 1:
            raise InputError(f"{where}: rope_adjustments is {adjustments!r}; it must have exactly {', '.join(names)}")
        rope |= {name: positive_number(adjustments, name, where, kind=float) for name in names[:3]}
        original = positive_number(adjustments, "original_max_seq_len", where)
        rope |= {"rope_type": "llama3", "original_max_position_embeddings": original}
    return rope


def config_from_shapes(tensors: Mapping[str, LazyTensor], where: str) -> LlamaConfig:
    """Returns the configuration of a checkpoint without a configuration file, if a preset has its shapes.

    The shapes alone do not determine the heads: 2560 rows of q, k and v can be 40 heads of size 64 or 10 of size 256.

    Raises:
        InputError: if no preset has these shapes.
    """
    parts = [(*NAMES.layer_and_part(name), tensor.shape) for name, tensor in tensors.items()]
    layers = 1 + max(layer for layer, _, _ in parts)
    fused = next(shape for _, part, shape in parts if part in (_GROUPED, _FUSED))
    widths = {shape[-1:] for _, part, shape in parts if NAMES.inside.get(part) == "mlp.down_proj.weight"}
    wanted = (layers, fused, widths)
    for preset in PRESETS.values():
        head_dim = preset["hidden_size"] // preset["num_attention_heads"]
        rows = (preset["num_attention_heads"] + 2 * preset["num_key_value_heads"]) * head_dim
        if wanted == (preset["num_hidden_layers"], (rows, preset["hidden_size"]), {(preset["intermediate_size"],)}):
            return plain_config(where, vocab_size=vocab_rows(tensors, where), **preset)
    reason = f"no {' or '.join(CONFIG_FILES)}, and no preset has {layers} layers with q/k/v {list(fused)}"
    raise InputError(f"{where}: {reason}. Pass --config with such a file or a config.json, for the number of heads")


def vocab_rows(tensors: Mapping[str, LazyTensor], where: str) -> int:
    """Returns the number of rows of the embedding; raises an `InputError` if there are none."""
    name = "transformer.wte.weight"
    if name not in tensors:
        raise damaged(where, f"{name} is missing")
    what = f"the number of rows of {name}"
    return positive_number({what: (*tensors[name].shape, 0)[0]}, what, where)


def to_llama_tensors(tensors: Mapping[str, LazyTensor], config: LlamaConfig) -> dict[str, LazyTensor]:
    """Returns the tensors under Hugging Face's names; unknown names are kept.

    Raises:
        InputError: if the shape of a fused tensor contradicts the configuration, or a tensor is stored twice.
    """
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        layer, part = NAMES.layer_and_part(name)
        if part in (_GROUPED, _FUSED):
            parts = _split_attention(tensor, config, by_group=part == _GROUPED)
            found |= {f"model.layers.{layer}.self_attn.{key}": rows for key, rows in parts.items()}
        elif part == _PACKED_MLP:
            parts = _split_mlp(tensor, config)
            found |= {f"model.layers.{layer}.mlp.{key}": rows for key, rows in parts.items()}
        else:
            found[name] = tensor
    return NAMES.renamed(found)


def _split_attention(fused: LazyTensor, config: LlamaConfig, by_group: bool) -> dict[str, LazyTensor]:
    heads, groups, width = head_sizes(config)
    fused.check_shape(((heads + 2 * groups) * width, config.hidden_size))
    blocks = groups if by_group else 1  # each with q, k and v one after another
    q, k = heads // blocks, groups // blocks
    bounds = {"q_proj.weight": (0, q), "k_proj.weight": (q, q + k), "v_proj.weight": (q + k, q + 2 * k)}
    return {key: _rows(fused, blocks, width, first, last) for key, (first, last) in bounds.items()}


def _split_mlp(packed: LazyTensor, config: LlamaConfig) -> dict[str, LazyTensor]:
    """Splits xformers' `w12`: the rows of `gate_proj`, then those of `up_proj`."""
    inner = config.intermediate_size
    packed.check_shape((2 * inner, config.hidden_size))
    return {"gate_proj.weight": _rows(packed, 1, inner, 0, 1), "up_proj.weight": _rows(packed, 1, inner, 1, 2)}


def _rows(fused: LazyTensor, blocks: int, size: int, first: int, last: int) -> LazyTensor:
    """Returns parts `first` to `last`, of `size` rows each, of each of the equal blocks of rows."""
    shape = ((last - first) * blocks * size, fused.shape[1])
    return fused.map(lambda w: w.view(blocks, -1, size, shape[1])[:, first:last].reshape(shape).clone(), shape)


def write_litgpt(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype | None, name: str) -> list[str]:
    """Writes `lit_model.pth` and `model_config.yaml` for litgpt 0.5.13 (layout C), tensor by tensor.

    Returns:
        Notes for the user.

    Raises:
        InputError: if litgpt does not support the configuration.
    """
    fields = _litgpt_fields(checkpoint.config, name)
    text = yaml.safe_dump(fields, sort_keys=False)
    (folder / CONFIG_FILES[0]).write_text(text, encoding="utf-8")
    notes = []
    if checkpoint.config.tie_word_embeddings:
        notes.append("lm_head.weight is a copy of the embedding, since litgpt has no tied output")
    tensors = _litgpt_tensors(checkpoint, dtype)
    specs = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_torch_archive(folder / WEIGHTS_FILE, specs, prefetch(tensor.read() for tensor in tensors.values()))
    return notes


def _litgpt_fields(config: LlamaConfig, name: str) -> dict[str, Any]:
    rope = rope_parameters(config)
    kind = rope["rope_type"]
    required = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
    require_values(config.to_dict(), required, "--to litgpt", "litgpt")
    if kind not in ("default", "linear", "llama3"):
        raise InputError(f"--to litgpt: rope_type is {kind!r}, but litgpt's Llama has default, linear and llama3 only")
    if (kind == "linear" and rope["factor"] != int(rope["factor"])) or rope["rope_theta"] != int(rope["rope_theta"]):
        raise InputError(f"--to litgpt: rope_parameters is {rope}; litgpt supports only integers")
    fields = {
        "name": name, "hf_config": {"org": "", "name": name},
        **{key: getattr(config, ours) for key, ours in SIZES.items()},
        "vocab_size": config.vocab_size, "padded_vocab_size": config.vocab_size, "rotary_percentage": 1.0,
        "parallel_residual": False, "bias": False, "norm_class_name": "RMSNorm", "norm_eps": config.rms_norm_eps,
        "mlp_class_name": "LLaMAMLP", "intermediate_size": config.intermediate_size,
        "rope_base": int(rope["rope_theta"]), "rope_condense_ratio": int(rope["factor"]) if kind == "linear" else 1,
    }  # fmt: skip
    if kind == "llama3":
        adjustments = {name: rope[name] for name in ("factor", "low_freq_factor", "high_freq_factor")}
        original = {"original_max_seq_len": rope["original_max_position_embeddings"]}
        fields["rope_adjustments"] = adjustments | original
    return fields


def _litgpt_tensors(checkpoint: Checkpoint, dtype: torch.dtype | None) -> dict[str, LazyTensor]:
    """Returns the tensors of layout C in the order of the file."""
    tensors = checkpoint.tensors

    def joined(*names: str) -> LazyTensor:
        parts = [tensors[name] for name in names]
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        # A tensor has one dtype, so mixed parts get the widest.
        kind = dtype or functools.reduce(torch.promote_types, (part.dtype for part in parts))
        source = parts[0].source
        return LazyTensor(shape, kind, lambda: torch.cat([checkpoint.load(name, kind) for name in names]), source)

    found = {
        "lm_head.weight": joined(OUTPUT if OUTPUT in tensors else EMBEDDING),
        "transformer.wte.weight": joined(EMBEDDING),
    }
    for layer in range(checkpoint.config.num_hidden_layers):
        here, there = f"transformer.h.{layer}", f"model.layers.{layer}"
        found[f"{here}.{_FUSED}"] = joined(*(f"{there}.self_attn.{part}_proj.weight" for part in "qkv"))
        found |= {f"{here}.{p}": joined(f"{there}.{name}") for p, name in NAMES.inside.items() if "swiglu" not in p}
    return found | {"transformer.ln_f.weight": joined("model.norm.weight")}
