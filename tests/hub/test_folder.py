"""Runs and folders with a damaged file are refused. A stock loader would fill missing weights with random values."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinyllama_hf.errors import InputError
from tinyllama_hf.hub.publish import plan_revisions


TEXTS = {
    ("provenance.json", None): r"provenance\.json",
    ("provenance.json", "{}"): r"provenance\.json: .*step",
    ("provenance.json", "[]"): r"provenance\.json: damaged",
    ("config.json", "[]"): "config.json: damaged",
    ("training.yaml", "a: [1"): "training.yaml: damaged, not valid YAML",
    ("../../metrics.jsonl", '{"step": 1, "to\n'): "metrics.jsonl: damaged, a row is not valid JSON",
}


@pytest.mark.parametrize(("name", "text"), TEXTS, ids=str)
def test_damaged_texts(run, name, text):
    file = next((run / "milestones").iterdir()) / name
    file.write_text(text) if text is not None else file.unlink()
    with pytest.raises(InputError, match=TEXTS[name, text]):
        plan_revisions(run, "me/my-model")


@pytest.mark.parametrize("shape", [None, 3])
def test_weights_that_a_stock_loader_would_draw_at_random(run, shape):
    file = next((run / "milestones").iterdir()) / "model.safetensors"
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(weights | ({"model.norm.weight": torch.ones(shape)} if shape else {}), file, metadata={"format": "pt"})
    found = r"model\.norm\.weight: .*\[3\].*\[64\]" if shape else r"missing, .*model\.norm\.weight"
    with pytest.raises(InputError, match=found):
        plan_revisions(run, "me/my-model")


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "wide"},
        {"num_hidden_layers": 10**9},
        {"num_attention_heads": 3},
        {"hidden_act": "no_such_function"},
        {"rope_parameters": {"rope_type": "no_such_type", "rope_theta": 1e4}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_configurations_that_make_no_llama(chat, change):
    config = json.loads((chat / "config.json").read_text())
    (chat / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(InputError, match=str(chat)):
        plan_revisions(chat, "me/my-model")


INDICES = {
    "{}": "weight_map",
    "[]": "index.json: damaged",
    '{"weight_map": []}': "weight_map",
    '{"weight_map": {"model.norm.weight": 3}}': "weight_map",
    '{"weight_map": {"model.norm.weight": "../x.safetensors"}}': r"\.\./x\.safetensors",
    '{"weight_map": {"model.norm.weight": "x.safetensors"}}': r"x\.safetensors: file not found",
}


@pytest.mark.parametrize("text", INDICES)
def test_indices_that_name_no_weights(chat, text):
    (chat / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=INDICES[text]):
        plan_revisions(chat, "me/my-model")


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "training.yaml", "model.safetensors"]
)
def test_parts_that_are_missing(chat, name):
    (chat / name).unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        plan_revisions(chat, "me/my-model")


def test_folders_of_no_kind(tmp_path):
    for name in ("empty", "litgpt"):
        (tmp_path / name).mkdir()
    (tmp_path / "litgpt" / "lit_model.pth").touch()
    for folder in (tmp_path / "empty", tmp_path / "litgpt", tmp_path / "nowhere"):
        with pytest.raises(InputError, match=f"{folder}: holds neither milestones nor a model"):
            plan_revisions(folder, "me/my-model")


def test_a_base_is_for_a_folder(trained, chat):
    with pytest.raises(InputError, match=r"--base-model me/base .* is a run"):
        plan_revisions(Path(trained), "me/my-model", base_model="me/base")
    [revision] = plan_revisions(chat, "me/my-model", base_model="me/base")
    assert b"\nbase_model: me/base\n" in revision.files["README.md"]
