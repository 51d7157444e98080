"""PEFT adapters: on top for inference, and trained on quantized models, whatever was done in between."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tests.conftest import run_here
from tests.exactness import assert_greedy
from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load, load_tokenizer
from tinyllama_hf.errors import InputError
from tinyllama_hf.quantization.quantized_model import describe_footprint, measure_footprint


pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")

from bitsandbytes.functional import (
    dequantize_4bit,
    has_avx512bf16,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
    quantize_4bit,
)
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training


KINDS = ("none", "int8", "nf4")
IDS = torch.arange(3, 20)[None]
GREEDY = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def generate(model):
    return model.eval().generate(input_ids=IDS, **GREEDY)


def with_adapter(model, seed=1):
    """LoRA on every linear layer, which changes the output of the model."""
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return adapted


def trained(model, steps=3, between=lambda model: None):
    """Trains an adapter; returns its gradients in each step."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-2)
    gradients = []
    for _ in range(steps):
        between(model)
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([None if p.grad is None else p.grad.clone() for p in learned])
        optimizer.step()
        optimizer.zero_grad()
    return gradients


@pytest.fixture(scope="module", params=[pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str)
def base(request, nano_folder, tmp_path_factory):
    """The model in two dtypes; adapters stay in fp32."""
    path = tmp_path_factory.mktemp("base")
    model, tokenizer = load(nano_folder, dtype=request.param)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """Trained on the nf4 model."""
    path = tmp_path_factory.mktemp("adapter")
    model = with_adapter(load(base, quantization="nf4", trainable=True)[0])
    trained(model, between=generate)
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("quantization", KINDS)
def test_it_computes_as_stock_peft_on_the_stock_model(base, adapter, tmp_path, quantization):
    model, _ = load(base, quantization=quantization, adapter=adapter)
    assert isinstance(model, TinyLlamaForCausalLM) and not any(p.requires_grad for p in model.parameters())
    plain = load(base, quantization=quantization)[0]
    options = (
        {}
        if quantization == "none"
        else {"quantization_config": copy.deepcopy(model.hf_quantizer.quantization_config)}
    )
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **options), adapter).eval()
    for _ in range(2):
        assert torch.equal(logits(model), logits(stock))
    written = model.generate(IDS, **GREEDY)
    assert_greedy(stock, written, torch.ones_like(IDS))
    if (quantization, model.dtype) == ("none", torch.float32):
        assert torch.equal(written, stock.generate(input_ids=IDS, **GREEDY))
    assert (logits(model) - logits(plain)).abs().max() > logits(plain).std() / 10, "the adapter has an effect"
    model.save_pretrained(tmp_path / "saved")
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "saved", adapter))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    again, _ = load(base, quantization=quantization, adapter=tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.skipif(not has_avx512bf16(), reason="there is no fast path")
def test_the_fast_path_is_kept_under_an_adapter(base, adapter):
    model, _ = load(base, quantization="nf4", adapter=adapter)
    generate(model)
    layers = [module.get_base_layer() for module in model.modules() if hasattr(module, "get_base_layer")]
    assert len(layers) == 28 and all(layer._parameters["weight"].packed_state is not None for layer in layers)


@pytest.mark.parametrize("quantization", KINDS)
def test_footprint(base, adapter, quantization):
    plain, model = (load(base, quantization=quantization, adapter=on_top)[0] for on_top in (None, adapter))
    added = sum(tensor.nbytes for tensor in load_file(adapter / "adapter_model.safetensors").values())
    assert measure_footprint(model) == (
        measure_footprint(plain).weights + added,
        measure_footprint(plain).unquantized + added,
        added,
    )
    assert f"MB of weights, including an adapter of {added / 1e6:.1f} MB (" in describe_footprint(model)


@pytest.mark.parametrize("quantization", KINDS)
@pytest.mark.parametrize("trainable", [True, False], ids=["stock", "ours"])
def test_evaluating_in_between_changes_no_gradient(base, quantization, trainable):
    """Neither do generating, saving, or reading the weights. The gradients equal those of stock transformers."""

    def everything(model):
        model.eval()
        logits(model)
        generate(model)
        model.state_dict()
        copy.deepcopy(model)
        logits(model)

    def prepared(between):
        model, _ = load(base, quantization=quantization, trainable=trainable)
        assert isinstance(model, TinyLlamaForCausalLM) is not trainable
        return trained(with_adapter(prepare_model_for_kbit_training(model, False)), between=between)

    expected, found = prepared(lambda model: None), prepared(everything)
    assert len(found[0]) == 56 and all(gradient is not None for step in found for gradient in step)
    assert all(torch.equal(a, b) for steps in zip(found, expected, strict=True) for a, b in zip(*steps, strict=True))
    if quantization != "none" and trainable:
        configuration = load(base, quantization=quantization)[0].hf_quantizer.quantization_config
        stock = LlamaForCausalLM.from_pretrained(base, quantization_config=configuration)
        stock = trained(with_adapter(prepare_model_for_kbit_training(stock, False)))
        assert all(torch.equal(a, b) for steps in zip(found, stock, strict=True) for a, b in zip(*steps, strict=True))


def test_gradients_in_evaluation_mode(base):
    """The library's fused kernel would not propagate gradients."""
    model = with_adapter(load(base, quantization="nf4", trainable=True)[0])
    generate(model)
    model.eval()(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "lora_A" in n)


def test_gradient_checkpointing(base):
    """It runs layers again in the backward pass."""
    gradients = []
    for checkpointing in (False, True):
        model, _ = load(base, quantization="nf4", trainable=True)
        model = with_adapter(prepare_model_for_kbit_training(model, checkpointing))
        generate(model)
        gradients.append(trained(model, steps=1)[0])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("quantization", KINDS[1:])
def test_merging_gives_the_sum_with_the_dequantized_weights(base, quantization):
    """After training and generating; the result is quantized again, as in PEFT."""
    model = with_adapter(load(base, quantization=quantization, trainable=True)[0])
    trained(model, between=generate)
    generate(model)
    name = "base_model.model.model.layers.1.mlp.up_proj"
    layer = model.get_submodule(name)
    stock = load(base, quantization=quantization, trainable=True)[0].model.layers[1].mlp.up_proj  # never evaluated
    delta = layer.get_delta_weight("default").detach()
    merged = model.merge_and_unload()
    found = merged.model.layers[1].mlp.up_proj
    if quantization == "int8":
        total = int8_vectorwise_dequant(stock.weight.data, stock.weight.SCB) + delta
        expected, scales, _ = int8_vectorwise_quant(total.half())
        assert torch.equal(found.weight.data, expected) and torch.equal(found.weight.SCB, scales)
    else:
        total = dequantize_4bit(stock.weight.data, stock.weight.quant_state) + delta
        expected, state = quantize_4bit(total, quant_type=quantization, compress_statistics=True)
        assert torch.equal(found.weight.data, expected)
        assert torch.equal(found.weight.quant_state.absmax, state.absmax)
    before = logits(merged.eval())
    merged.state_dict()
    assert torch.equal(logits(merged), before)


def test_merging_into_plain_weights(base, adapter, tmp_path):
    """Merging without a second rounding: weights are dequantized before the adapter is merged."""
    model, tokenizer = load(base, quantization="nf4", trainable=True)
    weight = model.model.layers[0].mlp.up_proj.weight
    expected = dequantize_4bit(weight.data, weight.quant_state).clone()
    generate(model)
    merged = PeftModel.from_pretrained(model.dequantize(), adapter)
    delta = merged.get_submodule("base_model.model.model.layers.0.mlp.up_proj").get_delta_weight("default").detach()
    merged = merged.merge_and_unload()
    assert torch.equal(merged.model.layers[0].mlp.up_proj.weight, (expected + delta).to(expected.dtype))
    merged.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)[0]), logits(merged))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_training_continues(base, adapter, quantization):
    """Only the adapter is trained, with the same steps as without the interruption."""
    model, _ = load(base, quantization=quantization, adapter=adapter, trainable=True)
    assert isinstance(model, PeftModel) and isinstance(model.get_base_model(), LlamaForCausalLM)
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in model.named_parameters())
    stock = PeftModel.from_pretrained(
        load(base, quantization=quantization, trainable=True)[0], adapter, is_trainable=True
    )
    found, expected = trained(model, between=generate), trained(stock)
    assert all(torch.equal(a, b) for steps in zip(found, expected, strict=True) for a, b in zip(*steps, strict=True))


