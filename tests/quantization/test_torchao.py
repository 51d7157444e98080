"""int4 and fp8 of torchao: loaded, saved, loaded again and counted, against dequantized weights and torchao's tensors.

They need an NVIDIA GPU. Here they run on a CPU: torchao's and our checks of the device are off, fp8 runs torch's own
kernel for CPUs, and int4, which has none, a slow one that is written below. It stores a weight in as many bytes as the
GPU's, in another order. What is shown about loading, saving and sizes holds on a GPU, the kernels are not shown. The
last test runs them where there is a GPU.
"""

import json
import shutil
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tests.conftest import run_here
from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load, load_tokenizer
from tinyllama_hf.conversion.convert import convert
from tinyllama_hf.errors import InputError
from tinyllama_hf.evaluation.models import describe_model, load_eval_model
from tinyllama_hf.hub.publish import plan_revisions
from tinyllama_hf.inference.load import load_stock
from tinyllama_hf.planning.inference_memory import Setup, weight_bytes
from tinyllama_hf.planning.named_architecture import find_architecture
from tinyllama_hf.quantization import torchao as own
from tinyllama_hf.quantization.quantized_model import QuantizedTinyLlama, describe_footprint, measure_footprint


pytest.importorskip("torchao")

KINDS = ("int4", "fp8")
IDS = torch.arange(3, 20)[None]
GREEDY = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}


