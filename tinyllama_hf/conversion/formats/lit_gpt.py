"""lit-gpt's and litgpt's layouts: three that are read, and the one of today that is written.

In all of them q, k and v lie in one tensor. Layouts A (TinyLlama's), A' (the same with xformers' packing) and B (litgpt
before 2025) keep the rows by key/value group: the query heads of a group, its key head, its value head. Layout C (litgpt
now) keeps all of q, then k, then v. The shapes are equal, so that only the names of the keys tell them apart.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig, PreTrainedTokenizerBase

from ...configuration_tinyllama import PRESETS
from ...errors import InputError
from ...provenance import read_json, write_json
from ..checkpoint import EMBEDDING, OUTPUT, Checkpoint, LazyTensor, plain_config, positive_number
from ..writing import ahead, write_torch_archive


CONFIG_FILES = ("model_config.yaml", "lit_config.json")  # litgpt's, lit-gpt's
WEIGHTS_FILE = "lit_model.pth"
OUTER = {"transformer.wte.weight": EMBEDDING, "transformer.ln_f.weight": "model.norm.weight", "lm_head.weight": OUTPUT}
_BLOCK = re.compile(r"transformer\.h\.(0|[1-9][0-9]{0,4})\.(.+)")
_FUSED = ("attn.attn.weight", "attn.qkv.weight")
_COMMON = {
    "norm_1.weight": "input_layernorm.weight",
    "norm_2.weight": "post_attention_layernorm.weight",
    "attn.proj.weight": "self_attn.o_proj.weight",
}
_MLP = {
    "A": {"mlp.swiglu.w1.weight": "gate", "mlp.swiglu.w2.weight": "up", "mlp.swiglu.w3.weight": "down"},
    "A'": {"mlp.swiglu.w3.weight": "down"},
    "B": {"mlp.fc_1.weight": "gate", "mlp.fc_2.weight": "up", "mlp.proj.weight": "down"},
    "C": {"mlp.fc_1.weight": "gate", "mlp.fc_2.weight": "up", "mlp.proj.weight": "down"},
}
_PACKED_MLP = "mlp.swiglu.w12.weight"
# Options of lit-gpt's and litgpt's `Config` that change what a model computes, with the only value that Llama has.
_REQUIRED = {
    "rotary_percentage": 1.0, "parallel_residual": False, "bias": False, "attn_bias": False, "lm_head_bias": False,
    "norm_qk": False, "post_attention_norm": False, "post_mlp_norm": False, "scale_embeddings": False, "n_expert": 0,
    "sliding_window_size": None, "attention_logit_softcapping": None, "final_logit_softcapping": None,
    "attention_scores_scalar": None, "rope_interleave": False, "latent_attention": None, "rope_local_base_freq": None,
    "shared_attention_norm": False, "mlp_class_name": "LLaMAMLP", "norm_1": True, "norm_2": True,
}  # fmt: skip


def layout(names: Mapping[str, Any]) -> str | None:
    """Which of the four layouts the keys are of; `None` if of none."""
    inside = {match[2] for name in names if (match := _BLOCK.fullmatch(name))}
    if "attn.qkv.weight" in inside:
        return "C"
    if "attn.attn.weight" not in inside:
        return None
    return "A'" if _PACKED_MLP in inside else "A" if any("swiglu" in name for name in inside) else "B"


def config_from_fields(fields: Mapping[str, Any], where: str, vocab_rows: int) -> LlamaConfig:
    """The Llama configuration of a `model_config.yaml` or `lit_config.json`.

    The vocabulary is what the embedding has rows for: lit-gpt pads it (`padded_vocab_size`).

    Raises:
        InputError: if the model is no Llama, or a field is missing or of no use.
    """
    fields = dict(fields)
    for old, new in (("_mlp_class", "mlp_class_name"), ("_norm_class", "norm_class_name"),
                     ("condense_ratio", "rope_condense_ratio")):  # fmt: skip
        if old in fields:
            fields[new] = fields.pop(old)
    for name, value in _REQUIRED.items():
        if fields.get(name, value) != value:
            raise InputError(
                f"{where}: {name} is {fields[name]!r}, but a Llama has {value!r}; only Llamas are converted"
            )
    if fields.get("norm_class_name", "RMSNorm") not in ("RMSNorm", "FusedRMSNorm"):
        raise InputError(f"{where}: norm_class_name is {fields['norm_class_name']!r}, but a Llama has RMSNorm")

    def number(name: str, default: Any = None, kind: type = int) -> Any:
        value = fields.get(name)
        return positive_number(default if value is None else value, name, where, kind)

    heads, hidden = number("n_head"), number("n_embd")
    return plain_config(
        where, vocab_size=vocab_rows, hidden_size=hidden, num_hidden_layers=number("n_layer"), num_attention_heads=heads,
        num_key_value_heads=number("n_query_groups", heads), head_dim=number("head_size", hidden // heads or 1),
        intermediate_size=number("intermediate_size", 4 * hidden), max_position_embeddings=number("block_size"),
        rms_norm_eps=number("norm_eps", 1e-5, float), rope_parameters=_rope(fields, number, where),
    )  # fmt: skip


def _rope(fields: Mapping[str, Any], number: Any, where: str) -> dict[str, Any]:
    rope = {"rope_theta": number("rope_base", 10000, float), "rope_type": "default"}
    ratio, adjustments = number("rope_condense_ratio", 1, float), fields.get("rope_adjustments")
    if ratio != 1:
        rope |= {"rope_type": "linear", "factor": ratio}
    if adjustments is not None:
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len")
        if not isinstance(adjustments, Mapping) or set(adjustments) != set(names) or ratio != 1:
            raise InputError(f"{where}: rope_adjustments is {adjustments!r}; known are exactly {', '.join(names)}")
        original = positive_number(adjustments["original_max_seq_len"], "original_max_seq_len", where)
        rope |= {name: positive_number(adjustments[name], name, where, float) for name in names[:3]}
        rope |= {"rope_type": "llama3", "original_max_position_embeddings": original}
    return rope


def config_from_shapes(tensors: Mapping[str, LazyTensor], where: str) -> LlamaConfig:
    """The configuration of a checkpoint that brings none, if its shapes are those of a preset.

    The heads cannot be read off fused rows: 2560 of them are 32 heads of 64 with 4 groups, or 8 of 256 with 1.

    Raises:
        InputError: if no preset has these shapes.
    """
    layers = 1 + max(int(match[1]) for name in tensors if (match := _BLOCK.fullmatch(name)))
    fused = next(tensor for name, tensor in tensors.items() if name.endswith(_FUSED))
    widths = {
        tensor.shape[-1:] for name, tensor in tensors.items() if name.endswith(("swiglu.w3.weight", "mlp.proj.weight"))
    }
    for preset in PRESETS.values():
        head_dim = preset["hidden_size"] // preset["num_attention_heads"]
        rows = (preset["num_attention_heads"] + 2 * preset["num_key_value_heads"]) * head_dim
        found = (layers, fused.shape, widths)
        if found == (preset["num_hidden_layers"], (rows, preset["hidden_size"]), {(preset["intermediate_size"],)}):
            return plain_config(where, vocab_size=_vocab_rows(tensors, where), **preset)
    raise InputError(
        f"{where}: brings no {' or '.join(CONFIG_FILES)}, and its shapes ({layers} layers, q/k/v {list(fused.shape)}) are those "
        "of no preset: the number of heads cannot be told. Pass --config with one of these files, or a config.json"
    )  # fmt: skip


def _vocab_rows(tensors: Mapping[str, LazyTensor], where: str) -> int:
    name = "transformer.wte.weight"
    if name not in tensors:
        raise InputError(f"{where}: {name} is missing; fetch or make it again")
    return positive_number((*tensors[name].shape, 0)[0], f"the number of rows of {name}", where)


def find_config(fields: Mapping[str, Any] | None, tensors: Mapping[str, LazyTensor], where: str) -> LlamaConfig:
    """The configuration from a file's fields, else from the shapes; errors as of the two."""
    if fields is None:
        return config_from_shapes(tensors, where)
    return config_from_fields(fields, where, _vocab_rows(tensors, where))


