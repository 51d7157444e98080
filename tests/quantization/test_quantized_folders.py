"""Quantized models are saved and loaded again bit for bit, whatever was done with them before."""

import copy
import hashlib
import io
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from tests.conftest import run_here
from tests.exactness import assert_greedy
from tinyllama_hf import TinyLlamaForCausalLM, load, load_tokenizer
from tinyllama_hf.errors import InputError
from tinyllama_hf.inference.load import load_stock, model_folder
from tinyllama_hf.quantization.quantized_model import QuantizedTinyLlama, describe_footprint, measure_footprint


pytest.importorskip("bitsandbytes")

from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant


KINDS = {
    "int8": {"quantization": "int8"},
    "nf4": {"quantization": "nf4"},
    "nf4, plain scales": {"quantization": "nf4", "double_quantization": False},
}
IDS = torch.arange(3, 20)[None]
GREEDY = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def bits(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def assert_equal_weights(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(bits(found[name]), bits(tensor)) for name, tensor in expected.items())


def same_quantization(model, folder):
    configuration = copy.deepcopy(model.hf_quantizer.quantization_config)
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=configuration)


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def options(request):
    return request.param


@pytest.fixture(scope="module")
def folders(nano_folder, tmp_path_factory):
    """The folder of an int8 and of an nf4 folder."""
    made = tmp_path_factory.mktemp("quantized")
    for kind in ("int8", "nf4"):
        model, tokenizer = load(nano_folder, quantization=kind)
        model.save_pretrained(made / kind)
        tokenizer.save_pretrained(made / kind)
    return made


@pytest.fixture
def saved(folders, tmp_path):
    """A copy of the nf4 folder."""
    return shutil.copytree(folders / "nf4", tmp_path / "nf4")


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str)
def test_load_generate_save_reload(nano_folder, tmp_path, options, dtype):
    """After forward passes of every kind; loaded by this package, and by stock transformers without it."""
    model, tokenizer = load(nano_folder, dtype=dtype, **options)
    before, text = logits(model), model.generate(IDS, **GREEDY)
    model(IDS)  # with gradients
    logits(model)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(model), before), "the save has changed the model"
    assert not [path for path in tmp_path.iterdir() if path.name != "saved"]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    reloaded, _ = load(tmp_path / "saved")
    assert type(stock) is LlamaForCausalLM and type(reloaded) is QuantizedTinyLlama
    for other in (stock, reloaded, load(tmp_path / "saved", quantization=options["quantization"])[0]):
        assert other.dtype == dtype and torch.equal(logits(other), before)
        if other is not stock:  # its attention sums in another order
            assert torch.equal(other.generate(IDS, **GREEDY), text)
    assert_greedy(stock, text, torch.ones_like(IDS))
    assert measure_footprint(reloaded) == measure_footprint(model) and describe_footprint(
        reloaded
    ) == describe_footprint(model)
    reloaded.save_pretrained(tmp_path / "again")
    assert_equal_weights(*(load_file(tmp_path / name / "model.safetensors") for name in ("again", "saved")))


@pytest.mark.parametrize("loading_info", [False, True])
def test_from_pretrained_of_the_quantized_class(nano_folder, tmp_path, loading_info):
    """It is as safe as `load`, which uses it; also for a folder that was saved quantized."""
    configuration = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    options = {"quantization_config": configuration, "output_loading_info": loading_info}
    for folder in (nano_folder, tmp_path / "saved"):
        loaded = QuantizedTinyLlama.from_pretrained(folder, **options)
        model = (loaded[0] if loading_info else loaded).eval()
        expected, before = same_quantization(model, nano_folder).state_dict(), logits(model)
        model.generate(IDS, **GREEDY)
        model.save_pretrained(tmp_path / "saved")
        assert torch.equal(logits(model), before)
        assert_equal_weights(load_file(tmp_path / "saved" / "model.safetensors"), dict(expected))
        options.pop("quantization_config", None)


def test_the_plain_class_takes_no_quantized_weights(nano_folder, saved, tmp_path):
    """Its forward passes would corrupt them on some processors. This also holds through the Auto classes."""
    message = r"quantization_config is for tinyllama_hf\.load\(MODEL, quantization=\.\.\.\)"
    configuration = BitsAndBytesConfig(load_in_4bit=True)
    for given in (configuration, configuration.to_dict()):
        with pytest.raises(InputError, match=message):
            TinyLlamaForCausalLM.from_pretrained(nano_folder, quantization_config=given)
    with pytest.raises(InputError, match=message):
        TinyLlamaForCausalLM.from_pretrained(saved)
    with pytest.raises(InputError, match=message):
        TinyLlamaForCausalLM.from_pretrained(saved, config=LlamaConfig.from_pretrained(saved))
    TinyLlamaForCausalLM.from_pretrained(nano_folder).save_pretrained(tmp_path / "own", as_tinyllama=True)
    with pytest.raises(InputError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "own", quantization_config=configuration)


