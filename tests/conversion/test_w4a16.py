"""The format `w4a16`: compared with AWQ's values, with stock transformers, and with the library's own folders.

`tests/conversion/test_awq.py` tests the rounding and the search, which both formats share.
"""

import json
import sys

import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from tests.conversion import test_awq
from tests.conversion.test_awq import as_checkpoint, divergence, log_probabilities, random_model, with_outlier_channels
from tinyllama_hf import convert, load, load_tokenizer, verify
from tinyllama_hf.conversion.quantized.w4a16 import write_w4a16
from tinyllama_hf.conversion.reading.recognize import open_checkpoint
from tinyllama_hf.errors import InputError


NARROW = {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 320}
PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
trained = test_awq.trained


@pytest.fixture
def model(tmp_path):
    random_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def quantized(model, tmp_path):
    convert(model, "w4a16", tmp_path / "w4a16")
    return tmp_path / "w4a16"


def read_weights(folder):
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.load(name) for name in checkpoint.tensors}


def assert_same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    assert [n for n in wanted if found[n].dtype != wanted[n].dtype or not found[n].equal(wanted[n])] == []


def change(folder, rewrite):
    """Rewrites the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    rewrite(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "provenance.json").unlink(missing_ok=True)


def change_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= fields
    (folder / "config.json").write_text(json.dumps(config))


# What is written


@pytest.mark.parametrize("calibrated", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_values_are_those_of_awq(model, tokenizer_folder, documents, calibrated, tmp_path):
    """Bit for bit: AWQ's tests of rounding, search and clipping hold for this format too."""
    load_tokenizer(tokenizer_folder).save_pretrained(model)
    (tmp_path / "text.txt").write_text(documents[0][:6000], encoding="utf-8")
    options = {"calibration": [tmp_path / "text.txt"]} if calibrated else {}
    for to in ("awq", "w4a16"):
        [note, *_] = convert(model, to, tmp_path / to, **options).notes
        assert note.startswith(f"{to.upper() if calibrated else 'rounding (RTN)'}: 4 bit with zero points")
    assert_same_bits(read_weights(tmp_path / "w4a16"), read_weights(tmp_path / "awq"))


@pytest.mark.parametrize(("fields", "group_size"), [({}, 128), (NARROW, 64)], ids=str)
def test_the_folder_in_the_words_of_the_library(fields, group_size, tmp_path):
    """The library unpacks each weight to what the readers of this package compute with."""
    random_model(tie_word_embeddings=True, **fields).save_pretrained(tmp_path / "model")
    convert(tmp_path / "model", "w4a16", tmp_path / "w4a16")
    config = AutoConfig.from_pretrained(tmp_path / "w4a16")
    [scheme] = config.quantization_config["config_groups"].values()
    assert (config.dtype, scheme["weights"]["group_size"]) == (torch.float16, group_size)
    assert config.quantization_config["ignore"] == ["lm_head"]
    tensors, found = load_file(tmp_path / "w4a16" / "model.safetensors"), read_weights(tmp_path / "w4a16")
    modules = [name.removesuffix("_packed") for name in tensors if name.endswith("weight_packed")]
    assert len(modules) == 2 * 7
    for module in modules:
        state = {part: tensors[module.removesuffix("weight") + part] for part in PARTS}
        assert found[module].equal(
            PackedQuantizationCompressor.decompress(state, QuantizationScheme(**scheme))["weight"]
        )
        # Unpacked by hand: words hold eight inputs of a weight, or eight outputs of zero points, from the low end.
        nibbles = (state["weight_packed"][..., None] >> torch.arange(0, 32, 4)) & 15
        zeros = ((state["weight_zero_point"].T[..., None] >> torch.arange(0, 32, 4)) & 15).flatten(1).T
        groups = (nibbles.flatten(1).unflatten(1, (-1, group_size)) - zeros[..., None]).half()
        assert found[module].equal((groups * state["weight_scale"][..., None]).flatten(1))
    assert "lm_head.weight" not in tensors and tensors["model.embed_tokens.weight"].dtype == torch.float16


