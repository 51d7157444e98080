"""Tests what convert writes and refuses, and the results of verify."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.conftest import ROOT, run_here
from tests.conversion import layouts
from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, convert, load_tokenizer, verify
from tinyllama_hf.conversion.arguments import CALIBRATED, FORMATS
from tinyllama_hf.conversion.reading.recognize import open_checkpoint
from tinyllama_hf.conversion.verify import check_sanity, compare_tensors
from tinyllama_hf.errors import InputError


@pytest.fixture(scope="module")
def source(tokenizer_folder, tmp_path_factory):
    """A small model with a tokenizer of Llama 2's kind, 512 rows."""
    folder = tmp_path_factory.mktemp("source") / "model"
    torch.manual_seed(0)
    config = TinyLlamaConfig.preset("micro", vocab_size=512, hidden_size=128, intermediate_size=256)
    TinyLlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer(tokenizer_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chat_model(source, tmp_path_factory):
    """A model like the early chat models: three added tokens, used in the template and as end of sequence."""
    folder = tmp_path_factory.mktemp("chat") / "chat"
    model = TinyLlamaForCausalLM.from_pretrained(source)
    tokenizer = load_tokenizer(source)
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
    model.resize_token_embeddings(515)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=514, pad_token_id=512)
    model.config.eos_token_id = 514
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert len(load_tokenizer(folder)) == 515
    return folder


