"""Merged models: the logits of the trained model in every kind of adapter, and a folder that others read."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM

from tests.conftest import run_here
from tests.inference.conftest import CASES, NEW_TOKENS, ROWS, TEMPLATE, trained
from tinyllama_hf import load, load_tokenizer
from tinyllama_hf.conversion.convert import convert
from tinyllama_hf.errors import InputError
from tinyllama_hf.inference import merge
from tinyllama_hf.inference.merge import merge_adapter
from tinyllama_hf.provenance import file_sha256


pytest.importorskip("peft")

from peft import LoraConfig, PrefixTuningConfig, get_peft_model


def logits(model, ids):
    with torch.no_grad():
        return model.float()(ids).logits


@pytest.mark.parametrize(("kind", "resized"), CASES, ids=[f"{kind}{', resized' * r}" for kind, r in CASES])
def test_logits_of_the_trained_model(base, tmp_path, kind, resized):
    adapted = trained(base, kind, resized, tmp_path / "adapter")
    rows = ROWS + resized * len(NEW_TOKENS)
    ids = torch.tensor([[1, 3, 4, *range(50, 60), rows - 1, rows - 2]])
    merged = merge_adapter(base, tmp_path / "adapter", tmp_path / "out")
    assert merged.difference < 1e-5 < 0.01 < merged.effect and merged.trained_on == str(base)
    expected = logits(adapted, ids)
    for model in (load(tmp_path / "out")[0], AutoModelForCausalLM.from_pretrained(tmp_path / "out")):
        assert (logits(model, ids) - expected).abs().max() < 1e-5 * expected.abs().max()
    tokenizer = load_tokenizer(tmp_path / "out")
    assert (len(tokenizer), tokenizer.chat_template) == (rows, TEMPLATE if resized else None)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"]) == ("llama", rows)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] and config.get("pad_token_id") is None
    is_tied = AutoModelForCausalLM.from_pretrained(base).config.tie_word_embeddings
    # An adapter on the embeddings or the output matrix makes them different.
    assert config["tie_word_embeddings"] == (is_tied and kind not in ("embeddings", "whole embeddings"))


@pytest.fixture
def adapter(base, tmp_path):
    trained(base, "plain", False, tmp_path / "adapter")
    return tmp_path / "adapter"


def in_dtype(base, dtype, folder):
    LlamaForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_sum_is_rounded_once(base, adapter, tmp_path, name, dtype):
    """In the base's dtype, or the one that is asked for."""
    half = in_dtype(base, dtype, tmp_path / "half")
    layer = "model.layers.1.self_attn.q_proj"
    for source, asked, expected in ((half, "auto", dtype), (half, "fp32", torch.float32), (base, name, dtype)):
        merged = merge_adapter(source, adapter, tmp_path / "out", dtype=asked, overwrite=True)
        assert merged.dtype == expected and merged.difference < (1e-5 if asked == "fp32" else 0.02)
        model = load(source, torch.float32, adapter=adapter, trainable=True)[0]
        wrapped = model.get_submodule(f"base_model.model.{layer}")
        exact = wrapped.get_base_layer().weight + wrapped.get_delta_weight("default")
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").get_submodule(layer).weight
        assert found.dtype == expected and torch.equal(found, exact.to(expected))


def test_an_adapter_of_a_quantized_model(base, tmp_path):
    """It is merged into the model that was quantized; the quantized folder is refused, with that model's name."""
    pytest.importorskip("bitsandbytes")
    model, tokenizer = load(base, quantization="nf4", trainable=True)
    model.save_pretrained(tmp_path / "nf4")
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    merged = merge_adapter(base, tmp_path / "adapter", tmp_path / "out")
    assert merged.difference < 1e-5 and merged.effect > 0.1
    refused = r"model .*nf4: its weights are quantized.* Give the model that was quantized"
    with pytest.raises(InputError, match=f"{refused}$"):
        merge_adapter(tmp_path / "nf4", tmp_path / "adapter", tmp_path / "new")
    tokenizer.save_pretrained(tmp_path / "nf4")
    (tmp_path / "nf4" / "provenance.json").write_text(json.dumps({"conversion": {"source": "my-base"}}))
    with pytest.raises(InputError, match=f"{refused}, my-base$"):
        merge_adapter(tmp_path / "nf4", tmp_path / "adapter", tmp_path / "new")


class TestFolder:
    def test_ends_of_the_adapters_tokenizer(self, base, tmp_path):
        """Generation stops at the end-of-sequence of both, with the other settings of the base."""
        source = in_dtype(base, torch.float32, tmp_path / "source")
        GenerationConfig(eos_token_id=2, repetition_penalty=1.5).save_pretrained(source)
        trained(source, "plain", True, tmp_path / "adapter")
        tokenizer = load_tokenizer(tmp_path / "adapter")
        tokenizer.eos_token = "<|im_end|>"
        tokenizer.save_pretrained(tmp_path / "adapter")
        merge_adapter(source, tmp_path / "adapter", tmp_path / "out")
        found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
        assert found["eos_token_id"] == [2, ROWS + 1] and found["repetition_penalty"] == 1.5
        assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2, ROWS + 1]

    def test_tokenizer_model(self, base, adapter, tmp_path):
        """The adapter's tokenizer has only JSON, as libraries save it; other merges are not given the base's file."""
        (adapter / "tokenizer.model").unlink()
        merge_adapter(base, adapter, tmp_path / "out")
        assert file_sha256(tmp_path / "out" / "tokenizer.model") == file_sha256(base / "tokenizer.model")
        state = json.loads((adapter / "tokenizer.json").read_text())
        state["model"]["merges"].reverse()
        (adapter / "tokenizer.json").write_text(json.dumps(state))
        merge_adapter(base, adapter, tmp_path / "out", overwrite=True)
        assert not (tmp_path / "out" / "tokenizer.model").exists()

    def test_provenance(self, base, adapter, tmp_path):
        """Hashes of base, adapter and result, which a conversion of the result checks and carries."""
        merged = merge_adapter(base, adapter, tmp_path / "out", dtype="bf16")
        record = json.loads((tmp_path / "out" / "provenance.json").read_text())
        found = record["merge"]
        assert found["base"]["sha256"] == {"model.safetensors": file_sha256(base / "model.safetensors")}
        weights = "adapter_model.safetensors"
        assert found["adapter"] == {"path": str(adapter), "sha256": {weights: file_sha256(adapter / weights)}}
        logits = {"difference": merged.difference, "effect": merged.effect}
        assert (found["dtype"], found["logits"]) == ("bfloat16", logits)
        assert record["sha256"] == {"model.safetensors": file_sha256(tmp_path / "out" / "model.safetensors")}
        convert(tmp_path / "out", "llama", tmp_path / "copy")
        copied = json.loads((tmp_path / "copy" / "provenance.json").read_text())
        assert copied["converted_from"] == record


