"""Damaged configurations, or ones that contradict the tensors, are refused with the name of the field."""

import json

import pytest
import torch

from tests.conversion import files, layouts
from tests.conversion.files import changed, refuse
from tinyllama_hf import convert


@pytest.fixture(scope="module")
def model():
    return files.small_model()


FUSED, PACKED = "transformer.h.1.attn.attn.weight", "transformer.h.0.mlp.swiglu.w12.weight"
LIT_GPT = {
    "rows of q, k and v": (
        lambda w: changed(w, FUSED, lambda t: t[:-16]),
        {},
        rf"{FUSED}: shape \[112, 64\].*\[128, 64\]",
    ),
    "a configuration of other heads": ({}, {"n_head": 8}, r"attn.attn.weight: shape \[128, 64\].*\[96, 64\]"),
    "groups that do not divide": (
        {},
        {"n_head": 5, "n_query_groups": 3, "n_embd": 80},
        r"shape \[128, 64\].*\[176, 80\]",
    ),
    "rows of w12": (lambda w: changed(w, PACKED, lambda t: t[:-1]), {}, r"w12.weight: shape \[191, 64\].*\[192, 64\]"),
    "one tensor under two names": (
        lambda w: w | {"transformer.h.0.mlp.proj.weight": w["transformer.h.0.mlp.swiglu.w3.weight"]},
        {},
        "also stored as .*h.0.mlp.swiglu.w3.weight",
    ),
    "no embedding": (
        lambda w: {k: v for k, v in w.items() if "wte" not in k},
        {},
        "transformer.wte.weight is missing",
    ),
    "an empty embedding": (
        lambda w: changed(w, "transformer.wte.weight", lambda t: t[:0]),
        {},
        "rows .* is 0; it must be a positive",
    ),
    "an embedding of no dimension": (
        lambda w: changed(w, "transformer.wte.weight", lambda t: t[0, 0]),
        {},
        "rows .* is 0;",
    ),
    "a negative size": ({}, {"n_layer": -2}, "n_layer is -2; it must be a positive number"),
    "a huge number": ({}, {"rope_base": 10**400}, "rope_base is a number of 1329 bits"),
    "no number": ({}, {"n_embd": [[[]]]}, r"n_embd is \[\[\[\]\]\]; it must be"),
    "NaN": ({}, {"norm_eps": float("nan")}, "norm_eps is nan"),
    "very many layers": ({}, {"n_layer": 2**30}, "num_hidden_layers is 1073741824"),
    "a contradiction": ({}, {"n_embd": 66, "head_size": None}, "lit_config.json: damaged .*66.* is not a multiple"),
    "no Llama": ({}, {"parallel_residual": True}, "parallel_residual is True; .* False"),
    "odd adjustments": (
        {},
        {"rope_adjustments": {"factor": "x", "low_freq_factor": 1, "high_freq_factor": 4, "original_max_seq_len": 8}},
        "factor is 'x'; it must be",
    ),
}


@pytest.mark.parametrize("name", LIT_GPT)
def test_lit_gpt_that_contradicts_itself(name, model, tmp_path):
    change, fields, message = LIT_GPT[name]
    weights, config = model
    (tmp_path / "model").mkdir()
    state = layouts.lit_gpt(weights, config, "A'")
    torch.save(change(state) if change else state, tmp_path / "model" / "lit_model.pth")
    written = layouts.lit_gpt_fields(config) | fields
    (tmp_path / "model" / "lit_config.json").write_text(json.dumps(written))
    refuse(tmp_path / "model", message, tmp_path)