class TestLlama:
    def test_is_a_plain_folder_that_stock_loads(self, source, tmp_path):
        done = convert(source, "llama", tmp_path / "out")
        assert done.layout == "Hugging Face, model.safetensors" and done.notes == ()
        fields = json.loads((tmp_path / "out" / "config.json").read_text())
        assert fields["architectures"] == ["LlamaForCausalLM"] and fields["model_type"] == "llama"
        assert (
            fields["rope_theta"] == fields["rope_parameters"]["rope_theta"] == 10000.0 and fields["dtype"] == "float32"
        )
        assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["pad_token_id"] == 0
        assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
        ids = torch.tensor([[1, 7, 30, 9]])
        models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (source, tmp_path / "out")]
        assert models[0](ids).logits.equal(models[1](ids).logits)
        assert (
            AutoTokenizer.from_pretrained(tmp_path / "out")("a b")["input_ids"]
            == load_tokenizer(source)("a b")["input_ids"]
        )

    def test_provenance(self, source, tmp_path):
        convert(source, "llama", tmp_path / "a", dtype="bf16")
        convert(tmp_path / "a", "litgpt", tmp_path / "b")
        record = json.loads((tmp_path / "b" / "provenance.json").read_text())
        assert record["conversion"] | {"to": "litgpt", "source": str(tmp_path / "a")} == record["conversion"]
        assert record["converted_from"]["conversion"]["dtype"] == "bf16"
        assert list(record["sha256"]) == ["lit_model.pth"] and record["libraries"]["torch"]

    def test_shards(self, source, tmp_path):
        convert(source, "llama", tmp_path / "out", max_shard_size="300KB")
        files = sorted((tmp_path / "out").glob("model-*.safetensors"))
        assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
        for file in files:
            with safe_open(file, "pt") as opened:
                assert file.stat().st_size < 310_000 or len(opened.keys()) == 1
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(
            t.numel() * 4 for t in load_file(source / "model.safetensors").values()
        )
        assert verify(source, tmp_path / "out").largest == 0
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")

    @pytest.mark.parametrize(
        ("dtype", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
    )
    def test_dtype(self, source, tmp_path, dtype, kind):
        convert(source, "llama", tmp_path / "out", dtype=dtype)
        wanted = load_file(source / "model.safetensors")
        found = load_file(tmp_path / "out" / "model.safetensors")
        assert all(found[name].equal(tensor.to(kind)) for name, tensor in wanted.items())
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == kind

    def test_mixed_types_stay(self, source, tmp_path):
        """Wider dtypes come first in the file, so that values are aligned."""
        convert(source, "llama", tmp_path / "mixed")
        weights = load_file(source / "model.safetensors")
        odd = {
            name: t.half() if "norm" in name else t.bfloat16() if "mlp" in name else t for name, t in weights.items()
        }
        save_file(odd, tmp_path / "mixed" / "model.safetensors", {"format": "pt"})
        (tmp_path / "mixed" / "provenance.json").unlink()
        for target in ("llama", "litgpt"):
            convert(tmp_path / "mixed", target, tmp_path / target)
            back = open_checkpoint(tmp_path / target)
            assert all(back.load(name).equal(tensor) for name, tensor in odd.items())

    @pytest.mark.parametrize("to", ["llama", "litgpt", "gguf-f32"])
    def test_padding_token(self, source, chat_model, tmp_path, to):
        """The padding token is kept; one that ends text is replaced, with a note."""
        assert not [note for note in convert(chat_model, to, tmp_path / "there").notes if "padding" in note]
        convert(tmp_path / "there", "llama", tmp_path / "back")
        for folder in (tmp_path / "back", chat_model):
            assert load_tokenizer(folder).pad_token == "[PAD]"
        copied = Path(shutil.copytree(source, tmp_path / "source"))
        fields = json.loads((copied / "tokenizer_config.json").read_text())
        (copied / "tokenizer_config.json").write_text(json.dumps(fields | {"pad_token": "</s>"}))
        done = convert(copied, to, tmp_path / "replaced")
        assert [note for note in done.notes if "'</s>' replaced by '<unk>'" in note]

    def test_overflow_of_float16(self, source, tmp_path):
        convert(source, "llama", tmp_path / "large")
        weights = load_file(source / "model.safetensors")
        weights["model.norm.weight"][3] = 1e5
        save_file(weights, tmp_path / "large" / "model.safetensors", {"format": "pt"})
        (tmp_path / "large" / "provenance.json").unlink()
        for target, dtype in (("llama", "fp16"), ("awq", "auto"), ("w4a16", "auto")):
            with pytest.raises(InputError, match=r"model.norm.weight: 1 values are not finite as float16.*Use bf16"):
                convert(tmp_path / "large", target, tmp_path / "out", dtype=dtype)
        assert not (tmp_path / "out").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["large"]


class TestVocabulary:
    def test_trim(self, chat_model, source, tmp_path):
        done = convert(chat_model, "llama", tmp_path / "out", vocab_rows=512)
        assert "515 embedding rows in the source, 512 written" in done.notes
        assert any("removed from the tokenizer: [PAD], <|im_start|>, <|im_end|>" in note for note in done.notes)
        assert any("chat template was removed" in note for note in done.notes)
        tokenizer = load_tokenizer(tmp_path / "out")
        assert len(tokenizer) == 512 and tokenizer.chat_template is None and tokenizer.eos_token == "</s>"
        text = "<|im_start|> two\n  words"
        assert tokenizer(text)["input_ids"] == load_tokenizer(source)(text)["input_ids"]
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert model.config.vocab_size == 512 and model.config.eos_token_id == 2
        assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)
        before = AutoModelForCausalLM.from_pretrained(chat_model)
        for name, weight in before.state_dict().items():
            assert model.state_dict()[name].equal(weight[:512] if len(weight) == 515 else weight), name
        ids = torch.tensor([[1, 7, 30, 9]])  # products with 512 and with 515 rows may be summed in another order
        torch.testing.assert_close(model(ids).logits, before(ids).logits[..., :512], atol=1e-5, rtol=1e-5)
        result = verify(chat_model, tmp_path / "out")
        assert result.largest < 1e-5 and result.notes == ("515 and 512 embedding rows; the first 512 are compared",)

    def test_grow(self, source, tmp_path):
        convert(source, "llama", tmp_path / "out", vocab_rows=520)
        weights, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", source))
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert weights[name][:512].equal(before[name])
            torch.testing.assert_close(weights[name][512:], before[name].mean(0, keepdim=True).expand(8, -1))
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 520

    def test_refusals(self, source, chat_model, tmp_path):
        with pytest.raises(InputError, match="the tokenizer's own vocabulary has 512 tokens"):
            convert(source, "llama", tmp_path / "out", vocab_rows=500)
        with pytest.raises(InputError, match="--vocab-rows 0: it must be at least 1"):
            convert(source, "llama", tmp_path / "out", vocab_rows=0)