def pack_int4(weight, inner_k_tiles):
    """`[n, k / 2]` bytes of two values each, to `[n / 8, k / (16 inner_k_tiles), 32, inner_k_tiles / 2]` in int32."""
    n, k = weight.shape[0], 2 * weight.shape[1]
    tiles = weight.reshape(n // 8, 8, k // (16 * inner_k_tiles), 8 * inner_k_tiles).transpose(1, 2).contiguous()
    return tiles.view(-1).view(torch.int32).view(n // 8, k // (16 * inner_k_tiles), 32, inner_k_tiles // 2)


def unpacked_int4(packed, group, scale_and_zero):
    """`[n, k]` in fp32."""
    n, tiles = 8 * packed.shape[0], packed.shape[1]
    values = packed.reshape(-1).view(torch.uint8).view(n // 8, tiles, 8, -1).transpose(1, 2).reshape(n, -1)
    values = torch.stack((values >> 4, values & 15), -1).view(n, -1, group).float()
    scale, zero = scale_and_zero.float().transpose(0, 1).unbind(-1)
    return ((values - 8) * scale[..., None] + zero[..., None]).view(n, -1)


def multiply_int4(x, packed, group, scale_and_zero):
    return (x.float() @ unpacked_int4(packed, group, scale_and_zero).T).to(x.dtype)


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Turns off the checks of the device, and adds the int4 kernels that torch lacks on a CPU."""
    import torchao.quantization.quant_api as library

    monkeypatch.setattr(own, "_check_device", lambda *_: None)
    monkeypatch.setattr(library, "_check_hardware_support", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    kernels = torch.library.Library("aten", "IMPL")
    kernels.impl("_convert_weight_to_int4pack", pack_int4, "CPU")
    kernels.impl("_weight_int4pack_mm", multiply_int4, "CPU")
    yield
    kernels._destroy()


@pytest.fixture(scope="module")
def folder(nano_folder, tmp_path_factory):
    """In bf16."""
    made = tmp_path_factory.mktemp("bf16")
    load(nano_folder, dtype=torch.bfloat16)[0].save_pretrained(made)
    load_tokenizer(nano_folder).save_pretrained(made)
    return made


def save(folder, kind, to):
    """Writes a quantized folder."""
    model, tokenizer = load(folder, quantization=kind, device="cpu")
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)
    return to


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def linear_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not n.endswith("lm_head")}


@pytest.mark.parametrize("kind", KINDS)
def test_load_generate_save_reload(on_a_cpu, folder, tmp_path, kind):
    """Loaded again by this package, with the option and without it, and by stock transformers; saved again."""
    model, tokenizer = load(folder, quantization=kind, device="cpu")
    assert type(model) is QuantizedTinyLlama and model.dtype == torch.bfloat16
    assert not model.hf_quantizer.quantization_config.quant_type.set_inductor_config, "would change the whole process"
    before, text = logits(model), model.generate(IDS, **GREEDY)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    again, _ = load(tmp_path / "saved", device="cpu")
    assert type(stock) is LlamaForCausalLM and type(again) is QuantizedTinyLlama
    for other in (stock, again, load(tmp_path / "saved", device="cpu", quantization=kind)[0]):
        assert torch.equal(logits(other), before)
    assert torch.equal(again.generate(IDS, **GREEDY), text)
    again.save_pretrained(tmp_path / "again")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("saved", "again")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name].view(torch.uint8), files[1][name].view(torch.uint8)) for name in files[0])
    again.save_pretrained(tmp_path / "saved", max_shard_size="1MB")
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    assert torch.equal(logits(load(tmp_path / "saved", device="cpu")[0]), before), "in several files"


# int4 in groups of 128, fp8 with activations that are rounded to 3 bits of mantissa too.
@pytest.mark.parametrize(("kind", "error"), [("int4", 0.01), ("fp8", 0.04)])
def test_layers_compute_with_the_dequantized_weights(on_a_cpu, folder, kind, error):
    """All layers but the head; the weights are within half a step of the plain ones, and bf16's rounding of scales."""
    model, _ = load(folder, quantization=kind, device="cpu")
    plain = linear_layers(load(folder)[0])
    quantized = linear_layers(model)
    assert quantized.keys() == plain.keys() and len(quantized) == 28
    for name, layer in quantized.items():
        weight, given = layer.weight, plain[name].weight.float()
        if kind == "int4":
            shape = layer.out_features, layer.in_features
            found = unpacked_int4(weight.qdata, 128, weight.scale_and_zero)[: shape[0], : shape[1]]
            groups = given.view(-1, 128)
            half = ((groups.amax(1) - groups.amin(1)) / 15 / 2).repeat_interleave(128).view(shape)
        else:
            found, half = weight.dequantize().float(), given.abs().amax(1, keepdim=True) / 448 * 16
        assert ((found - given).abs() <= 1.25 * half).all(), name
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
        with torch.inference_mode():
            product = x.float() @ found.T
            assert (layer(x).float() - product).norm() < error * product.norm(), name
    assert type(model.lm_head.weight) is torch.nn.Parameter


@pytest.mark.parametrize("kind", KINDS)
def test_footprint_equals_what_memory_computes(on_a_cpu, folder, tmp_path, kind):
    """By hand: fp8 has a byte per weight and 4 per row; int4 half a byte and 4 per 128, of rows padded to 1024."""
    plain, _ = load(folder)
    model, _ = load(folder, quantization=kind, device="cpu")
    layers = linear_layers(plain).values()
    rest = sum(p.numel() for p in plain.parameters()) - sum(layer.weight.numel() for layer in layers)
    rest = 2 * rest + sum(buffer.nbytes for buffer in plain.buffers())
    if kind == "fp8":
        linear = sum(layer.weight.numel() + 4 * layer.out_features for layer in layers)
    else:
        linear = sum(layer.out_features * 1024 for layer in layers) * (0.5 + 4 / 128)
    found = measure_footprint(model)
    assert found == (linear + rest, measure_footprint(plain).weights, 0)
    assert model.get_memory_footprint() == found.weights == weight_bytes(Setup(plain.config, torch.bfloat16, kind))
    assert describe_footprint(model).startswith(f"{kind}: {found.weights / 1e6:.1f} MB of weights (")
    assert model.flops_per_token(32) == plain.flops_per_token(32)
    saved = find_architecture(str(save(folder, kind, tmp_path)))
    assert saved.quantization == kind and saved.dtype == torch.bfloat16
    assert weight_bytes(Setup(saved.config, saved.dtype, kind)) == found.weights
    for name in ("memory", tmp_path), ("memory", folder, "--quantization", kind):
        done = run_here("tinyllama-hf", *name, "--device", "16GB", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "") and "prefill     not included: " in done.stdout
        assert f"weights     {found.weights / 1e6:.1f} MB ({kind}; " in done.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_biases_and_tied_embeddings(on_a_cpu, folder, tmp_path, kind):
    config = TinyLlamaConfig.preset(
        "micro", vocab_size=512, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    )
    TinyLlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "plain")
    load_tokenizer(folder).save_pretrained(tmp_path / "plain")
    model, _ = load(tmp_path / "plain", quantization=kind, device="cpu")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    found = find_architecture(str(save(tmp_path / "plain", kind, tmp_path / "saved")))
    assert weight_bytes(Setup(found.config, found.dtype, kind)) == measure_footprint(model).weights
    assert torch.equal(logits(load(tmp_path / "saved", device="cpu")[0]), logits(model))


@pytest.mark.parametrize("shape", [(256, 2048), (2048, 5632), (576, 1536), (100, 64)], ids=str)
def test_sizes_are_those_of_the_librarys_tensors(on_a_cpu, shape):
    """torchao packs on torch's meta device, which has the shapes of the GPU's kernel."""
    from torchao.quantization import quantize_

    config = TinyLlamaConfig(hidden_size=64, intermediate_size=64, num_attention_heads=1, num_key_value_heads=1)
    for kind in KINDS if shape[0] % 16 == 0 else ("int4",):
        layer = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16, device="meta")
        quantize_(layer, own.torchao_config(kind, config).quant_type)
        stored = sum(tensor.nbytes for tensor in own.stored_tensors(layer.weight))
        assert stored == own.stored_bytes(kind, shape, 64) != layer.weight.nbytes


@pytest.mark.parametrize(("widths", "group"), [((2048, 5632), 128), ((576, 1536), 64), ((288, 768), 32)])
def test_the_largest_group_that_fits_all_layers(widths, group):
    config = TinyLlamaConfig(hidden_size=widths[0], intermediate_size=widths[1], num_attention_heads=1)
    assert own.group_size(config) == group


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation(on_a_cpu, folder, tmp_path, kind):
    """Quantized here, or saved: stock classes in bf16, with the logits of `load`."""
    model, _ = load(folder, quantization=kind, device="cpu")
    save(folder, kind, tmp_path)
    for described in (describe_model(folder, kind), describe_model(tmp_path)):
        assert described.quantization == kind
        loaded, _ = load_eval_model(described, "cpu")
        assert type(loaded) is LlamaForCausalLM and loaded.dtype == torch.bfloat16
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("kind", KINDS)
def test_the_card_of_a_published_folder(on_a_cpu, folder, tmp_path, kind):
    [revision] = plan_revisions(save(folder, kind, tmp_path), "me/x", license="mit")
    card = ModelCard(revision.files["README.md"].decode())
    num_parameters = load(folder)[0].num_parameters()
    assert f"A Llama of {num_parameters:,} parameters, quantized to {kind} by torchao" in card.text
    assert "`torchao` and `accelerate`, on an NVIDIA GPU" in card.text and "torchao" in card.data.to_dict()["tags"]


@pytest.mark.parametrize("kind", KINDS)
def test_conversion_is_refused(on_a_cpu, folder, tmp_path, kind):
    """By the configuration; by names or dtypes of the weights if that has none."""
    save(folder, kind, tmp_path / "saved")
    for _ in range(2):
        with pytest.raises(InputError, match=r"the weights are quantized\. Convert the original model"):
            convert(tmp_path / "saved", "llama", tmp_path / "plain")
        shutil.copy(folder / "config.json", tmp_path / "saved")


def test_conversion_of_plain_fp8_weights_is_refused(folder, tmp_path):
    """As other tools write them; the scales are in other tensors, so that the values alone are wrong."""
    shutil.copytree(folder, tmp_path / "fp8")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].to(torch.float8_e4m3fn)
    save_file(weights, tmp_path / "fp8" / "model.safetensors")
    with pytest.raises(InputError, match=r"the weights are quantized\. Convert the original model"):
        convert(tmp_path / "fp8", "llama", tmp_path / "plain")


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_passes_in_the_library(on_a_cpu, folder, kind):
    """Why adapters and training are refused. If this fails, they can be supported."""
    model, _ = load(folder, quantization=kind, device="cpu")
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    with pytest.raises(RuntimeError, match=r"derivative for .+ not implemented"):
        model(inputs_embeds=embedded).logits.sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainable": True}, "trainable=True: {kind} .*nf4"),
        ({"adapter": "some/adapter"}, "--adapter some/adapter: {kind} .*nf4"),
        ({"double_quantization": False}, "double_quantization=False: only for nf4"),
        ({"dtype": torch.float32}, "--quantization {kind}: needs weights in bf16, not in float32. Add --dtype bf16"),
        ({"dtype": "float16"}, "--quantization {kind}: needs weights in bf16, not in float16"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_invalid_options(on_a_cpu, folder, kind, options, message):
    with pytest.raises(InputError, match=message.format(kind=kind)):
        load(folder, quantization=kind, device="cpu", **options)


def test_weights_in_another_dtype(on_a_cpu, nano_folder, tmp_path):
    with pytest.raises(InputError, match=r"needs weights in bf16, not in float32\. Add --dtype bf16"):
        load(nano_folder, quantization="fp8", device="cpu")
    assert load(nano_folder, "bfloat16", "cpu", "fp8")[0].dtype == torch.bfloat16
    done = run_here("tinyllama-hf", "memory", nano_folder, "--quantization", "int4", cwd=tmp_path)
    assert done.returncode == 2 and "needs weights in bf16, not in float32" in done.stderr


@pytest.mark.parametrize(
    ("kind", "widths", "message"),
    [
        ("int4", {"hidden_size": 48, "num_attention_heads": 2}, "hidden_size 48 is not a multiple of 32"),
        ("int4", {"intermediate_size": 100}, "intermediate_size 100 is not a multiple of 32"),
        ("fp8", {"intermediate_size": 100}, "intermediate_size 100 is not a multiple of 16"),
        ("fp8", {"head_dim": 8, "num_attention_heads": 8, "num_key_value_heads": 1}, "key/value width 8 is not"),
        ("fp8", {"head_dim": 8, "num_attention_heads": 1, "num_key_value_heads": 1}, "attention width 8 is not"),
    ],
)
def test_widths_that_the_library_would_leave_unquantized(on_a_cpu, tokenizer_folder, tmp_path, kind, widths, message):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 512}  # fmt: skip
    config = TinyLlamaConfig(**{**sizes, **widths})
    TinyLlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    load_tokenizer(tokenizer_folder).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"--quantization {kind}: {message}"):
        load(tmp_path, quantization=kind, device="cpu")