def to_hugging_face(tensors: Mapping[str, LazyTensor], config: LlamaConfig, kind: str) -> dict[str, LazyTensor]:
    """The tensors of a layout under Hugging Face's names; keys of no layout keep theirs.

    Raises:
        InputError: if the rows of a fused tensor contradict the configuration.
    """
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        match = _BLOCK.fullmatch(name)
        inside = match[2] if match else ""
        prefix = f"model.layers.{int(match[1])}" if match else ""
        if inside in _FUSED:
            found |= _split_attention(tensor, config, f"{prefix}.self_attn", by_group=kind != "C")
        elif inside == _PACKED_MLP:
            found |= _split_mlp(tensor, config, f"{prefix}.mlp")
        elif inside in _COMMON:
            found[f"{prefix}.{_COMMON[inside]}"] = tensor
        elif inside in _MLP[kind]:
            found[f"{prefix}.mlp.{_MLP[kind][inside]}_proj.weight"] = tensor
        else:
            found[OUTER.get(name, name)] = tensor
    return found


def _split_attention(fused: LazyTensor, config: LlamaConfig, prefix: str, by_group: bool) -> dict[str, LazyTensor]:
    heads, groups, width, hidden = (
        config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size,
    )  # fmt: skip
    queries = heads // groups
    if fused.shape != ((heads + 2 * groups) * width, hidden):
        raise InputError(
            f"{fused.source}: has the shape {list(fused.shape)}, but {heads} heads and {groups} key/value groups of width {width} "
            f"make [{(heads + 2 * groups) * width}, {hidden}]; the configuration is of another model"
        )  # fmt: skip

    def rows(first: int, last: int) -> LazyTensor:
        """Heads `first` to `last` of each group, or of the whole."""

        def read() -> torch.Tensor:
            weight = fused.read().view(groups if by_group else 1, -1, width, hidden)
            return weight[:, first:last].reshape(-1, hidden).clone()

        number = (last - first) * (groups if by_group else 1)
        return LazyTensor((number * width, hidden), fused.dtype, read, fused.source)

    q, k = (queries, 1) if by_group else (heads, groups)
    parts = {"q_proj": rows(0, q), "k_proj": rows(q, q + k), "v_proj": rows(q + k, q + 2 * k)}
    return {f"{prefix}.{name}.weight": part for name, part in parts.items()}


