"""int8 and nf4: what they compute, how much memory they take, and that what the library would corrupt is refused."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load, load_tokenizer
from tinyllama_hf.errors import InputError
from tinyllama_hf.inference.generation import generate_text
from tinyllama_hf.inference.quantization import SealedLinear, footprint, footprint_line


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


def sealed_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, SealedLinear)}


def linear_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not n.endswith("lm_head")}


def dequantized(folder, quantization):
    """The reference: a plain fp32 model whose weights went through quantise and dequantise from the file's type."""
    import bitsandbytes.functional as F

    plain, _ = load(folder)
    dtype, plain = plain.dtype, plain.float()
    for layer in linear_layers(plain).values():
        weight = layer.weight.data
        if quantization == "nf4":
            quantised = F.quantize_4bit(weight.to(dtype), quant_type="nf4", compress_statistics=True)
            weight.copy_(F.dequantize_4bit(*quantised))
        else:
            rows = weight.abs().amax(dim=1, keepdim=True)  # LLM.int8: each row by its largest value
            weight.copy_((weight / rows * 127).round() * rows / 127)
    return plain


@pytest.fixture(scope="module", params=("random", "stories", "smollm2"))
def any_folder(request, folder):
    """A random model, one with layers of a width that no fast path fits, and a real one."""
    if request.param == "stories":
        return request.getfixturevalue("shared") / "data" / "models" / "stories260K"
    return folder if request.param == "random" else request.getfixturevalue("smollm2")


# int8 rounds the activations to 8 bits too; nf4 computes in bf16 where that is fast.
@pytest.mark.parametrize(("quantization", "a_layer", "logits"), [("int8", 0.02, 0.15), ("nf4", 0.01, 0.05)])
def test_it_computes_with_the_dequantised_weights(any_folder, quantization, a_layer, logits):
    """Every layer by itself, and the logits relative to their spread, against a plain product in fp32."""
    model, tokenizer = load(any_folder, quantization=quantization)
    reference = dequantized(any_folder, quantization)
    expected = linear_layers(reference)
    assert set(sealed_layers(model)) == set(expected)
    ids = torch.tensor(
        [tokenizer("Photosynthesis turns light into sugar; the leaves take it from the air.")["input_ids"]]
    )
    with torch.inference_mode():
        for name, layer in sealed_layers(model).items():
            x = torch.randn(5, layer.layer.in_features, generator=torch.Generator().manual_seed(0)).to(model.dtype)
            product = expected[name](x.float())
            assert (layer(x).float() - product).norm() < a_layer * product.norm(), name
        computed, product = model(ids).logits.float(), reference(ids).logits
    assert (computed - product).abs().mean() < logits * product.std()


@pytest.mark.parametrize("quantization", KINDS)
def test_equal_to_stock_transformers_with_the_same_configuration(folder, quantization):
    model, _ = load(folder, quantization=quantization)
    configuration = model.hf_quantizer.quantization_config
    stock = AutoModelForCausalLM.from_pretrained(folder, quantization_config=copy.deepcopy(configuration)).eval()
    assert set(sealed_layers(model)) == set(linear_layers(stock)) and len(sealed_layers(model)) == 28
    with torch.inference_mode():
        for _ in range(2):  # the first pass without gradients repacks, where the processor has the fast path
            assert torch.equal(model(IDS).logits, stock(IDS).logits)
    greedy = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **greedy), stock.generate(IDS, **greedy))


@pytest.mark.parametrize("quantization", KINDS)
def test_the_text_of_a_real_model_is_stock_transformers(smollm2, quantization):
    model, tokenizer = load(smollm2, quantization=quantization)
    configuration = copy.deepcopy(model.hf_quantizer.quantization_config)
    stock = AutoModelForCausalLM.from_pretrained(smollm2, quantization_config=configuration).eval()
    texts = [generate_text(m, tokenizer, "The capital of France is", 24, temperature=0) for m in (model, stock)]
    assert texts[0] == texts[1] and "Paris" in texts[0]


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
    nf4_model, _ = load(folder, quantization="nf4")
    nf4 = footprint(nf4_model)
    nf4_model(IDS)  # repacks, where the processor has the fast path
    assert nf4_model.get_memory_footprint() <= nf4.weights * 1.02
    scales = nf4.weights - quantised // 2 - rest
    assert quantised // 64 < scales < quantised // 64 * 1.2 + 28 * 1200, (
        "a byte a block of 64, and small tables a layer"
    )
    assert (
        footprint_line(plain, "none")
        == f"none: {(quantised * 4 + rest) / 1e6:.1f} MB of weights ({(quantised * 4 + rest) / 1e6:.1f} MB in float32)"
    )