class TestRefusals:
    @pytest.fixture(autouse=True)
    def nothing_is_written(self, tmp_path):
        yield
        assert not [path for path in tmp_path.iterdir() if "out" in path.name]

    def test_another_base(self, base, nano_folder, adapter, tmp_path):
        """Other shapes; and equal shapes with other weights, if a fine-tuning run recorded those it began with."""
        with pytest.raises(InputError, match=f"trained on .*{base.name}"):
            merge_adapter(nano_folder, adapter, tmp_path / "out")
        hashes = {"model.safetensors": file_sha256(base / "model.safetensors")}
        record = {"base_model": {"path": "my-base", "sha256": hashes}}
        other = in_dtype(base, torch.bfloat16, tmp_path / "other")
        for place in (adapter, adapter.parent):
            (place / "provenance.json").write_text(json.dumps(record))
            with pytest.raises(InputError, match=r"trained on 'my-base', and .*other has weights with other hashes"):
                merge_adapter(other, adapter, tmp_path / "out")
            merge_adapter(base, adapter, tmp_path / "fine", overwrite=True)
            (place / "provenance.json").unlink()

    def test_another_result(self, base, adapter, tmp_path, monkeypatch):
        """If a layer is not merged, or not saved as merged, the logits tell."""
        save = merge._save

        def changed(model, *rest):
            model.model.layers[1].self_attn.v_proj.weight.data *= 1.01
            save(model, *rest)

        monkeypatch.setattr(merge, "_save", changed)
        with pytest.raises(InputError, match=r"merged in float32, the logits differ by 0\.\d+ .*at most 0.0001"):
            merge_adapter(base, adapter, tmp_path / "out")

    def test_rounding_that_hides_the_adapter(self, base, tmp_path):
        model = LlamaForCausalLM.from_pretrained(base)
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False))
        for name, parameter in adapted.named_parameters():
            parameter.data *= 1e-3 if "lora_B" in name else 1
        adapted.save_pretrained(tmp_path / "adapter")
        with pytest.raises(InputError, match=r"merged in bfloat16, .*the adapter itself .* Use --dtype fp32"):
            merge_adapter(base, tmp_path / "adapter", tmp_path / "out", dtype="bf16")
        merge_adapter(base, tmp_path / "adapter", tmp_path / "fine")

    def test_values_that_are_not_finite(self, base, adapter, tmp_path):
        source = in_dtype(base, torch.float32, tmp_path / "source")
        model = LlamaForCausalLM.from_pretrained(source)
        model.lm_head.weight.data[5] = 1e30
        model.save_pretrained(source)
        with pytest.raises(InputError, match=r"merged in float16, the logits differ by nan .* Use --dtype fp32"):
            merge_adapter(source, adapter, tmp_path / "out", dtype="fp16")

    def test_an_adapter_without_weights_of_layers(self, base, tmp_path):
        options = {"num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}
        model = get_peft_model(LlamaForCausalLM.from_pretrained(base), PrefixTuningConfig(**options))
        model.save_pretrained(tmp_path / "adapter")
        with pytest.raises(InputError, match="PREFIX_TUNING"):
            merge_adapter(base, tmp_path / "adapter", tmp_path / "out")

    def test_an_adapter_that_is_not_always_active(self, base, tmp_path):
        """Activated LoRA begins at a token of the prompt."""
        options = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "alora_invocation_tokens": [5]}
        get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(**options)).save_pretrained(tmp_path / "a")
        with pytest.raises(InputError, match=r"adapter .*a: cannot be merged"):
            merge_adapter(base, tmp_path / "a", tmp_path / "out")


def test_the_command(base, adapter, tmp_path):
    words = ("tinyllama-hf", "merge", base, "adapter", "--output", "out")
    done = run_here(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"trained on {base}" in done.stdout and "wrote out: torch.float32" in done.stdout
    again = run_here(*words, cwd=tmp_path)
    assert again.returncode == 2 and "--output out: already exists" in again.stderr
    done = run_here(*words, "--overwrite", "--dtype", "bf16", cwd=tmp_path)
    assert done.returncode == 0 and "wrote out: torch.bfloat16" in done.stdout
    done = run_here("tinyllama-hf", "merge", base, "adapter", "--output", "adapter", "--overwrite", cwd=tmp_path)
    assert done.returncode == 2 and "--output adapter: " in done.stderr