def _split_mlp(packed: LazyTensor, config: LlamaConfig, prefix: str) -> dict[str, LazyTensor]:
    """xformers' `w12`: the rows of the gate, then those of the other product."""
    inner = config.intermediate_size
    if packed.shape != (2 * inner, config.hidden_size):
        raise InputError(f"{packed.source}: has the shape {list(packed.shape)}, but the configuration makes "
                         f"[{2 * inner}, {config.hidden_size}]")  # fmt: skip

    def part(first: int) -> LazyTensor:
        return LazyTensor((inner, packed.shape[1]), packed.dtype, lambda: packed.read()[first : first + inner].clone(),
                          packed.source)  # fmt: skip

    return {f"{prefix}.gate_proj.weight": part(0), f"{prefix}.up_proj.weight": part(inner)}


def write_litgpt(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype | None, name: str) -> list[str]:
    """Writes `lit_model.pth` and `model_config.yaml` as litgpt 0.5.13 reads them (layout C), tensor by tensor.

    Returns:
        Lines for the user.

    Raises:
        InputError: if litgpt's Llama cannot compute what the configuration says.
    """
    fields = _litgpt_fields(checkpoint.config, name)
    text = yaml.safe_dump(fields, sort_keys=False)
    (folder / CONFIG_FILES[0]).write_text(text, encoding="utf-8")
    notes = []
    if checkpoint.config.tie_word_embeddings:
        notes.append(
            "litgpt has no tied output: lm_head.weight is a copy of the embedding, and training would part them"
        )
    tensors = list(_litgpt_tensors(checkpoint, dtype))
    specs = {key: (kind, shape) for key, kind, shape, _ in tensors}
    write_torch_archive(folder / WEIGHTS_FILE, specs, ahead(load() for *_, load in tensors))
    return notes