class TestDevice:
    """Refused before anything is read: the folder does not exist."""

    @pytest.mark.parametrize(("kind", "least"), [("int4", r"8\.0"), ("fp8", r"8\.9")])
    def test_a_cpu(self, tmp_path, kind, least):
        with pytest.raises(InputError, match=f"--quantization {kind}: .*capability {least} or higher, not a CPU.*nf4"):
            load(tmp_path / "no-folder", quantization=kind, device="cpu")

    @pytest.mark.parametrize(("kind", "capability", "runs"), [("int4", (7, 5), False), ("int4", (8, 0), True),
                             ("fp8", (8, 6), False), ("fp8", (8, 9), True), ("fp8", (9, 0), True)])  # fmt: skip
    def test_gpus(self, monkeypatch, kind, capability, runs):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        if runs:
            own.check_torchao(kind, "cuda")
            monkeypatch.setattr(torch.version, "cuda", None)  # a build for AMD
        with pytest.raises(InputError, match=rf"not Some GPU \({capability[0]}\.{capability[1]}\).*nf4"):
            own.check_torchao(kind, "cuda")

    def test_a_saved_folder(self, on_a_cpu, folder, tmp_path, monkeypatch):
        save(folder, "int4", tmp_path)
        monkeypatch.undo()
        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
        for call in (load, load_stock):
            with pytest.raises(InputError, match="--quantization int4: needs an NVIDIA GPU"):
                call(tmp_path)