def test_the_call_of_transformers_rounds_an_adapter(nano_folder, tmp_path):
    """transformers 5.23 casts it to the compute dtype, unlike `add_adapter`, which calls PEFT for that reason."""
    model = with_adapter(load(nano_folder, quantization="nf4", trainable=True, compute_dtype=torch.bfloat16)[0])
    model.save_pretrained(tmp_path)
    stock, _ = load(nano_folder, quantization="nf4", compute_dtype=torch.bfloat16)
    stock.load_adapter(str(tmp_path))
    assert {p.dtype for n, p in stock.named_parameters() if "lora_" in n} == {torch.bfloat16}
    assert not torch.equal(logits(stock), logits(load(nano_folder, quantization="nf4", adapter=tmp_path)[0]))


@pytest.fixture
def broken(nano_folder, tmp_path):
    with_adapter(load(nano_folder)[0]).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change_weights(folder, change):
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def change_config(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


NAME = "base_model.model.model.layers.{}.mlp.up_proj.lora_A.weight"
BROKEN = {
    "no adapter": (lambda f: (f / "adapter_config.json").unlink(), "holds no adapter_config.json"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
    "damaged configuration": (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json: damaged"),
    "damaged weights": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x"), "does not fit this model"),
    "a weight is missing": (
        lambda f: change_weights(f, lambda w: w.pop(NAME.format(0))),
        r"1 weights are missing, .*layers\.0\.mlp\.up_proj\.lora_A\.weight",
    ),
    "more layers": (
        lambda f: change_weights(f, lambda w: w.update({NAME.format(4): w[NAME.format(0)].clone()})),
        r"1 weights belong to no layer of this model, .*layers\.4\.mlp\.up_proj\.lora_A\.weight",
    ),
    "other widths": (
        lambda f: change_weights(f, lambda w: w.update({NAME.format(0): w[NAME.format(0)][:, 1:].clone()})),
        "does not fit this model .*size mismatch",
    ),
    "other layers": (lambda f: change_config(f, target_modules=["query"]), "does not fit this model .*'query'"),
    "an unknown kind": (lambda f: change_config(f, peft_type="MAGIC"), "does not fit this model .*MAGIC"),
}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_adapters_that_cannot_be_used(nano_folder, broken, quantization, damage, message):
    damage(broken)
    with pytest.raises(InputError, match=message):
        load(nano_folder, quantization=quantization, adapter=broken)


def test_the_folder_above_the_adapters(nano_folder, broken):
    """A fine-tuned model contains its adapter in a subfolder."""
    with pytest.raises(InputError, match=r"not a PEFT adapter; did you mean .*adapter\?"):
        load(nano_folder, adapter=broken.parent)


def test_the_command(tmp_path, tokenizer_folder):
    model = TinyLlamaForCausalLM(TinyLlamaConfig.preset("micro", vocab_size=512, max_position_embeddings=64))
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(tokenizer_folder).save_pretrained(tmp_path / "model")
    with_adapter(load(tmp_path / "model", quantization="nf4", trainable=True)[0]).save_pretrained(tmp_path / "adapter")
    arguments = ("--temperature", "0", "--max-new-tokens", "8", "--quantization", "nf4")
    done = run_here("tinyllama-hf", "generate", "model", "def", *arguments, "--adapter", "adapter", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    adapted, tokenizer = load(tmp_path / "model", quantization="nf4", adapter=tmp_path / "adapter")
    ids = adapted.generate(**tokenizer("def", return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert done.stdout.strip() == tokenizer.decode(ids[0], skip_special_tokens=True).strip()
    assert "including an adapter of" in done.stderr and "warn" not in done.stderr.lower()