def write_litgpt_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the tokenizer with `add_bos_token`: litgpt takes the begin-of-sequence off where this key is missing."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    write_json(file, read_json(file) | {"add_bos_token": begins})


def _litgpt_fields(config: LlamaConfig, name: str) -> dict[str, Any]:
    refused = {
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "hidden_act": config.hidden_act != "silu",
    }
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise InputError(
            f"rope_type {kind!r}: litgpt's Llama has default, linear and llama3 only; it cannot be written"
        )
    if (kind == "linear" and rope["factor"] != int(rope["factor"])) or rope["rope_theta"] != int(rope["rope_theta"]):
        raise InputError(
            f"rope_parameters {rope}: litgpt keeps base and condense ratio as whole numbers; it cannot be written"
        )
    if wrong := [key for key, is_wrong in refused.items() if is_wrong]:
        raise InputError(f"{wrong[0]}={getattr(config, wrong[0])!r}: litgpt's Llama has none; it cannot be written")
    fields = {
        "name": name, "hf_config": {"org": "", "name": name}, "block_size": config.max_position_embeddings,
        "n_layer": config.num_hidden_layers, "n_embd": config.hidden_size, "vocab_size": config.vocab_size,
        "padded_vocab_size": config.vocab_size, "n_head": config.num_attention_heads, "head_size": config.head_dim,
        "n_query_groups": config.num_key_value_heads, "rotary_percentage": 1.0, "parallel_residual": False, "bias": False,
        "norm_class_name": "RMSNorm", "norm_eps": config.rms_norm_eps, "mlp_class_name": "LLaMAMLP",
        "intermediate_size": config.intermediate_size, "rope_base": int(rope["rope_theta"]),
        "rope_condense_ratio": int(rope["factor"]) if kind == "linear" else 1,
    }  # fmt: skip
    if kind == "llama3":
        original = rope["original_max_position_embeddings"]
        fields["rope_adjustments"] = {name: rope[name] for name in ("factor", "low_freq_factor", "high_freq_factor")}
        fields["rope_adjustments"]["original_max_seq_len"] = original
    return fields


def _litgpt_tensors(
    checkpoint: Checkpoint, dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], Callable[[], torch.Tensor]]]:
    """Key, dtype, shape and reader of each tensor of layout C."""
    tensors = checkpoint.tensors

    def one(key: str, *names: str) -> tuple[str, torch.dtype, tuple[int, ...], Callable[[], torch.Tensor]]:
        parts = [tensors[name] for name in names]
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        # Parts of several dtypes do not fit into one tensor: the widest holds them all.
        kind = dtype or functools.reduce(torch.promote_types, (part.dtype for part in parts))
        return key, kind, shape, lambda: torch.cat([checkpoint.load(name, kind) for name in names])

    yield one("lm_head.weight", OUTPUT if OUTPUT in tensors else EMBEDDING)
    yield one("transformer.wte.weight", EMBEDDING)
    inside = _COMMON | {key: f"mlp.{part}_proj.weight" for key, part in _MLP["C"].items()}
    for layer in range(checkpoint.config.num_hidden_layers):
        here, there = f"transformer.h.{layer}", f"model.layers.{layer}"
        yield one(f"{here}.attn.qkv.weight", *(f"{there}.self_attn.{part}_proj.weight" for part in "qkv"))
        for key, name in inside.items():
            yield one(f"{here}.{key}", f"{there}.{name}")
    yield one("transformer.ln_f.weight", "model.norm.weight")