def test_without_torchao(monkeypatch):
    monkeypatch.setattr(own, "_check_device", lambda *_: None)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(InputError, match=r"quantization int4 needs .* torchao: pip install .*\[quantization-gpu\]"):
        own.check_torchao("int4")


@pytest.fixture
def saved(on_a_cpu, folder, tmp_path):
    """An fp8 folder."""
    return save(folder, "fp8", tmp_path / "fp8")


def change(folder, **values):
    """Changes `quantization_config`."""
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"] |= values
    (folder / "config.json").write_text(json.dumps(fields))


def test_another_kind_than_the_folders(saved):
    with pytest.raises(InputError, match=r"--quantization 'int4': the weights of .* are already fp8"):
        load(saved, quantization="int4", device="cpu")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}}, "torchao as Int8.*"),
        ({"quant_type": {"default": {"_type": "Int4WeightOnlyConfig", "_data": {"int4_packing_format": "plain"}}}},
         "torchao as Int4WeightOnlyConfig with another layout"),
        ({"modules_to_not_convert": ["q_proj"]}, "torchao as Float8.* with a choice of layers"),
        ({"include_input_output_embeddings": True}, "torchao as Float8.* with a choice of layers"),
        ({"quant_type": "int4_weight_only"}, "torchao as an unknown type"),
        ({"quant_type": {"default": {"_type": ["x"], "_data": {}}}}, "torchao as an unknown type"),
    ],
)  # fmt: skip
def test_other_types_of_torchao(saved, values, message):
    change(saved, **values)
    for call in (load, load_stock):
        with pytest.raises(InputError, match=f"quantized by {message}, not as .*int4 or fp8 by torchao"):
            call(saved)


