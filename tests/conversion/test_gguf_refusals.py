"""Unsupported features in reading and writing GGUF are refused by name."""

import pytest

from tests.conversion.test_gguf import in_memory, micro
from tinyllama_hf.conversion.formats.gguf_read import read_gguf
from tinyllama_hf.conversion.formats.gguf_write import write_gguf
from tinyllama_hf.errors import InputError
from tinyllama_hf.gguf.file import read_header


def refused(header, message):
    """Asserts that a file with this header is refused."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match=message):
        patch.setattr("tinyllama_hf.conversion.formats.gguf_read.read_header", lambda path: header)
        read_gguf(header.path)


class TestReading:
    @pytest.mark.parametrize(
        "key, value, message",
        [
            ("general.architecture", "qwen2", "general.architecture is 'qwen2'"),
            ("llama.block_count", 3, "9 tensors are missing, such as model.layers.2"),
            ("llama.block_count", None, "block_count is None"),
            ("llama.attention.head_count", 8, "rope.dimension_count is 64; .* 32"),
            ("llama.attention.head_count", 0, "head_count is 0"),
            ("llama.attention.head_count", [4, 4], r"head_count is \[4, 4\]; it must be a positive number"),
            ("llama.attention.head_count_kv", None, r"attn_k.weight: shape \[128, 256\]"),
            ("llama.embedding_length", 257, r"257.* is not a multiple"),
            ("llama.feed_forward_length", 2**31 - 1, r"ffn_gate.weight: shape \[512, 256\]"),
            ("llama.feed_forward_length", 2**32 - 1, "feed_forward_length is 4294967295"),
            ("llama.rope.dimension_count", 32, "rope.dimension_count is 32; .* 64"),
            ("llama.rope.freq_base", float("nan"), "freq_base is nan"),
            ("llama.rope.scaling.type", "yarn", "scaling.type is 'yarn'"),
            ("llama.rope.scaling.type", "linear", "scaling.factor is None"),
            ("llama.expert_count", 8, "expert_count is 8; mixtures of experts"),
            ("llama.attention.head_count_kv", 3, "4 heads of size 64 and 3 key/value heads"),
            ("llama.attention.key_length", 62, "rope.dimension_count is 64; .* 62"),
        ],
    )
    def test_metadata(self, tmp_path, key, value, message):
        checkpoint, _ = micro(tmp_path, head_dim=64)
        write_gguf(checkpoint, tmp_path, "f32")
        header = read_header(tmp_path / "model-f32.gguf")
        header.metadata[key] = value
        if value is None:
            del header.metadata[key]
        refused(header, message)

    def test_sizes_that_are_no_llama_of_transformers(self, tmp_path):
        """Three heads match the tensors, but do not divide the hidden size of 128."""
        checkpoint, _ = micro(tmp_path, hidden_size=128, num_attention_heads=1, num_key_value_heads=1, head_dim=192)
        write_gguf(checkpoint, tmp_path, "f32")
        header = read_header(tmp_path / "model-f32.gguf")
        for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            header.metadata[f"llama.{key}"] = 64
        header.metadata.update({"llama.attention.head_count": 3, "llama.attention.head_count_kv": 3})
        with (
            pytest.MonkeyPatch.context() as patch,
            pytest.raises(InputError, match="not a multiple of the number of att"),
        ):
            patch.setattr("tinyllama_hf.conversion.formats.gguf_read.read_header", lambda path: header)
            read_gguf(header.path)

    @pytest.mark.parametrize(
        "old, new, message",
        [
            ("output_norm.weight", "output_norm.bias", "1 tensors are missing, such as model.norm.weight"),
            ("blk.1.attn_v.weight", "blk.1.attn_v.bias", "such as model.layers.1.self_attn.v_proj.weight"),
            ("output.weight", "rope_freqs.weight", "scaled rotary embedding of Llama 3.1"),
            ("output.weight", "extra.weight", "extra.weight: .*no such tensor"),
            (
                "blk.1.attn_norm.weight",
                "blk.7.attn_norm.weight",
                "1 tensors are missing, such as model.layers.1.input_layernorm",
            ),
        ],
    )
    def test_tensors(self, tmp_path, old, new, message):
        checkpoint, _ = micro(tmp_path)
        write_gguf(checkpoint, tmp_path, "f32")
        path = tmp_path / "model-f32.gguf"
        header = read_header(path)
        header.tensors[new] = header.tensors.pop(old)._replace(name=new)
        refused(header, message)

    def test_a_type_that_is_not_read(self, tmp_path):
        checkpoint, _ = micro(tmp_path)
        write_gguf(checkpoint, tmp_path, "q4_0")
        path = tmp_path / "model-q4_0.gguf"
        name = b"blk.0.attn_q.weight"
        data = bytearray(path.read_bytes())
        at = data.index(name) + len(name) + 4 + 16
        data[at] = 20  # IQ4_NL has blocks of the same size
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"attn_q\.weight has the unsupported type IQ4_NL"):
            read_gguf(path)


class TestWriting:
    @pytest.mark.parametrize(
        "field, value",
        [
            ("attention_bias", True),
            ("mlp_bias", True),
            ("hidden_act", "gelu"),
            ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                                 "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}),
        ],
    )  # fmt: skip
    def test_what_is_not_written(self, tmp_path, field, value):
        checkpoint, _ = micro(tmp_path)
        setattr(checkpoint.config, field, value)
        named = "rope_type is 'llama3'" if field == "rope_parameters" else f"{field} is {value!r}"
        with pytest.raises(InputError, match=named):
            write_gguf(checkpoint, tmp_path, "f32")

    @pytest.mark.parametrize(
        "kind, value, message",
        [
            ("f32", float("nan"), "1 values are not finite"),
            ("f16", 7e4, "not finite as float16"),
            ("q4_0", -6e5, r"value 600000 exceeds the range of Q4_0"),
            ("q8_0", 9e6, r"value 9e\+06 exceeds the range of Q8_0"),
        ],
    )
    def test_values(self, tmp_path, kind, value, message):
        checkpoint, model = micro(tmp_path)
        model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
        checkpoint = in_memory(model.state_dict(), checkpoint.config, tmp_path)
        with pytest.raises(InputError, match=f"up_proj.weight: .*{message}"):
            write_gguf(checkpoint, tmp_path, kind)