def test_state_dict_after_generating(nano_folder, options):
    """It equals that of stock transformers before the first pass, key by key."""
    model, _ = load(nano_folder, **options)
    expected = same_quantization(model, nano_folder).state_dict()
    text = model.generate(IDS, **GREEDY)
    state = model.state_dict()
    assert_equal_weights(state, expected)
    part = model.model.layers[1].state_dict()
    assert_equal_weights(part, {name: state[f"model.layers.1.{name}"] for name in part})
    assert torch.equal(model.generate(IDS, **GREEDY), text)
    assert_equal_weights(state, expected)


@pytest.mark.slow
def test_a_real_model(smollm2, tmp_path):
    """Tied embeddings, and layer widths of which the kernel supports only some."""
    model, tokenizer = load(smollm2, quantization="nf4", double_quantization=False)
    before = logits(model)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)[0]), before)


def test_dequantized(nano_folder, tmp_path, options):
    """After generating: plain weights with exactly the quantized values, saved as a plain folder."""
    model, tokenizer = load(nano_folder, **options)
    layer = same_quantization(model, nano_folder).model.layers[2].mlp.down_proj
    if options["quantization"] == "int8":
        expected = int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    else:
        expected = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    model.generate(IDS, **GREEDY)
    plain = model.dequantize()
    assert torch.equal(plain.model.layers[2].mlp.down_proj.weight, expected)
    plain.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    reloaded, _ = load(tmp_path)
    assert type(reloaded) is TinyLlamaForCausalLM and torch.equal(logits(reloaded), logits(plain))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickled(model)], ids=["deepcopy", "pickle"])
def test_copies(nano_folder, options, copied):
    model, _ = load(nano_folder, **options)
    before = logits(model)
    twin = copied(model)
    assert torch.equal(logits(twin), before) and torch.equal(logits(model), before)
    assert_equal_weights(twin.state_dict(), model.state_dict())


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_generating_leaves_the_folder_alone(saved):
    """The weights are memory-mapped, and repacked in memory."""
    before = hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest()
    model, _ = load(saved)
    model.generate(IDS, **GREEDY)
    assert hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest() == before


def test_a_save_replaces_an_earlier_one(nano_folder, saved):
    """Its shards are removed too; other files in the folder are kept."""
    model, _ = load(nano_folder, quantization="nf4", double_quantization=False)
    model.save_pretrained(saved, max_shard_size="1MB")
    assert len(list(saved.glob("model-*.safetensors"))) > 1 and not (saved / "model.safetensors").exists()
    assert torch.equal(logits(load(saved)[0]), logits(model))
    again, _ = load(nano_folder, quantization="int8")
    again.save_pretrained(saved)
    assert [path.name for path in saved.glob("model*")] == ["model.safetensors"]
    assert (saved / "tokenizer.json").is_file() and torch.equal(logits(load(saved)[0]), logits(again))