@pytest.mark.parametrize("damage", ["missing", "short", "plain"])
@pytest.mark.parametrize("part", ["qdata", "scale"])
def test_damaged_weights(saved, folder, part, damage):
    if damage == "plain":
        shutil.copy(folder / "model.safetensors", saved)
    else:
        from safetensors import safe_open

        with safe_open(saved / "model.safetensors", "pt") as file:
            metadata = file.metadata()
        weights = load_file(saved / "model.safetensors")
        name = f"model.layers.1.mlp.gate_proj._weight_{part}"
        tensor = weights.pop(name)
        if damage == "short":
            weights[name] = tensor[:-1].clone()
        save_file(weights, saved / "model.safetensors", metadata)
    with pytest.raises(InputError, match=r"cannot be loaded|weights are missing|do not match"):
        load(saved, device="cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("kind", "error"), [("int4", 0.01), ("fp8", 0.05)])
def test_on_a_gpu(folder, tmp_path, kind, error):
    """Products within rounding of the dequantized weights; saved, and loaded again with equal logits."""
    try:
        own.check_torchao(kind)
    except InputError as reason:
        pytest.skip(str(reason))
    model, tokenizer = load(folder, quantization=kind, device="cuda")
    for name, layer in linear_layers(model).items():
        x = torch.randn(5, layer.in_features, device="cuda", dtype=torch.bfloat16)
        with torch.inference_mode():
            # The rows of the identity read the weight through the kernel; fp8 holds ones exactly.
            weight = layer(torch.eye(layer.in_features, device="cuda", dtype=torch.bfloat16)).T.float()
            product = x.float() @ weight.T
            assert (layer(x).float() - product).norm() < error * product.norm(), name
    with torch.inference_mode():
        before = model(IDS.cuda()).logits
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        assert torch.equal(load(tmp_path, device="cuda")[0](IDS.cuda()).logits, before)