REFUSED = {
    "train": (lambda model, out: model.train(), "trained"),
    "train a part": (lambda model, out: model.model.layers[0].train(), "trained"),
    "ask for gradients": (lambda model, out: asks_for_gradients(model), "trained"),
    "save": (lambda model, out: model.save_pretrained(out), "saved"),
    "save as Llama": (lambda model, out: model.save_as_llama(out), "saved"),
    "publish": (lambda model, out: model.push_to_hub("me/x"), "saved"),
    "state_dict": (lambda model, out: model.state_dict(), "read out"),
    "state_dict of a part": (lambda model, out: model.model.state_dict(), "read out"),
    "dequantize": (lambda model, out: model.dequantize(), "read out"),
    "pickle": (lambda model, out: torch.save(model, io.BytesIO()), "copied"),
    "copy": (lambda model, out: copy.deepcopy(model), "copied"),
}


def asks_for_gradients(model):
    """In evaluation mode, where nothing else would tell."""
    model(IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize("quantization", KINDS)
def test_what_would_be_damaged_is_refused(folder, tmp_path, quantization):
    model, _ = load(folder, quantization=quantization)
    before = model(IDS).logits
    for attempt, what in REFUSED.values():
        with pytest.raises(InputError, match=f"a quantised model is for inference and cannot be {what}: "):
            attempt(model, tmp_path / "out")
        assert torch.equal(model.eval()(IDS).logits, before), "the refusal itself changed it"
    assert not (tmp_path / "out").exists()
    assert torch.equal(model.to("cpu")(IDS).logits, before), "it is there already"
    with pytest.raises(InputError, match=r"cannot be moved: load it with device="):
        model.to("meta")
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, before), "no part of it has moved"
    with pytest.raises(InputError, match=r"cannot be trained"):
        model.flops_per_token(32)


def test_adapters_do_not_get_under_the_seal(folder):
    """PEFT finds no layer that it would wrap, train without gradients or merge into; nor does its preparation help."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    for modules, message in ((["q_proj"], "SealedLinear.* is not supported"), ("all-linear", "No `target_modules`")):
        with pytest.raises(ValueError, match=message):
            get_peft_model(
                load(folder, quantization="nf4")[0], LoraConfig(target_modules=modules, task_type="CAUSAL_LM")
            )
    with pytest.raises(InputError, match="cannot be trained: fine-tune the unquantised model"):
        asks_for_gradients(prepare_model_for_kbit_training(load(folder, quantization="nf4")[0]))


class TestTheLibrary:
    """What the refusals are for, in stock transformers. Where one of these fails on a processor with AVX512_BF16,
    bitsandbytes is repaired in that point, and the refusal of it can go."""

    @pytest.fixture
    def stock(self, folder):
        """nf4 without quantised scales, after a pass in evaluation mode."""
        from bitsandbytes.functional import has_avx512bf16

        if not has_avx512bf16():
            pytest.skip("this processor has no AVX512_BF16, without which bitsandbytes repacks nothing")
        configuration = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=configuration).eval()
        self.before = self.logits(model)
        return model

    def logits(self, model):
        with torch.inference_mode():
            return model(IDS).logits

    def damaged(self, model):
        return (self.before - self.logits(model)).abs().max() > self.before.std() / 2

    def test_some_widths_fail(self, stock, shared):
        """172 rows, in the middle of the first pass; ours takes the slow path for such layers."""
        stories = shared / "data" / "models" / "stories260K"
        configuration = copy.deepcopy(stock.hf_quantizer.quantization_config)
        model = AutoModelForCausalLM.from_pretrained(stories, quantization_config=configuration).eval()
        with pytest.raises(AssertionError, match="N must be divisible by block_n"):
            self.logits(model)

    def test_saving_writes_and_leaves_behind_another_model(self, stock, tmp_path):
        stock.save_pretrained(tmp_path)
        assert self.damaged(stock) and self.damaged(AutoModelForCausalLM.from_pretrained(tmp_path).eval())

    def test_dequantising_returns_another_model(self, stock):
        assert self.damaged(stock.dequantize())

    def test_merging_an_adapter_that_does_nothing_returns_another_model(self, stock):
        from peft import LoraConfig, get_peft_model

        adapted = get_peft_model(stock, LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        assert not self.damaged(adapted)
        assert self.damaged(adapted.merge_and_unload())

    def test_no_gradient_passes(self, stock):
        from peft import LoraConfig, get_peft_model

        adapted = get_peft_model(stock, LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")).train()
        adapted(IDS, labels=IDS).loss.backward()
        adapters = {name: p for name, p in adapted.named_parameters() if "lora_" in name}
        assert len(adapters) == 16 and all(p.grad is None for p in adapters.values())


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
