"""Checkpoints in other programs' layouts, made from a Hugging Face state dict row by row, as in their sources."""

import io
import json
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig


Weights = Mapping[str, torch.Tensor]


def lit_gpt(weights: Weights, config: LlamaConfig, kind: str) -> dict[str, torch.Tensor]:
    """lit-gpt's layouts A, A' and B, and litgpt's C."""
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    found = {
        "lm_head.weight": weights.get("lm_head.weight", weights["model.embed_tokens.weight"]),
        "transformer.wte.weight": weights["model.embed_tokens.weight"],
    }
    for i in range(config.num_hidden_layers):
        here, there = f"transformer.h.{i}", f"model.layers.{i}"
        q, k, v = (weights[f"{there}.self_attn.{part}_proj.weight"] for part in "qkv")
        gate, up, down = (weights[f"{there}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        if kind == "C":
            found[f"{here}.attn.qkv.weight"] = torch.cat([q, k, v])
        else:
            rows = []
            per_group = heads // groups
            for group in range(groups):
                for head in range(group * per_group, (group + 1) * per_group):
                    rows.append(q[head * width : (head + 1) * width])
                rows += [x[group * width : (group + 1) * width] for x in (k, v)]
            found[f"{here}.attn.attn.weight"] = torch.cat(rows)
        found[f"{here}.attn.proj.weight"] = weights[f"{there}.self_attn.o_proj.weight"]
        found[f"{here}.norm_1.weight"] = weights[f"{there}.input_layernorm.weight"]
        found[f"{here}.norm_2.weight"] = weights[f"{there}.post_attention_layernorm.weight"]
        mlp = {
            "A": {"swiglu.w1": gate, "swiglu.w2": up, "swiglu.w3": down},
            "A'": {"swiglu.w12": torch.cat([gate, up]), "swiglu.w3": down},
        }.get(kind, {"fc_1": gate, "fc_2": up, "proj": down})
        found |= {f"{here}.mlp.{name}.weight": tensor for name, tensor in mlp.items()}
    found["transformer.ln_f.weight"] = weights["model.norm.weight"]
    return found


def lit_gpt_fields(config: LlamaConfig) -> dict[str, Any]:
    """`lit_config.json` as lit-gpt wrote it."""
    return {
        "name": "a-llama",
        "block_size": config.max_position_embeddings,
        "vocab_size": config.vocab_size - 3,
        "padded_vocab_size": config.vocab_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_embd": config.hidden_size,
        "rotary_percentage": 1.0,
        "parallel_residual": False,
        "bias": False,
        "n_query_groups": config.num_key_value_heads,
        "shared_attention_norm": False,
        "_norm_class": "FusedRMSNorm",
        "norm_eps": config.rms_norm_eps,
        "_mlp_class": "LLaMAMLP",
        "intermediate_size": config.intermediate_size,
        "condense_ratio": 1,
    }


def pairwise(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k in Meta's order: row 2i of a head is row i here, and row 2i + 1 is row i + half."""
    width = weight.shape[0] // heads
    order = [
        head * width + i + half * width // 2 for head in range(heads) for i in range(width // 2) for half in (0, 1)
    ]
    return weight[order]


def meta(
    weights: Weights, config: LlamaConfig, shards: int, rows_of_embedding: bool = False
) -> list[dict[str, torch.Tensor]]:
    """Meta's tensors, split into model-parallel shards like by its `ParallelEmbedding` and parallel linear layers."""
    found: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]

    def put(name: str, tensor: torch.Tensor, dim: int | None) -> None:
        parts = [tensor] * shards if dim is None else tensor.chunk(shards, dim)
        for shard, part in zip(found, parts, strict=True):
            shard[name] = part.clone()

    put("tok_embeddings.weight", weights["model.embed_tokens.weight"], 0 if rows_of_embedding else 1)
    for i in range(config.num_hidden_layers):
        here, there = f"layers.{i}", f"model.layers.{i}"
        q, k, v, o = (weights[f"{there}.self_attn.{part}_proj.weight"] for part in "qkvo")
        put(f"{here}.attention.wq.weight", pairwise(q, config.num_attention_heads), 0)
        put(f"{here}.attention.wk.weight", pairwise(k, config.num_key_value_heads), 0)
        put(f"{here}.attention.wv.weight", v, 0)
        put(f"{here}.attention.wo.weight", o, 1)
        for name, part, dim in (("w1", "gate", 0), ("w2", "down", 1), ("w3", "up", 0)):
            put(f"{here}.feed_forward.{name}.weight", weights[f"{there}.mlp.{part}_proj.weight"], dim)
        put(f"{here}.attention_norm.weight", weights[f"{there}.input_layernorm.weight"], None)
        put(f"{here}.ffn_norm.weight", weights[f"{there}.post_attention_layernorm.weight"], None)
    put("norm.weight", weights["model.norm.weight"], None)
    put("output.weight", weights["lm_head.weight"], 0)
    put("rope.freqs", torch.arange(config.head_dim // 2).float(), None)
    return found


def write_meta(
    folder: Path, weights: Weights, config: LlamaConfig, shards: int, rows_of_embedding: bool = False
) -> Path:
    folder.mkdir()
    for i, shard in enumerate(meta(weights, config, shards, rows_of_embedding)):
        torch.save(shard, folder / f"consolidated.{i:02}.pth")
    params = {"dim": config.hidden_size, "n_layers": config.num_hidden_layers, "n_heads": config.num_attention_heads,
              "n_kv_heads": config.num_key_value_heads, "norm_eps": config.rms_norm_eps, "vocab_size": -1,
              "multiple_of": 256}  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def write_llama2c(path: Path, weights: Weights, config: LlamaConfig) -> Path:
    """llama2.c's first format, as its `export.py` writes it."""
    tied = "lm_head.weight" not in weights
    header = struct.pack(
        "<7i", config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads,
        config.num_key_value_heads, config.vocab_size if tied else -config.vocab_size, config.max_position_embeddings,
    )  # fmt: skip

    def of_layers(name: str) -> list[torch.Tensor]:
        return [weights[f"model.layers.{i}.{name}.weight"] for i in range(config.num_hidden_layers)]

    tensors = [
        weights["model.embed_tokens.weight"],
        *of_layers("input_layernorm"),
        *(pairwise(w, config.num_attention_heads) for w in of_layers("self_attn.q_proj")),
        *(pairwise(w, config.num_key_value_heads) for w in of_layers("self_attn.k_proj")),
        *of_layers("self_attn.v_proj"),
        *of_layers("self_attn.o_proj"),
        *of_layers("post_attention_layernorm"),
        *of_layers("mlp.gate_proj"),
        *of_layers("mlp.down_proj"),
        *of_layers("mlp.up_proj"),
        weights["model.norm.weight"],
        torch.zeros(2, config.max_position_embeddings, config.head_dim // 2),
        *([] if tied else [weights["lm_head.weight"]]),
    ]
    path.write_bytes(header + b"".join(tensor.float().numpy().tobytes() for tensor in tensors))
    return path


class _Record:
    def __init__(self, key: int, tensor: torch.Tensor):
        self.key, self.tensor = key, tensor


class _Tensor:
    def __init__(self, record: _Record):
        self.record = record

    def __reduce_ex__(self, protocol: int) -> tuple:
        function, (_, *rest) = self.record.tensor.__reduce_ex__(2)
        return function, (self.record, *rest)


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Record):
            return None
        storage = value.tensor.storage()  # a typed storage, since the pickle names its class
        return "storage", getattr(torch, storage.pickle_storage_type()), value.key, "cpu", storage.size()


def write_as_tinyllama(path: Path, value: Mapping[str, torch.Tensor]) -> Path:
    """The container of TinyLlama's exporter (`incremental_save`): pickle protocol 5 and integer storage keys."""
    writer = torch._C.PyTorchFileWriter(str(path))
    records = [_Record(i, tensor) for i, tensor in enumerate(value.values())]
    for record in records:
        storage = record.tensor.untyped_storage()
        writer.write_record(f"data/{record.key}", storage, storage.nbytes())
    description = io.BytesIO()
    _Pickler(description, protocol=5).dump(
        {name: _Tensor(record) for name, record in zip(value, records, strict=True)}
    )
    writer.write_record("data.pkl", description.getvalue(), len(description.getvalue()))
    writer.write_end_of_file()
    return path
