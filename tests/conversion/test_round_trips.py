"""Round trips from Hugging Face to each format and back through public calls: weights, configuration, tokenizer.

The result is read with safetensors and transformers. `llama` and `litgpt` keep the dtypes. From GGUF, matrices have
the type of the file (float32 if dequantized, float16 if rows do not divide into blocks) and norms are float32, as in
llama.cpp. Quantized tensors must equal the reference of the package `gguf`. Its blocks run along rows, so the row
order of q and k, which GGUF changes, does not matter.
"""

import json
from typing import NamedTuple

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM

from tests.conversion.test_awq import divergence, log_probabilities, perplexity, unpack_as_published
from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, convert, load_tokenizer, verify
from tinyllama_hf.tokenization_tinyllama import encode_text


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16}
SOURCES = ("micro", "nano", "chat", "stories260K", pytest.param("smollm2", marks=pytest.mark.slow))
LOSSLESS = ("llama", "litgpt", "gguf-f32")  # and gguf-bf16, of a model in bf16
TARGETS = (*LOSSLESS, "gguf-bf16", "gguf-f16", "gguf-q8_0", "gguf-q4_0")
# Not of the architecture: the first four differ by design, the others are what transformers leaves behind where it
# reads GGUF.
OF_THE_FILE = {"dtype", "model_type", "architectures", "transformers_version", "_name_or_path", "_model_name_or_path",
               "unk_token_id"}  # fmt: skip
# What transformers writes into every generation configuration, at its default.
OF_THE_LIBRARY = {
    "_from_model_config",
    "transformers_version",
    "output_attentions",
    "output_hidden_states",
    "use_cache",
}
CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
MESSAGES = [{"role": "user", "content": " 2 + 2?\n"}, {"role": "assistant", "content": "4"}]
TEXTS = (
    "",
    " ",
    "a",
    "  two  leading",
    "trailing   ",
    "\n",
    "\n\n\n",
    "\t\tx\r\n",
    "Hello, world!",
    "don't we'll I'M",
    "def f(x: int) -> int:\n    if x == 0:\n        return 1\n\treturn x * f(x - 1)  # n!\n",
    "x" * 100,
    " " * 65,
    "0 12 345 6789 3.14159 1,000,000 0x1F ²³ ½ ٣٤",
    "  7 \n 8\n\n  99",
    "https://a.b/c?d=e&f=%20#g",
    "{'k': [1, 2.5e-3]}",
    "Füße, naïve, Ångström",
    "Привет, мир",
    "你好,世界。",
    "こんにちは カタカナ",
    "안녕하세요",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "שלום",
    "สวัสดี",
    "😀👩‍👩‍👧‍👦🇩🇪👍🏽 \U0001f9ff",
    "e\u0301 \u00e9 \ufb01 \u200b\ufeff\u00a0|\u3000|",
    "\x00\x07\x7f",
    "<s></s><unk><pad>",
    "<|im_start|>user\nHi<|im_end|>",
    "▁ _ ▁▁",
    "</s",
    "<0x41>",
)


class Source(NamedTuple):
    """A folder, the dtype of its weights as in `--dtype`, and the weights."""

    folder: object
    dtype: str
    weights: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def sources(request, tokenizer_folder, tmp_path_factory):
    """Creates a source when it is first requested."""
    made = {}

    def source(name):
        if name not in made:
            if name == "stories260K":
                folder = request.getfixturevalue("shared") / "data" / "models" / name
            elif name == "smollm2":
                folder = request.getfixturevalue("smollm2")
            else:
                folder = random_model(name, tokenizer_folder, tmp_path_factory.mktemp("source") / name)
            weights = load_file(folder / "model.safetensors")
            (kind,) = {tensor.dtype for tensor in weights.values()}
            made[name] = Source(folder, "bf16" if kind == torch.bfloat16 else "fp32", weights)
        return made[name]

    return source