CONFIGS = {
    "no JSON": ("{", "config.json: damaged, not valid JSON"),
    "no fields": ([1], "config.json: damaged .*not a JSON object"),
    "brackets": ("[" * 200_000, "config.json: damaged, not valid JSON .*recursion"),
    "digits": ('{"hidden_size": ' + "1" * 5000 + "}", "config.json: damaged, not valid JSON .*4300 digits"),
    "a word": ({"hidden_size": "64"}, "config.json: damaged .*'hidden_size' expected int, got str"),
    "no heads": ({"num_attention_heads": 0}, "config.json: damaged .*ZeroDivisionError"),
    "minus one": ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
    "very many layers": ({"num_hidden_layers": 2**30}, "21 tensors, but num_hidden_layers is 1073741824"),
    "wide": ({"hidden_size": 2**40, "head_dim": 16}, "hidden_size is 1099511627776"),
    "wide and high": ({"hidden_size": 2**30, "vocab_size": 2**31 - 1}, "shape|damaged"),
    "groups": ({"num_key_value_heads": 3}, "4 heads of size 16 and 3 key/value heads"),
    "odd heads": ({"head_dim": 15}, "even"),
    "an activation": ({"hidden_act": "os.system"}, "its configuration: damaged .*KeyError: 'os.system'"),
    "a scaling": (
        {"rope_parameters": {"rope_type": "none such", "rope_theta": 1.0}},
        "damaged .*KeyError: 'none such'",
    ),
    "half a scaling": ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "Missing required keys"),
    "no base": ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "rope_theta is 'x'|damaged"),
    "no factor": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1.0, "factor": 0}}, "factor is 0"),
    "padding": ({"pad_token_id": 512}, "damaged .*AssertionError: Padding_idx must be within"),
    "another family": ({"model_type": "mistral"}, "model_type is 'mistral'"),
    "quantized": ({"quantization_config": {}}, "weights are quantized"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(name, model, tmp_path):
    fields, message = CONFIGS[name]
    source = files.write_folder(tmp_path / "model", *model)
    written = json.loads((source / "config.json").read_text())
    text = fields if isinstance(fields, str) else json.dumps(written | fields if isinstance(fields, dict) else fields)
    (source / "config.json").write_text(text)
    refuse(source, message, tmp_path)


def test_what_a_configuration_has_besides_the_architecture_is_left_aside(model, tmp_path):
    """Ignored are kernels that transformers would download, billions of labels, and `trust_remote_code` code."""
    source = files.write_folder(tmp_path / "model", *model)
    fields = json.loads((source / "config.json").read_text())
    fields |= {
        "attn_implementation": "user/kernel",
        "_attn_implementation": "user/kernel",
        "num_labels": 10**10,
        "auto_map": {"AutoConfig": "code.Config"},
        "to_dict": 1,
        "dtype": "os",
        "id2label": {"0": 5},
    }
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": 2804339835.0}  # a long context has such a base
    (source / "config.json").write_text(json.dumps(fields))
    convert(source, "llama", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not written.keys() & {"attn_implementation", "_attn_implementation", "auto_map", "id2label", "num_labels"}
    assert written["rope_theta"] == 2804339835.0


def test_yaml_that_refers_to_itself(model, tmp_path):
    """A billion laughs attack, and YAML merges, which expand while they are read."""
    weights, config = model
    (tmp_path / "model").mkdir()
    torch.save(layouts.lit_gpt(weights, config, "C"), tmp_path / "model" / "lit_model.pth")
    file = tmp_path / "model" / "model_config.yaml"
    laughs = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    merges = "a0: &a0 {x: 1}\n" + "".join(
        f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
    )
    for text, message in (
        (laughs + "n_head: *a29", "model_config.yaml: damaged .*aliases"),
        (merges, "aliases"),
        ("n_head: 0x" + "f" * 9999, "damaged .*4300 digits"),
        ("n_head: " + "9" * 9999, "damaged .*4300 digits"),
        ("[" * 1500, "damaged .*RecursionError"),
        ("n_head: 2024-99-99", "damaged .*month must be"),
        ("- 1", "not a YAML mapping"),
        ("x" * 70_000, "70000 bytes of YAML"),
        ("!!python/name:os.system x", "ConstructorError"),
    ):
        file.write_text(text)
        refuse(tmp_path / "model", message, tmp_path)


META = {
    "no dim": ({"dim": None}, "params.json: dim is None; it must be"),
    "other heads": ({"n_heads": 8}, r"shape \[64, 64\]|shape \[32, 64\]"),
    "very many layers": ({"n_layers": 2**30}, "num_hidden_layers is 1073741824"),
    "infinite base": ({"rope_theta": float("inf")}, "params.json: rope_theta is inf"),
    "scaling": ({"use_scaled_rope": True}, "use_scaled_rope"),
    "a contradiction": ({"n_heads": 3}, "params.json: damaged .*not a multiple"),
}


@pytest.mark.parametrize("name", META)
def test_params_of_meta(name, model, tmp_path):
    fields, message = META[name]
    source = layouts.write_meta(tmp_path / "model", *model, 2)
    params = json.loads((source / "params.json").read_text()) | fields
    (source / "params.json").write_text(json.dumps(params))
    refuse(source, message, tmp_path)
