"""Damaged and incomplete folders end in one error, never in a model with random weights."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load, load_tokenizer
from tinyllama_hf.errors import InputError
from tinyllama_hf.evaluation.models import describe_model, load_eval_model
from tinyllama_hf.inference.load import load_stock


@pytest.fixture
def folder(tokenizer_folder, tmp_path):
    model = TinyLlamaForCausalLM(TinyLlamaConfig.preset("micro", vocab_size=512, max_position_embeddings=64))
    model.save_pretrained(tmp_path)
    load_tokenizer(tokenizer_folder).save_pretrained(tmp_path)
    return tmp_path


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors"])
def test_cut_files(folder, name):
    cut(folder / name)
    with pytest.raises(InputError, match=r"damaged|cannot be loaded"):
        load(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    for loader in (load, load_stock):
        with pytest.raises(InputError, match="cannot be loaded"):
            loader(folder)


def test_no_configuration(folder):
    (folder / "config.json").unlink()
    for loader in (load, load_stock):
        with pytest.raises(InputError, match=r"holds no config\.json|cannot be loaded"):
            loader(folder)


def test_a_missing_weight_is_not_drawn_at_random(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for loader in (load, load_stock):
        with pytest.raises(InputError, match=r"1 weights are missing, .* model\.layers\.1\.mlp\.up_proj\.weight"):
            loader(folder)


def test_both_loaders_agree(folder):
    ids = torch.arange(3, 20)[None]
    (ours, _), (stock, _) = load(folder), load_stock(folder)
    assert torch.equal(ours(ids).logits, stock(ids).logits)
    assert (type(ours).__name__, type(stock).__name__) == ("TinyLlamaForCausalLM", "LlamaForCausalLM")


@pytest.mark.slow
def test_code_in_a_folder_is_never_run(tmp_path):
    """Even if a user would answer yes to the question of transformers."""
    fields = {
        "model_type": "evil",
        "architectures": ["Evil"],
        "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "evil.py").write_text("open('canary', 'w').close()\nclass Evil: pass\n")
    for call in ("load.load_stock(pathlib.Path('.'))", "TinyLlamaForCausalLM.from_pretrained('.')"):
        imports = (
            "import pathlib\nfrom tinyllama_hf import TinyLlamaForCausalLM\nfrom tinyllama_hf.inference import load"
        )
        script = f"{imports}\n{call}"
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, input="y\n" * 5, capture_output=True, text=True
        )
        assert done.returncode != 0 and "y/N" not in done.stdout, done.stderr
        assert "trust_remote_code" in done.stderr or "model_type 'evil'" in done.stderr, done.stderr
    assert not (tmp_path / "canary").exists()


EVIL = "evil-org/evil-kernel"
FIELDS = {
    "attn_implementation": EVIL,
    "_attn_implementation": EVIL,
    "_attn_implementation_internal": EVIL,
    "kernel_config": {"RMSNorm": f"{EVIL}:RMSNorm"},
    "use_kernels": True,
    "custom_generate": EVIL,
    "auto_map": {"AutoConfig": f"{EVIL}--evil.Evil", "AutoModelForCausalLM": f"{EVIL}--evil.Evil"},
}
LOADERS = {
    "load": load,
    "training": lambda folder: load(folder, trainable=True),
    "stock": load_stock,
    "evaluation": lambda folder: load_eval_model(describe_model(folder)),
}


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_no_field_chooses_code(folder, loader):
    """Kernels and classes of a Hub repository, which transformers would download and run."""
    ids = torch.arange(3, 20)[None]
    expected = loader(folder)[0](ids).logits
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(fields | FIELDS))
    model, _ = loader(folder)
    assert model.config._attn_implementation == "sdpa" and torch.equal(model(ids).logits, expected)
    assert model.generate(ids, max_new_tokens=2, min_new_tokens=2).shape == (1, 19)


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_a_model_folder_with_an_adapters_configuration(folder, loader):
    """transformers would load the base model that it names."""
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "evil-org/evil"}))
    with pytest.raises(InputError, match=r"adapter_config\.json, an adapter for 'evil-org/evil'"):
        loader(folder)