def random_model(name, tokenizer_folder, folder):
    """A preset with 512 rows; `chat` is a bf16 micro model with two more tokens, one of them an end of sequence."""
    tokenizer, fields, generation = load_tokenizer(tokenizer_folder), {"vocab_size": 512}, GenerationConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=0
    )  # fmt: skip
    if name == "chat":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", CHAT
        fields = {"vocab_size": 514, "eos_token_id": 513, "rms_norm_eps": 3e-6, "max_position_embeddings": 777}
        generation = GenerationConfig(
            bos_token_id=1, eos_token_id=513, pad_token_id=0, do_sample=True, temperature=0.7, top_p=0.9
        )
    torch.manual_seed(0)
    model = TinyLlamaForCausalLM(TinyLlamaConfig.preset("micro" if name == "chat" else name, **fields))
    for parameter in model.parameters():  # norms too, since they are initialized to equal values
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.1)
    model.generation_config = generation
    model.to(torch.bfloat16 if name == "chat" else torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def weights_in(folder):
    """All tensors of a folder, from one or several files."""
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_bits(found, expected):
    """Asserts equal names, dtypes and bits; negative zero differs from zero."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert found[name].view(torch.uint8).equal(tensor.contiguous().view(torch.uint8)), name


def reference(name, tensor, to, is_tied):
    """A tensor after the round trip."""
    if not to.startswith("gguf-"):
        return tensor
    kind = to.removeprefix("gguf-")
    if tensor.dim() == 1:
        return tensor.float()
    if kind in ("f32", "f16", "bf16"):
        return tensor.to(DTYPES[kind])
    if tensor.shape[1] % 32:
        return tensor.half()
    head = "model.embed_tokens.weight" if is_tied else "lm_head.weight"
    number = GGMLQuantizationType["Q8_0" if name == head else kind.upper()]
    return torch.from_numpy(dequantize(quantize(tensor.float().numpy(), number), number))


def config_of(folder, to="llama"):
    """All fields except the dtype and those that the container cannot store."""
    fields = {k: v for k, v in AutoConfig.from_pretrained(folder).to_dict().items() if k not in OF_THE_FILE}
    assert fields.pop("rope_theta", fields["rope_parameters"]["rope_theta"]) == fields["rope_parameters"]["rope_theta"]
    if to.startswith("gguf-"):
        fields["rms_norm_eps"] = float(np.float32(fields["rms_norm_eps"]))
    if to not in ("llama", "awq", "w4a16"):  # the others have padding on the tokenizer's side only
        fields.pop("pad_token_id")
    return fields


def generation_of(folder):
    fields = json.loads((folder / "generation_config.json").read_text())
    return {name: value for name, value in fields.items() if name not in OF_THE_LIBRARY}


def assert_same_tokenizer(a, b):
    one, other = load_tokenizer(a), load_tokenizer(b)
    assert (one.special_tokens_map, one.chat_template) == (other.special_tokens_map, other.chat_template)
    assert one.get_vocab() == other.get_vocab()
    for text in TEXTS:
        for settings in ({}, {"add_special_tokens": False}, {"split_special_tokens": True}):
            ids = one(text, **settings)["input_ids"]
            assert ids == other(text, **settings)["input_ids"], (text, settings)
            assert one.decode(ids) == other.decode(ids), text
    if one.chat_template:
        assert one.apply_chat_template(MESSAGES) == other.apply_chat_template(MESSAGES)


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_there_and_back(sources, source, to, tmp_path):
    folder, dtype, weights = sources(source)
    there = convert(folder, to, tmp_path / "there")
    convert(tmp_path / "there", "llama", tmp_path / "back")
    assert_same_bits(
        weights_in(tmp_path / "back"),
        {name: reference(name, t, to, "lm_head.weight" not in weights) for name, t in weights.items()},
    )
    assert config_of(tmp_path / "back", to) == config_of(folder, to)
    assert_same_tokenizer(folder, tmp_path / "back")
    assert_generation(generation_of(folder), generation_of(tmp_path / "back"), to, there.notes)
    if to in ("llama", "litgpt") and (folder / "tokenizer.model").is_file():
        assert (tmp_path / "back" / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    odd = sorted(name for name, t in weights.items() if t.dim() == 2 and t.shape[1] % 32)
    if to in ("gguf-q8_0", "gguf-q4_0"):
        lines = [line for line in there.notes if "written as f16" in line]
        assert len(lines) == bool(odd) and all(line.count("blk.") == len(odd) for line in lines)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back").num_parameters()
    if to in LOSSLESS or (to, dtype) == ("gguf-bf16", "bf16"):
        if source != "smollm2" or to in ("litgpt", "gguf-bf16"):  # each takes many seconds
            assert verify(folder, tmp_path / "there").largest == 0
        if to.startswith("gguf-") and dtype == "bf16":  # with the norms in their own dtype too, all is as it was
            convert(tmp_path / "there", "llama", tmp_path / "as-it-was", dtype=dtype)
            assert_same_bits(weights_in(tmp_path / "as-it-was"), weights)


def assert_generation(before, after, to, notes):
    """Asserts that it is kept; GGUF keeps the ids, and a note lists the lost fields."""
    if to in ("llama", "litgpt"):
        padding = {} if "pad_token_id" in before else {"pad_token_id": after.get("pad_token_id")}
        assert before in (after, {k: v for k, v in after.items() if k not in padding})
        return
    for name, value in before.items():
        if after.get(name) != value:
            assert not name.endswith("_token_id"), name
            assert any("generation configuration" in line and name in line for line in notes), name


@pytest.mark.parametrize("source", ["chat", pytest.param("smollm2", marks=pytest.mark.slow)])
def test_bf16_to_fp32_in_shards_and_back(sources, source, tmp_path):
    folder, _, weights = sources(source)
    size = "300KB" if source == "chat" else "60MB"
    ways = {"llama": {"max_shard_size": size}, **({"litgpt": {}} if source == "chat" else {})}
    for there, option in ways.items():
        convert(folder, there, tmp_path / there, dtype="fp32", **option)
        convert(tmp_path / there, "llama", tmp_path / f"{there}-back", dtype="bf16", max_shard_size=size)
        assert len(list((tmp_path / f"{there}-back").glob("model-*.safetensors"))) > 3
        assert_same_bits(weights_in(tmp_path / f"{there}-back"), weights)
        assert config_of(tmp_path / f"{there}-back", there) == config_of(folder, there)
        assert AutoConfig.from_pretrained(tmp_path / f"{there}-back").dtype == torch.bfloat16
    assert len(list((tmp_path / "llama").glob("model-*.safetensors"))) > 5
    assert_same_bits(weights_in(tmp_path / "llama"), {name: tensor.float() for name, tensor in weights.items()})
    assert verify(tmp_path / "llama", folder).largest == 0


def test_several_stops_are_kept_or_named(sources, tmp_path):
    """Chat models can have two end-of-sequence tokens; GGUF stores one."""
    convert(sources("chat").folder, "llama", tmp_path / "source")
    file = tmp_path / "source" / "generation_config.json"
    file.write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [513, 2], "pad_token_id": 0}))
    for to in ("llama", "litgpt", "gguf-bf16"):
        notes = convert(tmp_path / "source", to, tmp_path / f"{to}-there").notes
        convert(tmp_path / f"{to}-there", "llama", tmp_path / f"{to}-back")
        kept = generation_of(tmp_path / f"{to}-back")["eos_token_id"]
        assert kept == [513, 2] or (
            to == "gguf-bf16" and kept == 513 and any("eos_token_id" in line for line in notes)
        )


@pytest.mark.parametrize("mark", [b"\x80", b"PK"])
def test_a_header_as_long_as_the_mark_of_another_container(sources, mark, tmp_path):
    """The header length at the start of a file can look like the start of a pickle or of a zip archive."""
    source = sources("micro")
    convert(source.folder, "llama", tmp_path / "source")
    (tmp_path / "source" / "provenance.json").unlink()
    file = tmp_path / "source" / "model.safetensors"
    save_file(source.weights, file, {"format": "pt", "filling": ""})
    begin = int.from_bytes(file.read_bytes()[: len(mark)], "little")
    missing = (int.from_bytes(mark, "little") - begin) % 256 ** len(mark)
    save_file(source.weights, file, {"format": "pt", "filling": "x" * missing})
    assert file.read_bytes().startswith(mark)
    convert(tmp_path / "source", "llama", tmp_path / "back")
    assert_same_bits(weights_in(tmp_path / "back"), source.weights)


# AWQ and W4A16, which do not return the same bits: what comes back is what their readers compute with


def awq_weights(folder):
    """The folder's tensors, unpacked according to the published layout."""
    packed = weights_in(folder)
    found = {name: t for name, t in packed.items() if not name.endswith(("qweight", "qzeros", "scales"))}
    for module in (name.removesuffix("qweight") for name in packed if name.endswith("qweight")):
        integers, zeros = (unpack_as_published(packed[module + part]) for part in ("qweight", "qzeros"))
        scales = packed[f"{module}scales"].numpy()
        weight = (integers - zeros.repeat(128, 0)).astype(np.float16) * scales.repeat(128, 0)  # [in, out]
        found[f"{module}weight"] = torch.from_numpy(weight.T.copy())
    return found


@pytest.mark.parametrize("to", ["awq", "w4a16"])
@pytest.mark.parametrize("calibrated", [True, False])
def test_four_bit_of_nano(sources, documents, calibrated, to, tmp_path):
    folder, _, weights = sources("nano")
    (tmp_path / "text.txt").write_text(documents[0][:3000], encoding="utf-8")
    there = convert(folder, to, tmp_path / "there", calibration=[tmp_path / "text.txt"] if calibrated else [])
    assert there.notes[0].startswith(f"{to.upper() if calibrated else 'rounding (RTN)'}: 4 bit")
    convert(tmp_path / "there", "llama", tmp_path / "back")
    back = weights_in(tmp_path / "back")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "there").state_dict() if to == "w4a16" else None
    assert_same_bits(back, stock or awq_weights(tmp_path / "there"))
    assert {tensor.dtype for tensor in back.values()} == {torch.float16}
    assert config_of(tmp_path / "back", to) == config_of(folder, to)
    assert generation_of(tmp_path / "back") == generation_of(folder)
    assert_same_tokenizer(folder, tmp_path / "back")
    for name, tensor in weights.items():
        if not name.endswith("_proj.weight"):
            assert calibrated or back[name].equal(tensor.half()), name
        elif not calibrated:  # half a step of a group's 15, and what float16 rounds
            groups = tensor.view(len(tensor), -1, 128)
            step = (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / 15
            assert ((back[name].float() - tensor).abs() <= step.repeat_interleave(128, 1) * 0.52 + 1e-3).all(), name


@pytest.fixture(scope="module")
def one_thread():
    """Such small steps and searches are faster with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(one_thread, documents, tokenizer_folder, tmp_path_factory):
    """A nano model after 100 steps as a folder, calibration text, and ids `[windows, 128]` of unseen text."""
    folder = tmp_path_factory.mktemp("trained")
    tokenizer = load_tokenizer(tokenizer_folder)
    train, held_out = (
        torch.tensor([i for text in documents for i in encode_text(tokenizer, text[part])])
        for part in (slice(5400), slice(5400, None))
    )
    torch.manual_seed(0)
    config = TinyLlamaConfig.preset("nano", vocab_size=512, max_position_embeddings=128)
    model, generator = TinyLlamaForCausalLM(config).train(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=100, pct_start=0.1)
    for _ in range(100):
        starts = torch.randint(0, len(train) - 128, (4,), generator=generator)
        ids = torch.stack([train[i : i + 128] for i in starts])
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "calibration.txt").write_text("".join(text[:5400] for text in documents[:2]), encoding="utf-8")
    count = len(held_out) // 128
    return folder / "model", folder / "calibration.txt", held_out[: count * 128].view(count, 128)


@pytest.mark.slow
def test_awq_is_nearer_to_a_trained_nano_than_rounding(trained, tmp_path):
    """Compares divergences on unseen text, since rounding changes such a small model's perplexity less than chance."""
    folder, calibration, ids = trained
    as_it_is = log_probabilities(LlamaForCausalLM.from_pretrained(folder).eval(), ids)
    found = {"float": (perplexity(as_it_is, ids), 0.0)}
    for name, texts in (("rounding", []), ("AWQ", [calibration])):
        assert convert(folder, "awq", tmp_path / name, calibration=texts).notes[0].startswith(name)
        convert(tmp_path / name, "llama", tmp_path / f"{name}-back", dtype="fp32")
        log_probs = log_probabilities(LlamaForCausalLM.from_pretrained(tmp_path / f"{name}-back").eval(), ids)
        found[name] = (perplexity(log_probs, ids), divergence(as_it_is, log_probs))
    print({name: f"perplexity {p:.4f}, divergence {d:.6f}" for name, (p, d) in found.items()})
    assert found["float"][0] < 100  # of 512: it has learnt something
    assert 0 < found["AWQ"][1] < found["rounding"][1]
    assert found["AWQ"][0] < found["float"][0] * 1.005
