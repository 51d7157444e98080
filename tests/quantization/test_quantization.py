"""int8 and nf4: results and memory, against references; and errors of the libraries."""

import copy
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.conftest import run_here
from tests.exactness import assert_greedy
from tinyllama_hf import load
from tinyllama_hf.errors import InputError
from tinyllama_hf.quantization.quantized_model import describe_footprint, measure_footprint


pytest.importorskip("bitsandbytes")

from bitsandbytes.functional import dequantize_4bit, has_avx512bf16, quantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt


KINDS = ("int8", "nf4")
IDS = torch.arange(3, 20)[None]


def quantized_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, (Linear4bit, Linear8bitLt))}


def linear_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not n.endswith("lm_head")}


def dequantized(folder, quantization):
    """The reference: a plain fp32 model with weights that were quantized and dequantized in the dtype of the file."""
    plain, _ = load(folder)
    dtype, plain = plain.dtype, plain.float()
    for layer in linear_layers(plain).values():
        weight = layer.weight.data
        if quantization == "int8":
            rows = weight.abs().amax(dim=1, keepdim=True)  # LLM.int8: each row by its largest value
            weight.copy_((weight / rows * 127).round() * rows / 127)
        else:
            quantized = quantize_4bit(weight.to(dtype), quant_type=quantization, compress_statistics=True)
            weight.copy_(dequantize_4bit(*quantized))
    return plain


def stock_like(model, folder):
    """Loads with stock transformers and the quantization configuration of a model."""
    configuration = copy.deepcopy(model.hf_quantizer.quantization_config)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=configuration).eval()


@pytest.fixture(scope="module", params=("random", "stories", pytest.param("smollm2", marks=pytest.mark.slow)))
def any_folder(request, nano_folder):
    """A random model, one with layer widths that no fast kernel supports, and a real one."""
    if request.param == "stories":
        return request.getfixturevalue("shared") / "data" / "models" / "stories260K"
    return nano_folder if request.param == "random" else request.getfixturevalue("smollm2")


def int8_products_overflow() -> bool:
    """Returns whether torch's int8 product is wrong in this process, as it is if ONEDNN_MAX_CPU_ISA hides VNNI.

    torch (2.13) asks the processor for VNNI, and hands the product to oneDNN,
    which obeys the variable and sums in 16 bit.
    A processor without VNNI gets another path.
    """
    import bitsandbytes  # noqa: F401 (registers the operator)

    largest = torch.full((16, 64), 127, dtype=torch.int8)
    return bool((torch.ops.bitsandbytes.int8_linear_matmul(largest, largest) != 64 * 127**2).any())


# int8 also rounds the activations to 8 bits; nf4 computes in bf16 on hardware where that is fast.
@pytest.mark.parametrize(("quantization", "a_layer", "logits"), [("int8", 0.02, 0.15), ("nf4", 0.01, 0.05)])
def test_it_computes_with_the_dequantized_weights(any_folder, quantization, a_layer, logits):
    """Each layer, and the logits relative to their spread, compared with a plain product in fp32."""
    if quantization == "int8" and int8_products_overflow():
        pytest.skip("needs int8 products that do not overflow; ONEDNN_MAX_CPU_ISA hides VNNI from oneDNN alone")
    model, tokenizer = load(any_folder, quantization=quantization)
    reference = dequantized(any_folder, quantization)
    expected = linear_layers(reference)
    assert set(quantized_layers(model)) == set(expected)
    ids = torch.tensor(
        [tokenizer("Photosynthesis turns light into sugar; the leaves take it from the air.")["input_ids"]]
    )
    with torch.inference_mode():
        for name, layer in quantized_layers(model).items():
            x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0)).to(model.dtype)
            product = expected[name](x.float())
            assert (layer(x).float() - product).norm() < a_layer * product.norm(), name
        computed, product = model(ids).logits.float(), reference(ids).logits
    assert (computed - product).abs().mean() < logits * product.std()