def test_a_save_that_fails_leaves_the_earlier_one(nano_folder, saved, monkeypatch):
    files = {path.name: path.read_bytes() for path in saved.iterdir()}
    model, _ = load(nano_folder, quantization="int8")
    monkeypatch.setattr(TinyLlamaForCausalLM, "state_dict", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == files
    assert [path.name for path in saved.parent.iterdir()] == ["nf4"]


def test_the_compute_dtype_of_a_folder(saved):
    """It is kept unless another is requested."""
    assert load(saved)[0].hf_quantizer.quantization_config.bnb_4bit_compute_dtype in (torch.bfloat16, torch.float32)
    model, _ = load(saved, compute_dtype=torch.float16)
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.float16
    model.save_pretrained(saved)
    assert (
        json.loads((saved / "config.json").read_text())["quantization_config"]["bnb_4bit_compute_dtype"] == "float16"
    )


def test_the_command_takes_the_folder_as_it_is(saved, tmp_path):
    command = ("tinyllama-hf", "generate", saved, "def", "--temperature", "0", "--max-new-tokens", "4")
    done = run_here(*command, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr.startswith("nf4: ") and "(12.1 MB in float32)" in done.stderr


def test_another_kind_than_the_folders(saved):
    with pytest.raises(InputError, match=r"quantization 'int8': the weights of .* are already nf4"):
        load(saved, quantization="int8")


def test_stock_loading_is_safe_too(saved):
    """Evaluation and fine-tuning use it."""
    model, _ = load_stock(saved)
    expected = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    logits(model)
    assert type(model) is LlamaForCausalLM
    assert_equal_weights(model.state_dict(), expected)


def test_where_quantized_weights_are_refused(saved):
    assert model_folder(saved, quantized=True) == saved
    with pytest.raises(InputError, match=r"config\.json: the weights are already quantized"):
        model_folder(saved)


@pytest.mark.parametrize("double", [True, False])
def test_fp4_folders_load(nano_folder, tmp_path, double):
    """Folders written by transformers and bitsandbytes; fp4 cannot be requested."""
    configuration = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="fp4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype="float32",
    )
    stock = LlamaForCausalLM.from_pretrained(nano_folder, quantization_config=configuration).eval()
    stock.save_pretrained(tmp_path)
    load_tokenizer(nano_folder).save_pretrained(tmp_path)
    expected = logits(LlamaForCausalLM.from_pretrained(nano_folder, quantization_config=configuration).eval())
    for loader in (load, load_stock):
        model, _ = loader(tmp_path)
        assert torch.equal(logits(model), expected) and describe_footprint(model).startswith("fp4: ")
    model.save_pretrained(tmp_path / "again")
    assert_equal_weights(*(load_file(folder / "model.safetensors") for folder in (tmp_path / "again", tmp_path)))
    for folder in (tmp_path, nano_folder):
        with pytest.raises(InputError, match=r"--quantization 'fp4': .*'nf4'"):
            load(folder, quantization="fp4")


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        ({"quant_method": "awq"}, "quantized by awq, .*vLLM reads it, and `tinyllama-hf convert FOLDER --to llama"),
        ({"quant_method": "gptq"}, "quantized by gptq, .*vLLM reads it"),
        ({"quant_method": "compressed-tensors"}, "W4A16.* `tinyllama-hf convert FOLDER --to llama --output NEW`"),
        ({"quant_method": "fp8"}, "quantized by fp8, .*give the unquantized model"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}, "not as int8, nf4 or fp4 by bitsandbytes"),
        ("nf4", "not as int8, nf4 or fp4 by bitsandbytes"),
    ],
)
def test_other_quantizations(saved, configuration, message):
    fields = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**fields, "quantization_config": configuration}))
    for call in (load, load_stock, model_folder):
        with pytest.raises(InputError, match=message):
            call(saved)


def parts(kind):
    names = {"int8": ("weight", "SCB"), "nf4": ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax",
             "weight.nested_quant_map", "weight.quant_state.bitsandbytes__nf4")}  # fmt: skip
    return [(kind, name) for name in names[kind]]


@pytest.mark.parametrize(("kind", "part"), [*parts("int8"), *parts("nf4")])
@pytest.mark.parametrize("damage", ["missing", "short"])
def test_damaged_weights(folders, tmp_path, kind, part, damage):
    """The kernels would read beyond the end of a tensor that is too short."""
    shutil.copytree(folders / kind, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    name = f"model.layers.1.mlp.gate_proj.{part}"
    part = weights.pop(name)
    if damage == "short":
        weights[name] = part.flatten()[:-1].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"cannot be loaded|weights are missing|gate_proj do not match"):
        load(tmp_path)


def test_plain_weights_under_a_quantized_configuration(nano_folder, saved):
    shutil.copy(nano_folder / "model.safetensors", saved)
    with pytest.raises(InputError, match=r"weights and scales of .* do not match"):
        load(saved)


def test_the_library_cannot_save_what_it_loaded_quantized(saved, tmp_path):
    """transformers 5.23; `make_safe` removes the conversions. If this test fails, that can go."""
    with pytest.raises(NotImplementedError):
        AutoModelForCausalLM.from_pretrained(saved).save_pretrained(tmp_path / "again")
    load(saved, trainable=True)[0].save_pretrained(tmp_path / "ours")
    assert_equal_weights(*(load_file(folder / "model.safetensors") for folder in (tmp_path / "ours", saved)))


def test_a_folder_of_an_older_version(nano_folder, saved):
    """Folders of older versions do not name the method."""
    fields = json.loads((saved / "config.json").read_text())
    quantization = {k: fields["quantization_config"][k] for k in ("load_in_4bit", "bnb_4bit_quant_type")}
    quantization |= {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}
    (saved / "config.json").write_text(json.dumps({**fields, "quantization_config": quantization}))
    model, _ = load(saved)
    stock = AutoModelForCausalLM.from_pretrained(
        nano_folder,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    ).eval()
    assert torch.equal(logits(model), logits(stock))
    assert load_tokenizer(saved)
