"""Round trips through GGUF: lossless kinds, and lossy ones that equal the reference's rounding bit for bit."""

import weakref
from functools import partial

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaForCausalLM

from tests.conftest import SMOLLM2_GGUF
from tinyllama_hf import TinyLlamaConfig
from tinyllama_hf.conversion.checkpoint import Checkpoint, LazyTensor
from tinyllama_hf.conversion.formats.gguf_read import read_gguf
from tinyllama_hf.conversion.formats.gguf_write import write_gguf
from tinyllama_hf.conversion.formats.layout import to_half_split, to_pairwise
from tinyllama_hf.gguf import file
from tinyllama_hf.gguf.file import read_header


KINDS = ("f32", "f16", "bf16", "q8_0", "q4_0")


def in_memory(state, config, path, tokenizer=None):
    """A checkpoint with the tensors of a state dict."""
    state = {
        name: tensor for name, tensor in state.items() if name != "lm_head.weight" or not config.tie_word_embeddings
    }
    tensors = {name: LazyTensor(tuple(t.shape), t.dtype, t.clone, f"memory: {name}") for name, t in state.items()}
    return Checkpoint(path, "memory", TinyLlamaConfig.from_llama(config).to_llama(), tensors, tokenizer)


def micro(tmp_path, tokenizer_folder=None, dtype=torch.float32, rows=512, **overrides):
    """A small model with random weights and norms, as checkpoint and as model."""
    torch.manual_seed(0)
    config = TinyLlamaConfig.preset("micro", vocab_size=rows, **overrides).to_llama()
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.1 if parameter.dim() == 1 else 0.0, 0.1)
    model = model.to(dtype).eval()
    return in_memory(model.state_dict(), config, tmp_path / "source", tokenizer_folder), model


def rounded(name, tensor, kind, config):
    """The reference's round trip of a tensor through a kind of file."""
    if tensor.dim() == 1:
        return tensor.float()
    if kind in ("f32", "f16", "bf16"):
        return tensor.to({"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind])
    if tensor.shape[1] % 32:
        return tensor.to(torch.float16)
    heads = next((n for part, n in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads))
                  if part in name), None)  # fmt: skip
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    rows, number = tensor.float(), GGMLQuantizationType["Q8_0" if name == head else kind.upper()]
    rows = to_pairwise(rows, heads) if heads else rows
    rows = torch.from_numpy(dequantize(quantize(rows.numpy(), number), number))
    return to_half_split(rows, heads) if heads else rows


def architecture(config):
    """A configuration without the dtype, the padding of the tokenizer and private fields."""
    fields = {
        k: v for k, v in config.to_dict().items() if k not in ("dtype", "pad_token_id", "unk_token_id") and k[0] != "_"
    }
    return fields | {"rms_norm_eps": np.float32(config.rms_norm_eps)}


def assert_round_trip(checkpoint, folder, kind):
    lines = write_gguf(checkpoint, folder, kind)
    found = read_gguf(folder / f"model-{kind}.gguf")
    assert architecture(found.config) == architecture(checkpoint.config)
    assert found.tensors.keys() == checkpoint.tensors.keys()
    for name in found.tensors:
        expected = rounded(name, checkpoint.tensors[name].read(), kind, checkpoint.config)
        got = found.load(name)
        assert got.dtype == expected.dtype and torch.equal(got, expected), name
    return found, lines


def logits(model):
    with torch.no_grad():
        return model(torch.arange(1, 33)[None] * 7 % 500).logits


def loaded(checkpoint):
    """The transformers model of a checkpoint in float32."""
    model = LlamaForCausalLM(checkpoint.config)
    state = {name: checkpoint.load(name, torch.float32) for name in checkpoint.tensors}
    model.load_state_dict(state, strict=not checkpoint.config.tie_word_embeddings)
    return model.eval()


def library(path):
    """The file as read by transformers."""
    return LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