@pytest.mark.parametrize(("quantization", "double"), [("int8", True), ("nf4", True), ("nf4", False)])
def test_equal_to_stock_transformers_with_the_same_configuration(nano_folder, quantization, double):
    model, _ = load(nano_folder, quantization=quantization, double_quantization=double)
    stock = stock_like(model, nano_folder)
    assert set(quantized_layers(model)) == set(linear_layers(stock)) and len(quantized_layers(model)) == 28
    with torch.inference_mode():
        for _ in range(2):  # the first pass without gradients repacks on processors with the fast kernel
            assert torch.equal(model(IDS).logits, stock(IDS).logits)
        caches = [m(IDS, use_cache=True).past_key_values for m in (model, stock)]
        several = [m(IDS[:, :5], past_key_values=cache) for m, cache in zip((model, stock), caches, strict=True)]
    assert torch.equal(several[0].logits, several[1].logits), "several tokens on a cache, as a draft is verified"
    greedy = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    batch = {"input_ids": IDS.repeat(3, 1), "attention_mask": torch.ones(3, 17).index_fill(0, torch.tensor(1), 1)}
    batch["attention_mask"][1, :6] = 0  # padded on the left
    for inputs in ({"input_ids": IDS}, batch):
        assert_greedy(stock, model.generate(**inputs, **greedy), inputs.get("attention_mask", torch.ones_like(IDS)))


@pytest.mark.slow
@pytest.mark.parametrize("quantization", KINDS)
def test_the_text_of_a_real_model(smollm2, quantization):
    """Compared with greedy decoding of stock transformers."""
    model, tokenizer = load(smollm2, quantization=quantization)
    stock = stock_like(model, smollm2)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    assert_greedy(stock, written, prompt["attention_mask"])
    assert "Paris" in tokenizer.decode(written[0])


@pytest.mark.parametrize("quantization", KINDS)
def test_a_quantized_draft(nano_folder, quantization):
    """Also with a quantized target: its greedy output does not change."""
    target, draft = load(nano_folder, quantization="nf4")[0], load(nano_folder, quantization=quantization)[0]
    passes = []
    draft.register_forward_hook(lambda *_: passes.append(1))
    greedy = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    assert_greedy(target, target.generate(IDS, **greedy, assistant_model=draft), torch.ones_like(IDS))
    assert passes


def test_options_of_4_bit(nano_folder):
    """The options are in the layers, and in the saved configuration."""
    for double in (True, False):
        model, _ = load(nano_folder, quantization="nf4", double_quantization=double, compute_dtype=torch.float16)
        layer = model.model.layers[0].mlp.up_proj
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, layer.compute_dtype) == ("nf4", double, torch.float16)
        saved = model.hf_quantizer.quantization_config
        assert (saved.bnb_4bit_quant_type, saved.bnb_4bit_use_double_quant) == ("nf4", double)
        assert saved.bnb_4bit_compute_dtype == torch.float16


def test_compute_dtype_decides_products_with_dequantized_weights(shared):
    """With shapes that the kernel does not support, so that only the dtype of the product differs."""
    stories = shared / "data" / "models" / "stories260K"
    models = [load(stories, quantization="nf4", compute_dtype=d)[0] for d in (torch.float32, torch.bfloat16)]
    layers = [model.model.layers[0].mlp.gate_proj for model in models]  # 172 rows
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    weight = layers[0].weight
    with torch.inference_mode():
        product = x @ dequantize_4bit(weight.data, weight.quant_state).T
        errors = [(layer(x) - product).norm() / product.norm() for layer in layers]
    assert errors[0] < 1e-6 < 1e-3 < errors[1]


@pytest.mark.parametrize("quantization", KINDS)
def test_footprint(nano_folder, quantization):
    """Counted by hand: 8 or 4 bits per weight of a linear layer except the head, plus scales; fp32 for the rest."""
    plain, _ = load(nano_folder)
    layers = linear_layers(plain).values()
    quantized = sum(layer.weight.numel() for layer in layers)
    rest = (sum(p.numel() for p in plain.parameters()) - quantized) * 4 + sum(b.nbytes for b in plain.buffers())
    assert measure_footprint(plain) == (quantized * 4 + rest, quantized * 4 + rest, 0)
    model, _ = load(nano_folder, quantization=quantization)
    before = measure_footprint(model)
    with torch.inference_mode():
        model(IDS)
    after = measure_footprint(model)
    if quantization == "int8":
        rows = sum(layer.out_features for layer in layers)
        assert before == after == (quantized + rows * 4 + rest, measure_footprint(plain).weights, 0)
    else:
        blocks = quantized // 64
        scales = before.weights - quantized // 2 - rest
        assert blocks < scales < blocks * 1.2 + 28 * 1200, "a byte a block of 64, and small tables a layer"
        # After repacking, each block has its scale in bf16 too, in addition to the one for saving.
        assert after.weights - before.weights == (2 * blocks if has_avx512bf16() else 0)
    assert model.get_memory_footprint() == after.weights
    unquantized = f"{measure_footprint(plain).weights / 1e6:.1f} MB in float32"
    line = f"{quantization}: {after.weights / 1e6:.1f} MB of weights ({unquantized})"
    assert describe_footprint(model) == line