@pytest.mark.parametrize("to", ["llama", "gguf-f32"])
def test_the_tokenizer_is_loaded_once(source, tmp_path, monkeypatch, to):
    """Loading Llama 2's tokenizer takes more than a second."""
    loaded = []
    monkeypatch.setattr(
        "tinyllama_hf.conversion.checkpoint.load_tokenizer", lambda p: loaded.append(p) or load_tokenizer(p)
    )
    convert(source, to, tmp_path / "out")
    assert loaded == [source]


@pytest.mark.parametrize("to", FORMATS)
def test_every_format_from_the_command_line(source, tmp_path, to):
    """Lossless formats give the same logits."""
    printed = run_here("tinyllama-hf", "convert", source, "--to", to, "--output", "out", cwd=tmp_path)
    assert printed.returncode == 0 and f"wrote out: {to}" in printed.stdout, printed.stderr
    assert printed.stderr == "", "no warnings, no bars where there is no terminal"
    if to in CALIBRATED:
        assert "rounding" in printed.stdout and f"{to.upper()}:" not in printed.stdout
    tolerance = {"gguf-f16": 0.02, "gguf-bf16": 0.2, "gguf-q8_0": 0.2, "gguf-q4_0": 3.0, "w4a16": 3.0, "awq": 3.0}.get(
        to, 0
    )
    done = run_here("tinyllama-hf", "verify", source, "out", "--tolerance", str(tolerance), cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert ("equal within" in done.stdout) == (tolerance > 0)


class TestVerify:
    @pytest.fixture
    def changed(self, source, tmp_path):
        """The source with one changed row."""
        convert(source, "llama", tmp_path / "changed")
        weights = load_file(source / "model.safetensors")
        weights["lm_head.weight"][7] += 0.5
        save_file(weights, tmp_path / "changed" / "model.safetensors", {"format": "pt"})
        (tmp_path / "changed" / "provenance.json").unlink()
        return tmp_path / "changed"

    def test_a_difference_is_found_and_measured(self, source, changed):
        result = verify(source, changed)
        ids = torch.tensor([load_tokenizer(source)(open_text()[:2000], split_special_tokens=True)["input_ids"][:512]])
        with torch.no_grad():
            a, b = (AutoModelForCausalLM.from_pretrained(folder)(ids).logits[0] for folder in (source, changed))
        assert result.num_tokens == 512 and not result.is_equal and result.first_position == 0
        assert result.largest == pytest.approx(float((a - b).abs().max()), rel=1e-4)
        assert result.mean == pytest.approx(float((a - b).abs().mean()), rel=1e-4)
        assert result.argmax_agreement == pytest.approx(float((a.argmax(-1) == b.argmax(-1)).float().mean()))
        assert verify(source, changed, tolerance=result.largest * 1.001).is_equal

    def test_the_position_from_which_on_they_differ(self, source, changed, tmp_path):
        """The first difference is at the position where the text uses the changed row."""
        tokenizer, text = load_tokenizer(source), open_text()
        ids = tokenizer(text, split_special_tokens=True)["input_ids"][:512]
        position = next(i for i, token in enumerate(ids) if i > 100 and token not in ids[:i])
        weights = load_file(source / "model.safetensors")
        weights["model.embed_tokens.weight"][ids[position]] += 1
        save_file(weights, changed / "model.safetensors", {"format": "pt"})
        assert verify(source, changed).first_position == position

    def test_tensors(self, source, changed, tmp_path):
        rows = {row.name: row for row in compare_tensors(source, changed)}
        assert [name for name, row in rows.items() if not row.is_same_bits] == ["lm_head.weight"]
        assert rows["lm_head.weight"].largest == pytest.approx(0.5, abs=1e-6)
        done = run_here("tinyllama-hf", "verify", source, changed, "--tensors", cwd=tmp_path)
        assert done.returncode == 1 and "different: beyond 1e-05 from position 0 on" in done.stdout
        assert "lm_head.weight" in done.stdout and "same bits" in done.stdout

    def test_own_text_and_refusals(self, source, changed, tmp_path):
        (tmp_path / "text.txt").write_text("A short text.")
        assert verify(source, changed, text=tmp_path / "text.txt").num_tokens < 30
        for text, message in (
            (tmp_path / "none.txt", "cannot be read"),
            (write(tmp_path / "empty.txt"), "At least 2"),
        ):
            with pytest.raises(InputError, match=message):
                verify(source, changed, text=text)
        with pytest.raises(InputError, match="--tolerance -1: it must be 0 or more"):
            verify(source, changed, tolerance=-1)


def open_text() -> str:
    return (ROOT / "tinyllama_hf" / "conversion" / "sample.txt").read_text()


def write(path, text=""):
    path.write_text(text)
    return path


class TestSanity:
    @pytest.fixture
    def real(self, shared):
        return shared / "data" / "models" / "stories260K"

    def test_a_real_model_passes(self, real):
        assert check_sanity(open_checkpoint(real)) < 4

    @pytest.mark.parametrize("order", ["layout A called C", "gate and up swapped", "q and k in Meta's order"])
    def test_the_same_weights_in_another_order_do_not(self, real, tmp_path, order):
        """The shapes are equal, so only the loss reveals the wrong row order."""
        weights, config = load_file(real / "model.safetensors"), open_checkpoint(real).config
        if order == "gate and up swapped":
            swap = {"gate": "up", "up": "gate"}
            weights = {
                re.sub("gate|up(?=_proj)", lambda m: swap[m[0]], name): tensor for name, tensor in weights.items()
            }
        elif order == "q and k in Meta's order":
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            weights = {name: layouts.pairwise(t, heads[name.split(".")[-2]]) if name.split(".")[-2] in heads else t
                       for name, t in weights.items()}  # fmt: skip
        fused = layouts.lit_gpt(weights, config, "A" if order == "layout A called C" else "C")
        names = {"attn.attn": "attn.qkv", "swiglu.w1": "fc_1", "swiglu.w2": "fc_2", "swiglu.w3": "proj"}
        wrong = {re.sub("attn.attn|swiglu.w[123]", lambda m: names[m[0]], name): t for name, t in fused.items()}
        torch.save(wrong, tmp_path / "lit_model.pth")
        (tmp_path / "lit_config.json").write_text(json.dumps(layouts.lit_gpt_fields(config)))
        (tmp_path / "tokenizer.model").write_bytes((real / "tokenizer.model").read_bytes())
        with pytest.raises(InputError, match=r"a loss of [5-9]\.\d+ nats.* give 4.502"):
            convert(tmp_path, "llama", tmp_path / "out", check=check_sanity)
        assert not (tmp_path / "out").exists()

    @pytest.mark.slow
    def test_from_the_command_line(self, shared, run_command, tmp_path):
        real = shared / "data" / "models" / "stories260K"
        done = run_command(
            "tinyllama-hf", "convert", real, "--to", "llama", "--output", "out", "--sanity", cwd=tmp_path
        )
        assert done.returncode == 0 and "sanity      loss 3." in done.stdout, done.stderr


BAD = {
    "format": (("lama", {}), r"--to 'lama': unknown format; did you mean 'llama'\?"),
    "dtype": (("llama", {"dtype": "fp8"}), r"--dtype 'fp8'"),
    "dtype of gguf": (("gguf-q8_0", {"dtype": "bf16"}), r"--dtype bf16: the format gguf-q8_0 has fixed dtypes"),
    "shard size": (("llama", {"max_shard_size": "big"}), r"--max-shard-size 'big': not a size"),
    "calibration": (("llama", {"calibration": ["text"]}), r"--calibration: .* llama"),
    "no calibration file": (("awq", {"calibration": ["none.txt"]}), r"--calibration none.txt: file not found"),
    "no config": (("llama", {"config": "none.json"}), r"--config none.json: file not found"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(source, tmp_path, arguments, message):
    to, options = arguments
    with pytest.raises(InputError, match=message):
        convert(source, to, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small(source, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"needs 0.0 GB, but 0.0 GB are free"):
        convert(source, "llama", tmp_path / "out")


@pytest.mark.slow
def test_memory_stays_near_two_tensors(tmp_path):
    """Converts 470 MB in small tensors in a separate process, with far less additional memory."""
    script = """
import sys, torch
from pathlib import Path
from tinyllama_hf import TinyLlamaConfig
from tinyllama_hf.conversion import checkpoint, convert, writing
from tinyllama_hf.conversion.formats import gguf_write, lit_gpt, llama_write
folder = Path(sys.argv[1])
sizes = {"vocab_size": 1024, "hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 2048}
config = TinyLlamaConfig.preset("micro", **sizes).to_llama()
shapes = checkpoint.expected_shapes(config)
folder.mkdir()
config.save_pretrained(folder)
writing.write_torch_archive(folder / "pytorch_model.bin", {n: (torch.float32, s) for n, s in shapes.items()},
                            (torch.ones(s) for s in shapes.values()))
def resident(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) // 1024
Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
before = resident("VmRSS")
convert.convert(folder, sys.argv[2], folder.with_name("out"))
print(resident("VmHWM") - before, sum(f.stat().st_size for f in folder.iterdir()) // 2**20)
"""
    import shutil

    for to in ("llama", "litgpt", "gguf-q8_0"):
        done = subprocess.run([sys.executable, "-c", script, tmp_path / "in", to], capture_output=True, text=True,
                              env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"})  # fmt: skip
        assert done.returncode == 0, done.stderr
        additional, size = map(int, done.stdout.split())
        assert size > 400 and additional < 110, (to, additional, size)
        shutil.rmtree(tmp_path / "in")
        shutil.rmtree(tmp_path / "out")


def test_an_untrained_model_is_not_sane(source):
    with pytest.raises(InputError, match="or the model is untrained"):
        check_sanity(open_checkpoint(source))


def changed_weights(folder, **tensors):
    """Changes tensors of a folder and removes the recorded hashes."""
    file = folder / "model.safetensors"
    save_file(load_file(file) | {name.replace("__", "."): t for name, t in tensors.items()}, file, {"format": "pt"})
    (folder / "provenance.json").unlink(missing_ok=True)
    return folder


def test_logits_that_are_not_finite_are_equal_to_nothing(source, tmp_path):
    convert(source, "llama", tmp_path / "out")
    changed_weights(tmp_path / "out", model__norm__weight=torch.full((128,), 3e38))
    with pytest.raises(InputError, match="its logits are not finite"):
        verify(source, tmp_path / "out")


def test_a_tied_model_with_another_output_keeps_it_as_stock_does(shared, tmp_path):
    real = shared / "data" / "models" / "stories260K"
    convert(real, "llama", tmp_path / "other")
    changed_weights(tmp_path / "other", lm_head__weight=torch.randn(512, 64))
    done = convert(tmp_path / "other", "llama", tmp_path / "out")
    assert "tie_word_embeddings is true, but lm_head.weight differs; both are kept, untied" in done.notes
    ids = torch.tensor([[1, 7, 30, 9]])
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("other", "out")]
    assert models[0](ids).logits.equal(models[1](ids).logits) and not models[1].config.tie_word_embeddings


@pytest.mark.parametrize("to", ["llama", "litgpt", "gguf-f32"])
def test_a_changed_byte_is_told_by_the_hash(source, tmp_path, to):
    convert(source, to, tmp_path / "out")
    file = next(path for path in (tmp_path / "out").iterdir() if path.suffix in (".safetensors", ".pth", ".gguf"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    for given in (tmp_path / "out", file):
        with pytest.raises(InputError, match=f"{file.name}: damaged or incomplete .*SHA-256"):
            convert(given, "llama", tmp_path / "again")


class TestGenerationConfig:
    FIELDS = {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 0, "temperature": 0.9, "top_p": 0.6,
              "max_length": 4096}  # fmt: skip

    def test_is_kept_as_it_is(self, source, tmp_path):
        """transformers reads a temperature without `do_sample` (first Llama 2 folders), but refuses to write it."""
        convert(source, "llama", tmp_path / "a")
        (tmp_path / "a" / "generation_config.json").write_text(json.dumps(self.FIELDS))
        convert(tmp_path / "a", "litgpt", tmp_path / "b")
        convert(tmp_path / "b", "llama", tmp_path / "c")
        found = json.loads((tmp_path / "c" / "generation_config.json").read_text())
        assert {name: found[name] for name in self.FIELDS} == self.FIELDS
        done = convert(tmp_path / "a", "gguf-f32", tmp_path / "d")
        assert (
            "GGUF cannot store these fields of the generation configuration: eos_token_id, max_length, "
            "temperature, top_p" in done.notes
        )

    def test_padding_without_one_is_the_tokenizers(self, source, tmp_path):
        convert(source, "llama", tmp_path / "a")
        (tmp_path / "a" / "generation_config.json").unlink()
        convert(tmp_path / "a", "llama", tmp_path / "b")
        assert json.loads((tmp_path / "b" / "generation_config.json").read_text()) == {
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": load_tokenizer(source).pad_token_id,
        }


def test_scaling_of_the_rotary_embedding_is_written_in_both_spellings(source, tmp_path):
    convert(source, "llama", tmp_path / "a")
    fields = json.loads((tmp_path / "a" / "config.json").read_text())
    assert "rope_scaling" not in fields
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    (tmp_path / "a" / "config.json").write_text(json.dumps(fields | {"rope_parameters": rope, "rope_theta": 500000.0}))
    convert(tmp_path / "a", "litgpt", tmp_path / "b")
    convert(tmp_path / "b", "llama", tmp_path / "c")
    found = json.loads((tmp_path / "c" / "config.json").read_text())
    assert found["rope_parameters"] == rope and found["rope_theta"] == 500000.0
    assert found["rope_scaling"] == {name: value for name, value in rope.items() if name != "rope_theta"}
    result = verify(tmp_path / "a", tmp_path / "c")
    assert result.largest == 0
    ids = torch.arange(100)[None]
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("a", "c")]
    assert models[0](ids).logits.equal(models[1](ids).logits) and models[1].config.rope_parameters == rope


def test_outputs_that_cannot_be(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--output file/out: .*file is a file"):
        convert(source, "llama", "file/out")
    with pytest.raises(InputError, match=r"--output .*: already exists"):
        convert(source, "llama", ".")


def test_a_configuration_where_none_is_wanted(source, tmp_path):
    convert(source, "gguf-f32", tmp_path / "out")
    with pytest.raises(InputError, match="GGUF files contain their own configuration"):
        convert(tmp_path / "out", "llama", tmp_path / "back", config=source / "config.json")
    assert verify(tmp_path / "out", source, config=source / "config.json").largest == 0, "for those that need it only"
