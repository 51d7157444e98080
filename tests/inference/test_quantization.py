"""int8 and nf4: what they compute, how much memory they take, and that what the library would corrupt is refused."""

import copy
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load, load_tokenizer
from tinyllama_hf.errors import InputError
from tinyllama_hf.inference.quantization import footprint, footprint_line


KINDS = ("int8", "nf4")
IDS = torch.arange(3, 20)[None]


@pytest.fixture(scope="module")
def folder(tokenizer_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    TinyLlamaForCausalLM(TinyLlamaConfig.preset("nano", vocab_size=512, max_position_embeddings=64)).save_pretrained(
        path
    )
    load_tokenizer(tokenizer_folder).save_pretrained(path)
    return path


def linear_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not n.endswith("lm_head")}


def dequantized(folder, quantization):
    """The reference: a plain fp32 model whose weights went through the library's quantise and dequantise."""
    import bitsandbytes.functional as F

    plain, _ = load(folder, dtype=torch.float32)
    for layer in linear_layers(plain).values():
        weight = layer.weight.data
        if quantization == "nf4":
            weight.copy_(F.dequantize_4bit(*F.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)))
        else:
            rows = weight.abs().amax(dim=1, keepdim=True)  # LLM.int8: each row by its largest value
            weight.copy_((weight / rows * 127).round() * rows / 127)
    return plain


@pytest.mark.parametrize(("quantization", "tolerance"), [("int8", 0.03), ("nf4", 0.03)])
def test_logits_are_those_of_dequantised_weights(folder, quantization, tolerance):
    """Within what bf16 and 8-bit activations cost, relative to the spread of the logits; and far from unquantised ones."""
    model, _ = load(folder, quantization=quantization)
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        ours, reference = model(ids).logits.float(), dequantized(folder, quantization)(ids).logits
        plain = load(folder)[0](ids).logits
    spread = reference.std()
    assert (ours - reference).abs().mean() < tolerance * spread
    if quantization == "nf4":
        assert (ours - plain).abs().mean() > 2 * (ours - reference).abs().mean()


@pytest.mark.parametrize("quantization", KINDS)
def test_equal_to_stock_transformers_with_the_same_configuration(folder, quantization):
    model, _ = load(folder, quantization=quantization)
    configuration = model.hf_quantizer.quantization_config
    stock = AutoModelForCausalLM.from_pretrained(folder, quantization_config=copy.deepcopy(configuration)).eval()
    assert len(linear_layers(model)) == 28 and all(
        "bitsandbytes" in type(m).__module__ for m in linear_layers(model).values()
    )
    with torch.inference_mode():
        for _ in range(2):  # the first pass without gradients repacks, where the processor has the fast path
            assert torch.equal(model(IDS).logits, stock(IDS).logits)
    greedy = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **greedy), stock.generate(IDS, **greedy))


def test_nf4_quantises_its_scales(folder):
    configuration = load(folder, quantization="nf4")[0].hf_quantizer.quantization_config
    assert configuration.bnb_4bit_use_double_quant and configuration.bnb_4bit_quant_type == "nf4"


def test_footprint(folder):
    """Counted by hand: 4 bits or 1 byte for each weight of a linear layer but the head, the scales on top, the rest fp32."""
    plain, _ = load(folder)
    quantised = sum(layer.weight.numel() for layer in linear_layers(plain).values())
    rest = (sum(p.numel() for p in plain.parameters()) - quantised) * 4 + sum(b.nbytes for b in plain.buffers())
    assert footprint(plain) == (quantised * 4 + rest, quantised * 4 + rest)
    rows = sum(layer.out_features for layer in linear_layers(plain).values())
    int8 = footprint(load(folder, quantization="int8")[0])
    assert int8 == (quantised + rows * 4 + rest, footprint(plain).weights)
    nf4 = footprint(load(folder, quantization="nf4")[0])
    scales = nf4.weights - quantised // 2 - rest
    assert quantised // 64 < scales < quantised // 64 * 1.2 + 28 * 1200, (
        "a byte a block of 64, and small tables a layer"
    )
    assert (
        footprint_line(plain, "none")
        == f"none: {(quantised * 4 + rest) / 1e6:.1f} MB of weights ({(quantised * 4 + rest) / 1e6:.1f} MB in float32)"
    )


@pytest.mark.parametrize("quantization", KINDS)
def test_what_would_be_damaged_is_refused(folder, tmp_path, quantization):
    model, _ = load(folder, quantization=quantization)
    with torch.inference_mode():
        before = model(IDS).logits
    for attempt, what in (
        (lambda: model.save_pretrained(tmp_path / "out"), "saved"),
        (lambda: model.save_as_llama(tmp_path / "out"), "saved"),
        (model.train, "trained"),
        (model.state_dict, "read out"),
        (lambda: torch.save(model.state_dict(), tmp_path / "out"), "read out"),
    ):
        with pytest.raises(InputError, match=f"a quantised model is for inference and cannot be {what}: "):
            attempt()
    assert not (tmp_path / "out").exists()
    with torch.inference_mode():
        assert torch.equal(model.eval()(IDS).logits, before)


def test_an_adapter_cannot_be_trained_on_it(folder):
    """PEFT wraps the model; whoever then switches to training, as Trainer does first, is stopped."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        load(folder, quantization="nf4")[0], LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    )
    with pytest.raises(InputError, match="cannot be trained: fine-tune the unquantised model"):
        model.train()


def has_fast_path() -> bool:
    from bitsandbytes.functional import has_avx512bf16

    return has_avx512bf16()


def test_the_librarys_own_behaviour_that_the_refusals_are_for(folder, tmp_path):
    """Stock, nf4 without quantised scales: after a pass, saving writes and leaves behind another model.

    When this fails on a processor with AVX512_BF16, the library is repaired and the refusals can go.
    """
    if not has_fast_path():
        pytest.skip("this processor has no AVX512_BF16, without which bitsandbytes repacks nothing")
    configuration = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    stock = AutoModelForCausalLM.from_pretrained(folder, quantization_config=configuration).eval()
    with torch.inference_mode():
        before = stock(IDS).logits
        stock.save_pretrained(tmp_path)
        after = stock(IDS).logits
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()(IDS).logits
    spread = before.std()
    assert (before - after).abs().max() > spread / 2 and (before - reloaded).abs().max() > spread / 2


def test_unknown_and_already_quantised(folder, tmp_path):
    with pytest.raises(InputError, match="quantization 'nf5': there is none of this name; did you mean 'nf4'"):
        load(folder, quantization="nf5")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    text = (tmp_path / "config.json").read_text().rstrip().removesuffix("}")
    (tmp_path / "config.json").write_text(text + ', "quantization_config": {"quant_method": "bitsandbytes"}}')
    for quantization in ("none", "nf4"):
        with pytest.raises(InputError, match="the weights are quantised already"):
            load(tmp_path, quantization=quantization)


def test_without_the_backend(folder):
    code = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        f"sys.argv = ['tinyllama-hf', 'generate', {str(folder)!r}, 'a', '--quantization', 'int8']\n"
        "from tinyllama_hf_cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "error: quantization int8 needs the package bitsandbytes: pip install 'tinyllama_hf[quantization]'\n"
    )