def test_every_tensor_is_aligned_in_the_file(tmp_path):
    """`k_proj` has 8 outputs and 3 groups: 12 bytes of zero points, which must not shift the 64-bit shapes."""
    fields = NARROW | {"num_attention_heads": 8, "head_dim": 8}
    random_model(**fields).save_pretrained(tmp_path / "model")
    convert(tmp_path / "model", "w4a16", tmp_path / "w4a16")
    raw = (tmp_path / "w4a16" / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    tensors = {n: t for n, t in json.loads(raw[8 : 8 + length]).items() if n != "__metadata__"}
    assert tensors["model.layers.0.self_attn.k_proj.weight_zero_point"]["shape"] == [1, 3]
    size = {"I64": 8, "I32": 4, "F16": 2}
    assert [name for name, tensor in tensors.items() if tensor["data_offsets"][0] % size[tensor["dtype"]]] == []


def test_shards(model, tmp_path):
    convert(model, "w4a16", tmp_path / "whole")
    convert(model, "w4a16", tmp_path / "shards", max_shard_size="200KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert_same_bits(read_weights(tmp_path / "shards"), read_weights(tmp_path / "whole"))


# Readers


@pytest.mark.parametrize("fields", [{}, NARROW], ids=str)
def test_stock_transformers_loads_it(fields, tmp_path):
    random_model(**fields).save_pretrained(tmp_path / "model")
    convert(tmp_path / "model", "w4a16", tmp_path / "w4a16")
    convert(tmp_path / "w4a16", "llama", tmp_path / "plain")
    stock, plain = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("w4a16", "plain"))
    assert type(stock) is LlamaForCausalLM and stock.dtype == torch.float16
    assert_same_bits(stock.state_dict(), plain.state_dict())
    with torch.no_grad():
        assert stock(torch.arange(3, 67)[None]).logits.equal(plain(torch.arange(3, 67)[None]).logits)


def test_the_dequantized_folder_is_an_ordinary_one(quantized, tmp_path):
    convert(quantized, "llama", tmp_path / "plain")
    assert verify(quantized, tmp_path / "plain").largest == 0
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert 0 < verify(tmp_path / "model", quantized, tolerance=5).largest


def test_load_names_what_reads_it(quantized):
    with pytest.raises(InputError, match=r"compressed-tensors, .*vLLM reads it, .* convert FOLDER --to llama"):
        load(quantized)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_symmetric_folder_of_the_library(model, tmp_path, dtype):
    """As llm-compressor writes GPTQ: no zero points, scales in the dtype of the model."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")
    tensors, wanted = {}, {}
    for name, weight in load_file(model / "model.safetensors").items():
        tensors[name] = wanted[name] = weight.to(dtype)
        if name.endswith("_proj.weight"):
            groups = tensors.pop(name).unflatten(1, (-1, 32))
            scale, _ = calculate_qparams(groups.amin(2), groups.amax(2), scheme.weights)
            parts = PackedQuantizationCompressor.compress({"weight": weight.to(dtype), "weight_scale": scale}, scheme)
            tensors |= {name.removesuffix("weight") + part: value for part, value in parts.items()}
            wanted[name] = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    groups = {"group_0": scheme.model_dump(mode="json")}
    described = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": described}))
    assert_same_bits(read_weights(model), wanted)


# The search


@pytest.mark.slow
def test_scales_are_nearer_to_the_model_than_rounding(trained, documents, tokenizer_folder, tmp_path):
    model, ids = trained
    other = with_outlier_channels(model)
    other.save_pretrained(tmp_path / "model")
    load_tokenizer(tokenizer_folder).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(text[:5400] for text in documents[:12]), encoding="utf-8")
    original, divergences = log_probabilities(other, ids), {}
    for name, calibration in (("searched", [tmp_path / "text.txt"]), ("rounded", [])):
        convert(tmp_path / "model", "w4a16", tmp_path / name, calibration=calibration)
        quantized = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        divergences[name] = divergence(original, log_probabilities(quantized, ids))
    assert divergences["searched"] < 0.1 * divergences["rounded"]


# What is refused


@pytest.mark.parametrize(
    ("fields", "named"),
    (
        ({"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3}, r"q_proj\.weight: 96 inputs.* 64\."),
        ({"intermediate_size": 1000}, r"layers\.0\.mlp\.down_proj\.weight: 1000 inputs; w4a16 .* 64\."),
        ({"num_attention_heads": 32, "num_key_value_heads": 1, "head_dim": 4}, r"k_proj\.weight: 4 outputs.* 8"),
        ({"attention_bias": True}, r"layers\.0\.self_attn\.q_proj\.bias: w4a16 .*bias"),
        ({"mlp_bias": True}, r"layers\.0\.mlp\.gate_proj\.bias: w4a16 .*bias"),
    ),
    ids=str,
)
def test_what_the_layout_cannot_hold_is_refused_by_name(fields, named, tmp_path):
    with pytest.raises(InputError, match=named):
        write_w4a16(as_checkpoint(random_model(**fields)), tmp_path, None, 1 << 30)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_values_beyond_float16_are_refused_by_name(name, tmp_path):
    model = random_model()
    with torch.no_grad():
        model.get_parameter(name).flatten()[7] = 2e6
    with pytest.raises(InputError, match=rf"{name}: .*65504"):
        write_w4a16(as_checkpoint(model), tmp_path, None, 1 << 30)


def test_calibration_needs_a_tokenizer(tmp_path):
    with pytest.raises(InputError, match=r"no tokenizer.*rounding \(RTN\)"):
        write_w4a16(as_checkpoint(random_model()), tmp_path, ["text"], 1 << 30)


def test_without_the_library(model, quantized, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    for call in (lambda: convert(model, "w4a16", tmp_path / "other"), lambda: open_checkpoint(quantized)):
        with pytest.raises(InputError, match=r"compressed_tensors: pip install 'tinyllama_hf\[w4a16\]'"):
            call()
    assert not (tmp_path / "other").exists()


# Damaged and other folders


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_missing_or_does_not_fit(quantized, part):
    name = f"model.layers.1.mlp.up_proj.{part}"
    original = load_file(quantized / "model.safetensors")[name]
    wrong = {
        "a row less": original[1:].clone(),
        "another shape": original.flip(0) if part == "weight_shape" else original.T,
    }
    if part in ("weight_packed", "weight_zero_point"):
        wrong["another type"] = original.to(torch.int64)
    for changed in wrong.values():
        change(quantized, lambda tensors, changed=changed: tensors.update({name: changed.contiguous()}))
        with pytest.raises(InputError, match=r"up_proj.*inconsistent for group_size 128"):
            open_checkpoint(quantized)
    change(quantized, lambda tensors: tensors.pop(name))
    message = "tensors are missing" if part == "weight_packed" else rf"up_proj\.{part} is missing"
    with pytest.raises(InputError, match=message):
        open_checkpoint(quantized)


def test_scales_that_are_not_finite(quantized, tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight_scale"
    change(quantized, lambda tensors: tensors[name][3].fill_(float("inf")))
    with pytest.raises(InputError, match=r"q_proj.*not finite"):
        convert(quantized, "llama", tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_an_unknown_part(quantized):
    """Such as the order of the inputs in GPTQ's `act-order`, without which the weights would be wrong."""
    name = "model.layers.0.self_attn.q_proj.weight_g_idx"
    change(quantized, lambda tensors: tensors.update({name: torch.arange(256)}))
    with pytest.raises(InputError, match=r"weight_g_idx: .* no such tensor"):
        open_checkpoint(quantized)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "int-quantized"}, "format is 'int-quantized'; w4a16 supports only 'pack-quantized'"),
        ({"weights": {"num_bits": 8}}, "num_bits is 8; w4a16 supports only 4"),
        ({"weights": {"type": "float"}}, "type is 'float'"),
        ({"weights": {"strategy": "channel", "group_size": None}}, "strategy is 'channel'"),
        ({"weights": {"group_size": 64}}, "inconsistent for group_size 64"),
        ({"weights": {"group_size": 1000}}, "inconsistent for group_size 1000"),
        ({"weights": {"group_size": -7}}, "config.json: damaged"),
        ({"weights": {"symmetric": True}}, "weight_zero_point: .* no such tensor"),
        ({"input_activations": {"num_bits": 8}}, "input_activations is"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is"),
        ({"config_groups": {}}, "0 config_groups"),
        ({"config_groups": 3}, "config.json: damaged"),
    ],
    ids=str,
)
def test_other_schemes(quantized, fields, message):
    saved = json.loads((quantized / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    group = {
        "weights": saved["weights"] | fields.pop("weights", {}),
        "input_activations": fields.pop("input_activations", None),
    }
    change_config(quantized, **{"config_groups": {"group_0": saved | group}} | fields)
    with pytest.raises(InputError, match=message):
        open_checkpoint(quantized)