class TestRoundTrip:
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("kind", KINDS)
    def test_random_weights(self, tmp_path, tokenizer_folder, kind, tied):
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        checkpoint, model = micro(tmp_path, tokenizer_folder, dtype, tie_word_embeddings=tied)
        read = []
        checkpoint.advance = read.append
        found, lines = assert_round_trip(checkpoint, tmp_path, kind)
        assert sum(read) == checkpoint.num_bytes and lines == []
        assert found.tokenizer == tmp_path / f"model-{kind}.gguf" and found.config.tie_word_embeddings == tied
        types = {"q8_0": "Q8_0", "q4_0": "Q4_0, Q8_0"}
        assert found.notes == ([f"dequantized to float32 from {types[kind]}"] if kind in types else [])
        ours = logits(loaded(found))
        assert torch.equal(ours, logits(library(found.path)))
        if kind == "f32":
            assert torch.equal(ours, logits(model))

    @pytest.mark.parametrize("kind", KINDS)
    def test_stories260k(self, shared, tmp_path, kind):
        folder = shared / "data" / "models" / "stories260K"
        config = AutoConfig.from_pretrained(folder)
        checkpoint = in_memory(load_file(folder / "model.safetensors"), config, folder, folder)
        found, lines = assert_round_trip(checkpoint, tmp_path, kind)
        named = [f"blk.{i}.ffn_down.weight" for i in range(5)]  # 172 values in a row
        assert len(lines) == (kind[0] == "q")
        assert all("written as f16" in line and line.endswith(f": {', '.join(named)}") for line in lines)
        assert torch.equal(logits(loaded(found)), logits(library(found.path)))

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", KINDS[2:])
    def test_smollm2(self, smollm2, tmp_path, kind):
        config = AutoConfig.from_pretrained(smollm2)
        checkpoint = in_memory(
            load_file(smollm2 / "model.safetensors"), config, smollm2, smollm2.parent / SMOLLM2_GGUF
        )
        found, lines = assert_round_trip(checkpoint, tmp_path, kind)
        assert lines == [] and torch.equal(logits(loaded(found)), logits(library(found.path)))

    def test_settings(self, tmp_path):
        """Optional metadata: another head size, rotary base and scaling, no tokenizer."""
        rope = {"rope_type": "linear", "factor": 2.6, "rope_theta": 500000.0}
        checkpoint, model = micro(
            tmp_path, head_dim=32, rms_norm_eps=3e-6, max_position_embeddings=77, rope_parameters=rope
        )
        checkpoint.config.bos_token_id = checkpoint.config.eos_token_id = None
        found, lines = assert_round_trip(checkpoint, tmp_path, "f32")
        assert found.config.head_dim == 32 and found.config.rope_parameters == rope and found.tokenizer is None
        assert "no tokenizer" in lines[0]
        assert torch.equal(logits(loaded(found)), logits(model))
        metadata = read_header(tmp_path / "model-f32.gguf").metadata
        assert metadata["general.name"] == "source" and metadata["llama.attention.head_count_kv"] == 2
        (tmp_path / "tokenizer.model").write_bytes(b"")
        assert read_gguf(tmp_path / "model-f32.gguf").tokenizer == tmp_path / "tokenizer.model"

    def test_one_tensor_at_a_time(self, tmp_path):
        """Only one tensor is in memory at a time."""
        checkpoint, _ = micro(tmp_path)
        alive = weakref.WeakSet()

        def watched(read):
            assert not alive
            tensor = read()
            alive.add(tensor)
            return tensor

        for name, lazy in checkpoint.tensors.items():
            checkpoint.tensors[name] = lazy._replace(read=partial(watched, lazy.read))
        write_gguf(checkpoint, tmp_path, "f32")
        assert read_gguf(tmp_path / "model-f32.gguf").num_bytes == checkpoint.num_bytes


class TestQuantisedSources:
    # Where a block's float16 scales lie; the rest of it may be any bytes.
    SCALES = {"Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}

    @pytest.mark.parametrize("kind", SCALES)
    def test_equals_the_reference(self, tmp_path, monkeypatch, kind):
        monkeypatch.setattr(file, "_CHUNK", 1000)  # several rows at once, and a rest
        checkpoint, _ = micro(tmp_path, tie_word_embeddings=True)
        write_gguf(checkpoint, tmp_path, "f32")
        random, blocks = np.random.default_rng(0), {}
        number = GGMLQuantizationType[kind]
        size, num_bytes = gguf.GGML_QUANT_SIZES[number]
        writer = GGUFWriter(tmp_path / "other.gguf", "llama")
        plain = read_header(tmp_path / "model-f32.gguf")
        for key, value in plain.metadata.items():
            if key.startswith("llama."):
                (writer.add_float32 if type(value) is float else writer.add_uint32)(key, value)
        for tensor in plain.tensors.values():
            data = file.read_values(plain.path, tensor)
            if data.ndim == 2:
                data = random.integers(0, 256, (data.shape[0], data.shape[1] // size, num_bytes), np.uint8)
                for at in self.SCALES[kind]:
                    scales = random.normal(0, 0.01, data.shape[:2]).astype(np.float16)
                    data[..., at : at + 2] = scales[..., None].view(np.uint8)
                data = blocks[tensor.name] = data.reshape(len(data), -1)
            writer.add_tensor(tensor.name, data, raw_dtype=number if data.ndim == 2 else None)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        found = read_gguf(tmp_path / "other.gguf")
        config = found.config
        for name, gguf_name, heads in (
            ("model.embed_tokens", "token_embd", None),
            ("model.layers.0.self_attn.q_proj", "blk.0.attn_q", config.num_attention_heads),
            ("model.layers.1.self_attn.k_proj", "blk.1.attn_k", config.num_key_value_heads),
            ("model.layers.1.mlp.down_proj", "blk.1.ffn_down", None),
        ):
            expected = torch.from_numpy(dequantize(blocks[f"{gguf_name}.weight"], number))
            got = found.load(f"{name}.weight")
            assert torch.equal(got, to_half_split(expected, heads) if heads else expected)

    @pytest.mark.slow
    def test_smollm2_as_transformers_reads_it(self, smollm2):
        """A file written by llama.cpp, with Q4_1 and Q8_0."""
        path = smollm2.parent / SMOLLM2_GGUF
        found, stock = read_gguf(path), library(path)
        assert found.notes == ["dequantized to float32 from Q4_1, Q8_0"] and found.tokenizer == path
        state = stock.state_dict()
        assert all(torch.equal(found.load(name), state[name]) for name in found.tensors)
        assert torch.equal(logits(loaded(found)), logits(stock))