@pytest.mark.parametrize("quantization", KINDS)
def test_accounting_of_the_unquantized_model(nano_folder, quantization):
    """Two 4-bit weights are one element of their parameter."""
    model, _ = load(nano_folder, quantization=quantization)
    assert model.flops_per_token(32) == load(nano_folder)[0].flops_per_token(32)
    assert model.kv_cache_bytes_per_token() == load(nano_folder)[0].kv_cache_bytes_per_token()


class TestTheLibrary:
    """Errors of stock transformers that `repacking` avoids. If all of these fail on a processor with AVX512_BF16,
    bitsandbytes is fixed, and `repacking` can go."""

    @pytest.fixture
    def stock(self, nano_folder):
        """nf4 with plain scales, after a forward pass in evaluation mode."""
        from bitsandbytes.functional import has_avx512bf16

        if not has_avx512bf16():
            pytest.skip("this processor has no AVX512_BF16, without which bitsandbytes repacks nothing")
        configuration = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        model = AutoModelForCausalLM.from_pretrained(nano_folder, quantization_config=configuration).eval()
        self.before = self.logits(model)
        return model

    def logits(self, model):
        with torch.inference_mode():
            return model(IDS).logits

    def damaged(self, model):
        return (self.before - self.logits(model)).abs().max() > self.before.std() / 2

    def test_some_widths_fail(self, stock, shared):
        """172 rows, during the first pass; this package uses the slow kernel for such layers."""
        stories = shared / "data" / "models" / "stories260K"
        configuration = copy.deepcopy(stock.hf_quantizer.quantization_config)
        model = AutoModelForCausalLM.from_pretrained(stories, quantization_config=configuration).eval()
        with pytest.raises(AssertionError, match="N must be divisible by block_n"):
            self.logits(model)

    def test_saving_writes_and_leaves_behind_another_model(self, stock, tmp_path):
        stock.save_pretrained(tmp_path)
        assert self.damaged(stock) and self.damaged(AutoModelForCausalLM.from_pretrained(tmp_path).eval())

    def test_dequantizing_returns_another_model(self, stock):
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


def test_int8_is_not_moved(nano_folder):
    """`to` gives each weight new memory, but nn.Module keeps the parameter with its old `CB`, which computes."""
    stock = AutoModelForCausalLM.from_pretrained(
        nano_folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    ).eval()
    weight = stock.model.layers[0].mlp.up_proj.weight
    stock._apply(copy.deepcopy)  # like a move: a new tensor for each parameter
    assert weight.CB.data_ptr() != weight.data_ptr(), "fixed in bitsandbytes: the error can go"
    model, _ = load(nano_folder, quantization="int8")
    with torch.inference_mode():
        before = model(IDS).logits
        with pytest.raises(InputError, match=r"int8 model cannot be moved .* device="):
            model.to("meta")
        assert torch.equal(model(IDS).logits, before), "no part has moved"
        assert torch.equal(model.to("cpu")(IDS).logits, before), "already on this device"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "nf5"}, "quantization 'nf5': .*nf4"),
        ({"quantization": "fp4"}, "--quantization 'fp4': .*'nf4'"),
        ({"compute_dtype": torch.bfloat16}, "compute_dtype=torch.bfloat16: only for nf4.*quantization none"),
        ({"quantization": "int8", "double_quantization": False}, "double_quantization=False: only for nf4"),
        ({"quantization": "nf4", "compute_dtype": "bf16"}, "compute_dtype 'bf16': .*use 'auto', torch.bfloat16"),
        ({"quantization": "nf4", "compute_dtype": torch.int8}, "compute_dtype torch.int8: .*use 'auto'"),
    ],
)
def test_invalid_options(nano_folder, options, message):
    with pytest.raises(InputError, match=message):
        load(nano_folder, **options)


def test_without_the_backend(nano_folder, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    done = run_here("tinyllama-hf", "generate", nano_folder, "a", "--quantization", "int8", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "error: quantization int8 needs the package bitsandbytes: pip install 'tinyllama_hf[quantization]'\n"
    )


def test_the_command_prints_the_memory(nano_folder, tmp_path):
    command = ("tinyllama-hf", "generate", nano_folder, "def", "--temperature", "0", "--max-new-tokens", "4")
    done = run_here(*command, "--quantization", "nf4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("nf4: ") and "MB of weights (12.1 MB in float32)" in done.stderr
