"""Every layout gives the original tensors bit for bit, and a real model still generates its known text."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from tests.conversion import layouts
from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, convert, verify
from tinyllama_hf.conversion.formats.lit_gpt import config_from_fields
from tinyllama_hf.conversion.reading.recognize import open_checkpoint
from tinyllama_hf.errors import InputError


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    """A `micro` folder in float32 with random norms."""
    folder = tmp_path_factory.mktemp("source") / "micro"
    torch.manual_seed(0)
    model = TinyLlamaForCausalLM(TinyLlamaConfig.preset("micro", vocab_size=256, max_position_embeddings=4096))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = 1 + torch.randn_like(parameter) / 10
    model.save_pretrained(folder)
    return folder


def weights_of(folder):
    return load_file(folder / "model.safetensors"), LlamaForCausalLM.from_pretrained(folder).config


def assert_same(source, folder):
    """Asserts equal tensors, bit for bit, and equal logits."""
    found, wanted = open_checkpoint(source), load_file(folder / "model.safetensors")
    assert found.tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found.load(name).equal(tensor), name
    result = verify(source, folder)
    assert result.is_equal and result.largest == 0 and result.argmax_agreement == 1


@pytest.mark.parametrize(
    "write", [torch.save, lambda value, path: layouts.write_as_tinyllama(path, value)], ids=["torch", "own"]
)
@pytest.mark.parametrize("kind", ["A", "A'", "B", "C"])
def test_lit_gpt(micro, tmp_path, kind, write):
    weights, config = weights_of(micro)
    write(layouts.lit_gpt(weights, config, kind), tmp_path / "lit_model.pth")
    (tmp_path / "lit_config.json").write_text(json.dumps(layouts.lit_gpt_fields(config)))
    assert_same(tmp_path, micro)
    assert f"layout {kind}" in open_checkpoint(tmp_path).layout


def test_the_container_of_tinyllamas_exporter_is_refused_by_torch(micro, tmp_path):
    """The reason for our own reader (torch 2.13)."""
    weights, config = weights_of(micro)
    path = layouts.write_as_tinyllama(tmp_path / "lit_model.pth", layouts.lit_gpt(weights, config, "A"))
    with pytest.raises(Exception, match="149"):
        torch.load(path, weights_only=True)
    assert torch.load(path, weights_only=False).keys() == layouts.lit_gpt(weights, config, "A").keys()


@pytest.mark.parametrize(
    "prefix", ["module.", "_forward_module.", "_forward_module._orig_mod.", "_fsdp_wrapped_module."]
)
def test_training_files_and_wrapped_keys(micro, tmp_path, prefix):
    weights, config = weights_of(micro)
    wrapped = {prefix + name: tensor for name, tensor in layouts.lit_gpt(weights, config, "A").items()}
    state = {"exp_avg": torch.zeros(3), "step": 7}
    torch.save(
        {"model": wrapped, "optimizer": {"state": {0: state}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95)}]},
         "hparams": {"model_name": "x", "out_dir": "out"}, "iter_num": 28, "step_count": 7},
        tmp_path / "iter-28-ckpt.pth",
    )  # fmt: skip
    (tmp_path / "lit_config.json").write_text(json.dumps(layouts.lit_gpt_fields(config)))
    assert_same(tmp_path / "iter-28-ckpt.pth", micro)
    assert "optimizer" in open_checkpoint(tmp_path / "iter-28-ckpt.pth").notes[0]


def test_shapes_of_a_preset_need_no_configuration_others_do(micro, tmp_path):
    weights, config = weights_of(micro)
    torch.save(layouts.lit_gpt(weights, config, "A"), tmp_path / "lit.pth")
    found = open_checkpoint(tmp_path / "lit.pth").config
    assert (found.num_attention_heads, found.num_key_value_heads, found.vocab_size) == (4, 2, 256)
    other = TinyLlamaConfig.preset("micro", vocab_size=256, intermediate_size=384)
    model = TinyLlamaForCausalLM(other)
    torch.save(layouts.lit_gpt(model.state_dict(), other, "B"), tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"no preset has .* Pass --config"):
        open_checkpoint(tmp_path / "other.pth")
    (tmp_path / "elsewhere.json").write_text(json.dumps(layouts.lit_gpt_fields(other)))
    assert open_checkpoint(tmp_path / "other.pth", tmp_path / "elsewhere.json").config.intermediate_size == 384


def test_what_lit_gpts_files_leave_out():
    """The defaults of lit-gpt's `Config`."""
    config = config_from_fields({"n_layer": 2, "n_head": 4, "n_embd": 64, "block_size": 128}, "a file", 256)
    assert config.num_key_value_heads == 4 and config.head_dim == 16 and config.intermediate_size == 4 * 64
    assert config.rms_norm_eps == 1e-5 and config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert config.max_position_embeddings == 128 and config.vocab_size == 256


