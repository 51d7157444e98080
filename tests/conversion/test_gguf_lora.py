"""LoRA adapters for llama.cpp: the same matrices and factor, refusals by name, and the tokens of the merged model."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from tests.conftest import run_here
from tinyllama_hf import TinyLlamaConfig
from tinyllama_hf.conversion.convert import convert
from tinyllama_hf.errors import InputError


pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model


GGUFReader = pytest.importorskip("gguf").GGUFReader

HEADS, WIDTH = {"q": 4, "k": 2}, 8
NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
         "up_proj": "ffn_up", "down_proj": "ffn_down"}  # fmt: skip
OPTIONS = {"target_modules": "all-linear", "r": 4, "lora_alpha": 12, "init_lora_weights": False}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": HEADS["q"]}
    config = TinyLlamaConfig(
        **sizes, vocab_size=512, num_key_value_heads=HEADS["k"], tie_word_embeddings=request.param
    )
    LlamaForCausalLM(config.to_llama()).save_pretrained(folder)
    return folder


def adapter_of(base, folder, **options):
    get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(**OPTIONS | options)).save_pretrained(folder)
    return folder


def matrices(reader):
    return {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}


def pairwise_rows(name, matrix):
    """The rows of a head in GGUF's order, spelled out: each row of the first half is followed by one of the second."""
    if name not in ("q_proj", "k_proj"):
        return matrix
    heads, half = range(HEADS[name[0]]), range(WIDTH // 2)
    order = [WIDTH * head + i + first for head in heads for i in half for first in (0, WIDTH // 2)]
    return matrix[order]


@pytest.mark.parametrize(
    ("options", "alpha"),
    [
        ({}, 12.0),
        ({"use_rslora": True}, 12 * math.sqrt(4)),
        ({"rank_pattern": {"q_proj": 8}}, 12.0),
        ({"alpha_pattern": {"q_proj": 12}}, 12.0),
        ({"layers_to_transform": [1], "target_modules": ["k_proj"]}, 12.0),
    ],
    ids=["plain", "rslora", "ranks", "alphas", "some"],
)
def test_holds_the_matrices_and_the_factor(base, tmp_path, options, alpha):
    """llama.cpp multiplies B A by alpha / rank, PEFT by its own factor: they are equal for every layer."""
    adapter = adapter_of(base, tmp_path / "adapter", **options)
    done = convert(adapter, "gguf-lora", tmp_path / "new" / "lora.gguf")
    assert (done.output, done.format) == (tmp_path / "new" / "lora.gguf", "gguf-lora")
    reader = GGUFReader(tmp_path / "new" / "lora.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert (fields["general.architecture"], fields["adapter.lora.alpha"]) == ("llama", pytest.approx(alpha, rel=1e-7))
    found = matrices(reader)
    weights = load_file(adapter / "adapter_model.safetensors")
    assert len(found) == len(weights) == (2 if "layers_to_transform" in options else 2 * 14)
    for name, matrix in weights.items():
        *_, layer, _, module, part, _ = name.split(".")
        rows = pairwise_rows(module, matrix) if part == "lora_B" else matrix
        assert torch.equal(found[f"blk.{layer}.{NAMES[module]}.weight.{part.lower()}"], rows), name
    for name, module in PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter).named_modules():
        if hasattr(module, "lora_A"):
            rank = found[f"blk.{name.split('.')[4]}.{NAMES[name.split('.')[-1]]}.weight.lora_a"].shape[0]
            assert module.scaling["default"] == pytest.approx(fields["adapter.lora.alpha"] / rank, rel=1e-7)


def changed(adapter, change=None, **fields):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    if change:
        weights = load_file(adapter / "adapter_model.safetensors")
        change(weights)
        save_file(weights, adapter / "adapter_model.safetensors", metadata={"format": "pt"})


LAYER = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
REFUSED = {
    "dora": ({"use_dora": True}, "use_dora True"),
    "embeddings": ({"modules_to_save": ["embed_tokens"]}, r"modules_to_save \['embed_tokens'\]"),
    "pairs of embeddings": ({"target_modules": ["embed_tokens"]}, "holds .*embed_tokens"),
    "tokens": ({"trainable_token_indices": {"embed_tokens": [3]}}, "trainable_token_indices"),
    "bias": ({"bias": "lora_only"}, "bias 'lora_only'"),
    "biases": ({"lora_bias": True}, "lora_bias True"),
    "alphas": ({"alpha_pattern": {"q_proj": 3}}, "alpha 3, 12"),
    "ranks of rslora": ({"use_rslora": True, "rank_pattern": {"q_proj": 16}}, "alpha 24, 48"),
    "no alpha": ({"lora_alpha": 0}, "alpha 0"),
}


class TestRefusals:
    @pytest.fixture(autouse=True)
    def nothing_is_written(self, tmp_path):
        yield
        assert not list(tmp_path.rglob("*.gguf")) and not list(tmp_path.glob(".*"))

    @pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
    def test_what_the_format_cannot_hold(self, base, tmp_path, options, message):
        adapter = adapter_of(base, tmp_path / "adapter", **options)
        with pytest.raises(InputError, match=rf"adapter .*{message}.* tinyllama-hf merge BASE .*adapter --output"):
            convert(adapter, "gguf-lora", tmp_path / "lora.gguf")

    def test_an_initialization_that_changes_the_base(self, base, tmp_path):
        """And a field that a later PEFT adds."""
        adapter = adapter_of(base, tmp_path / "adapter")
        changed(adapter, init_lora_weights="pissa", use_magic=True)
        with pytest.raises(InputError, match="has init_lora_weights 'pissa', use_magic True in"):
            convert(adapter, "gguf-lora", tmp_path / "lora.gguf")

    def test_resized_embeddings(self, base, tmp_path):
        model = LlamaForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(515)
        get_peft_model(model, LoraConfig(**OPTIONS)).save_pretrained(tmp_path / "adapter")
        with pytest.raises(InputError, match=r"holds .*(embed_tokens|lm_head)\.weight"):
            convert(tmp_path / "adapter", "gguf-lora", tmp_path / "lora.gguf")

    def test_another_kind_and_no_adapter(self, base, tmp_path):
        adapter = adapter_of(base, tmp_path / "adapter")
        changed(adapter, peft_type="LOHA")
        with pytest.raises(InputError, match="kind 'LOHA'"):
            convert(adapter, "gguf-lora", tmp_path / "lora.gguf")
        with pytest.raises(InputError, match=r"adapter .*: holds no adapter_config.json"):
            convert(base, "gguf-lora", tmp_path / "lora.gguf")
        with pytest.raises(InputError, match=r"adapter: an adapter, not a model. .*tinyllama-hf merge BASE"):
            convert(adapter, "llama", tmp_path / "out")

    def test_damage(self, base, tmp_path):
        damages = {
            "lora_A and lora_B of .*q_proj": lambda w: w.pop(LAYER.format("B")),
            "do not match": lambda w: w.update({LAYER.format("A"): w[LAYER.format("A")][1:].clone()}),
            "1 values are not finite": lambda w: w[LAYER.format("B")][0, 0].fill_(math.nan),
            "it holds no matrices": lambda w: w.clear(),
        }
        for i, (message, damage) in enumerate(damages.items()):
            adapter = adapter_of(base, tmp_path / f"adapter{i}")
            changed(adapter, damage)
            with pytest.raises(InputError, match=message):
                convert(adapter, "gguf-lora", tmp_path / "lora.gguf")
        changed(adapter_of(base, tmp_path / "ranks"), r=5)
        with pytest.raises(InputError, match=r"its rank is 4, and adapter_config.json has \[5\]"):
            convert(tmp_path / "ranks", "gguf-lora", tmp_path / "lora.gguf")

    def test_another_base_is_named(self, base, nano_folder, tmp_path):
        adapter = adapter_of(base, tmp_path / "adapter")
        with pytest.raises(InputError, match=rf"in this base. Give the model .*{base.name}.* with --base"):
            convert(adapter, "gguf-lora", tmp_path / "lora.gguf", base=nano_folder)
        for name, message in (
            ("gone", "its base gone cannot be read .* --base"),
            (None, "names no base model. .*--base"),
        ):
            changed(adapter, base_model_name_or_path=name)
            with pytest.raises(InputError, match=message):
                convert(adapter, "gguf-lora", tmp_path / "lora.gguf")


def test_the_output_matrix(base, tmp_path):
    """Possible where it is not the embedding too."""
    adapter = adapter_of(base, tmp_path / "adapter", target_modules=["lm_head"])
    changed(adapter, lambda w: [w.pop(name) for name in list(w) if "lora" not in name])
    if LlamaForCausalLM.from_pretrained(base).config.tie_word_embeddings:
        with pytest.raises(InputError, match=r"changes lm_head\.weight"):
            convert(adapter, "gguf-lora", tmp_path / "lora.gguf")
    else:
        convert(adapter, "gguf-lora", tmp_path / "lora.gguf")
        names = {tensor.name for tensor in GGUFReader(tmp_path / "lora.gguf").tensors}
        assert names == {"output.weight.lora_a", "output.weight.lora_b"}


def test_a_base_in_gguf_and_a_pickled_adapter(base, tokenizer_folder, tmp_path):
    """Only the configuration of the base is read; bf16 matrices become float32."""
    adapter = adapter_of(base, tmp_path / "adapter")
    convert(base, "gguf-f32", tmp_path / "base")
    changed(adapter, base_model_name_or_path="gone")
    weights = {name: tensor.bfloat16() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(weights, adapter / "adapter_model.bin")
    convert(adapter, "gguf-lora", tmp_path / "lora.gguf", base=tmp_path / "base" / "model-f32.gguf")
    found = {
        tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in GGUFReader(tmp_path / "lora.gguf").tensors
    }
    assert torch.equal(found["blk.0.attn_q.weight.lora_a"], weights[LAYER.format("A")].float())


def test_the_command(base, tmp_path):
    adapter = adapter_of(base, tmp_path / "adapter")
    (adapter / "chat_template.jinja").write_text("x")
    words = ("tinyllama-hf", "convert", "adapter", "--to", "gguf-lora", "--output")
    done = run_here(*words, "lora.gguf", "--base", base, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "LoRA adapter, 14 matrices" in done.stdout and "--lora lora.gguf" in done.stdout
    assert "--chat-template-file" in done.stdout and "wrote lora.gguf: gguf-lora" in done.stdout
    (tmp_path / "text.gguf").write_text("text")
    wrong = {
        "lora.gguf": "--output lora.gguf: already exists. Choose another name, or pass --force",
        "text.gguf --force": "--output text.gguf: not a GGUF file, so --force does not replace it",
        "folder": "--output folder: gguf-lora is one file. Give a name that ends in .gguf",
        "text.gguf/new.gguf": "text.gguf is a file",
        "new.gguf --vocab-rows 3": "--vocab-rows: changes a model",
        "new.gguf --sanity": "--sanity: changes a model",
        "new.gguf --config x": "--config: changes a model",
        "new.gguf --dtype fp16": "--dtype fp16: the format gguf-lora has fixed dtypes",
    }
    for options, message in wrong.items():
        done = run_here(*words, *options.split(), cwd=tmp_path)
        assert done.returncode == 2 and message in done.stderr, done.stderr
    assert run_here(*words, "lora.gguf", "--force", cwd=tmp_path).returncode == 0
    done = run_here("tinyllama-hf", "convert", base, "--to", "llama", "--output", "x", "--base", "y", cwd=tmp_path)
    assert done.returncode == 2 and "--base y: only used by gguf-lora" in done.stderr