def test_condensed_rotary_becomes_scaling(micro, tmp_path):
    """Compares lit-gpt's formula, which divides the positions, with stock Llama and the scaling we write."""
    weights, config = weights_of(micro)
    torch.save(layouts.lit_gpt(weights, config, "A"), tmp_path / "lit_model.pth")
    fields = layouts.lit_gpt_fields(config) | {"condense_ratio": 4, "block_size": 8192}
    (tmp_path / "lit_config.json").write_text(json.dumps(fields))
    convert(tmp_path, "llama", tmp_path / "out")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.rope_parameters == {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    assert model.config.max_position_embeddings == 8192
    plain = LlamaForCausalLM.from_pretrained(micro)
    ids, positions = torch.arange(200)[None], torch.arange(200)[None]
    with torch.no_grad():
        scaled = model(ids, position_ids=positions).logits
        # Every fourth position of the plain model is a position of the condensed one.
        torch.testing.assert_close(
            model(ids, position_ids=4 * positions).logits, plain(ids, position_ids=positions).logits, atol=1e-4, rtol=0
        )
    assert not torch.allclose(scaled, plain(ids).logits, atol=1e-3)
    convert(tmp_path / "out", "litgpt", tmp_path / "back")
    assert open_checkpoint(tmp_path / "back").config.rope_parameters == model.config.rope_parameters


@pytest.mark.parametrize(("shards", "rows"), [(1, False), (2, False), (2, True)])
def test_meta(micro, tmp_path, shards, rows):
    weights, config = weights_of(micro)
    assert_same(layouts.write_meta(tmp_path / "meta", weights, config, shards, rows), micro)


@pytest.mark.parametrize("tied", [False, True])
def test_llama2c(micro, tmp_path, tied):
    weights, config = weights_of(micro)
    folder = micro
    if tied:
        weights.pop("lm_head.weight")
        folder = tmp_path / "tied"
        convert(micro, "llama", folder)
        fields = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
        (folder / "config.json").write_text(json.dumps(fields))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "provenance.json").unlink()
    source = layouts.write_llama2c(tmp_path / "model.bin", weights, config)
    assert open_checkpoint(source).config.tie_word_embeddings is tied
    assert_same(source, folder)


@pytest.mark.parametrize("sharded", [False, True])
def test_hugging_face_bin(micro, tmp_path, sharded):
    weights, _ = weights_of(micro)
    (tmp_path / "config.json").write_text((micro / "config.json").read_text())
    if sharded:
        names = list(weights)
        parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
        for file, part in parts.items():
            torch.save({name: weights[name] for name in part}, tmp_path / file)
        weight_map = {name: file for file, part in parts.items() for name in part}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(LlamaForCausalLM.from_pretrained(micro).state_dict(), tmp_path / "pytorch_model.bin")
    assert_same(tmp_path, micro)


def test_views_of_one_storage(micro, tmp_path):
    """Slices and transposes of larger tensors are read correctly."""
    weights, _ = weights_of(micro)
    (tmp_path / "config.json").write_text((micro / "config.json").read_text())
    twice = {name: torch.cat([tensor, tensor])[len(tensor) :] for name, tensor in weights.items()}
    name = "model.layers.0.mlp.up_proj.weight"
    twice[name] = weights[name].T.contiguous().T
    torch.save(twice, tmp_path / "pytorch_model.bin")
    assert_same(tmp_path, micro)


@pytest.mark.parametrize("kind", ["A", "A'", "B", "C", "meta", "llama2c"])
def test_a_real_model_in_every_layout(shared, tmp_path, kind):
    """A round trip of stories260K gives the same logits and its known greedy output."""
    real = shared / "data" / "models" / "stories260K"
    weights, config = weights_of(real)
    weights = dict(weights) | {"lm_head.weight": weights["model.embed_tokens.weight"]}
    if kind == "meta":
        source = layouts.write_meta(tmp_path / "meta", weights, config, 2)
    elif kind == "llama2c":
        del weights["lm_head.weight"]
        source = layouts.write_llama2c(tmp_path / "model.bin", weights, config)
    else:
        source = tmp_path
        torch.save(layouts.lit_gpt(weights, config, kind), tmp_path / "lit_model.pth")
        (tmp_path / "lit_config.json").write_text(json.dumps(layouts.lit_gpt_fields(config)))
    convert(source, "llama", tmp_path / "out")
    result = verify(tmp_path / "out", real)
    assert result.largest == 0, result
