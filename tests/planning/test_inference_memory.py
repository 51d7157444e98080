"""The memory of generation: weights to the byte, the forward pass over prompts against torch's allocator, the largest
batch, and the command, also for folders that were saved quantized."""

import itertools
import json
import math
import re

import pytest
import torch
from huggingface_hub import constants
from torch.profiler import ProfilerActivity, profile
from transformers import BitsAndBytesConfig

from tests.conftest import run_here
from tests.conversion.test_released_names import change
from tests.hub.conftest import client_of
from tests.local_hub.server import LocalHub
from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load, load_tokenizer
from tinyllama_hf.batch.generate_many import Request, generate_many
from tinyllama_hf.decoding.ragged_cache import RaggedCache
from tinyllama_hf.errors import InputError
from tinyllama_hf.inference.load import load_draft
from tinyllama_hf.inference.options import Sampling
from tinyllama_hf.planning import inference_memory as memory_module
from tinyllama_hf.planning.inference_memory import (
    MEMORY_RESERVE,
    Setup,
    _container_free,
    batch_memory,
    check_fits,
    free_memory,
    largest_batch,
    prefill_bytes,
    weight_bytes,
)
from tinyllama_hf.planning.kv_cache import measure_cache
from tinyllama_hf.planning.named_architecture import find_architecture
from tinyllama_hf.quantization.quantized_model import QuantizedTinyLlama, measure_footprint


PUBLISHED = TinyLlamaConfig.preset("1.1b")
ODD = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "num_hidden_layers": 3}


@pytest.fixture(scope="module")
def folders(tokenizer_folder, tmp_path_factory, shared):
    """A random model, one with biases and tied embeddings, and one of odd widths."""
    made = tmp_path_factory.mktemp("models")
    for name, fields in (("nano", {}), ("odd", ODD)):
        config = TinyLlamaConfig.preset("nano", vocab_size=512, max_position_embeddings=64, **fields)
        TinyLlamaForCausalLM(config).save_pretrained(made / name)
        load_tokenizer(tokenizer_folder).save_pretrained(made / name)
    stories = shared / "data" / "models" / "stories260K"
    return {"nano": made / "nano", "odd": made / "odd", "stories": stories}


class TestWeights:
    @pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])  # int4 and fp8: tests/quantization
    @pytest.mark.parametrize("name", ["nano", "odd", "stories", pytest.param("smollm2", marks=pytest.mark.slow)])
    def test_byte_for_byte_as_loaded(self, folders, name, quantization, request):
        """SmolLM2 is a trained model in bf16."""
        folder = folders[name] if name in folders else request.getfixturevalue(name)
        found = find_architecture(str(folder))
        model, _ = load(folder, quantization=quantization)
        assert found.dtype == model.dtype
        assert weight_bytes(Setup(found.config, found.dtype, quantization)) == measure_footprint(model).weights

    def test_in_another_type(self, folders):
        """Scales are unchanged, buffers stay in fp32."""
        model, _ = load(folders["nano"], dtype=torch.bfloat16, quantization="nf4")
        config = find_architecture(str(folders["nano"])).config
        assert weight_bytes(Setup(config, torch.bfloat16, "nf4")) == measure_footprint(model).weights

    def test_published_size(self):
        """2200 MB in bf16; 4 bits per weight except for embeddings and head, and 0.125 to 0.129 bits for scales."""
        assert weight_bytes(Setup(PUBLISHED)) == 2 * 1_100_048_384 + 2 * 32 * 4
        linear = 22 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 5632)
        scales = weight_bytes(Setup(PUBLISHED, quantization="nf4")) - weight_bytes(Setup(PUBLISHED)) + linear * 3 // 2
        assert scales / linear * 8 == pytest.approx(0.127, abs=0.002)

    def test_after_a_pass_in_another_layout(self, folders):
        """The scales that repacking adds on some processors are smaller than the reserve."""
        model, _ = load(folders["nano"], quantization="nf4")
        before = measure_footprint(model).weights
        with torch.inference_mode():
            model(torch.arange(3, 20)[None])
        quantized = sum(2 * p.numel() for name, p in model.named_parameters() if "_proj" in name)
        assert 0 <= measure_footprint(model).weights - before <= quantized // 64 * 2 < MEMORY_RESERVE * before


def allocated(model, ids, mask, path):
    """Returns the peak of torch's allocator in a forward pass, without what was allocated before, and the cache.

    What an operator allocates and frees before it returns is scratch memory of its kernel and is not counted:
    it depends on the processor and the number of threads, and can be an fp32 copy of a bf16 product.
    """
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        output = model(ids, attention_mask=mask, logits_to_keep=1, use_cache=True)
    measured.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    operators = [
        event for event in events if event.get("cat") == "cpu_op" and not event["name"].startswith("aten::empty")
    ]
    changes = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    given, scratch = {}, set()
    for index, event in enumerate(changes):
        if event["args"]["Bytes"] > 0:
            inside = [each for each in operators if each["ts"] <= event["ts"] <= each["ts"] + each["dur"]]
            innermost = min(inside, key=lambda each: each["dur"], default=None)
            given[event["args"]["Addr"]] = index, innermost["ts"] + innermost["dur"] if innermost else -math.inf
        else:
            taken, end = given.pop(event["args"]["Addr"], (None, -math.inf))
            if event["ts"] <= end:
                scratch |= {taken, index}
    sizes = [event["args"]["Bytes"] for index, event in enumerate(changes) if index not in scratch]
    return max(itertools.accumulate(sizes)), measure_cache(output.past_key_values).total


class TestPrefill:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        ("config", "batch", "context"),
        [
            (TinyLlamaConfig.preset("nano", num_hidden_layers=5), 4, 300),
            (TinyLlamaConfig.preset("nano", num_hidden_layers=1), 2, 64),
            (TinyLlamaConfig.preset("nano", vocab_size=512), 3, 1000),
            (TinyLlamaConfig.preset("nano", num_key_value_heads=4), 2, 500),
            (TinyLlamaConfig.preset("nano"), 8, 2),
            pytest.param(
                TinyLlamaConfig.preset("1.1b", num_hidden_layers=3, vocab_size=2000), 2, 200, marks=pytest.mark.slow
            ),
        ],
    )
    def test_as_torchs_allocator_counts_it(self, config, batch, context, dtype, tmp_path):
        model = TinyLlamaForCausalLM(config).to(dtype).eval()
        ids = torch.ones(batch, context, dtype=torch.long)
        mask = torch.ones_like(ids)
        mask[0, 0] = 0  # prompts of different lengths
        peak, cache = allocated(model, ids, mask, tmp_path / "trace.json")
        assert peak == cache + prefill_bytes(Setup(config, dtype), batch, context)

    def test_int8_is_unknown(self):
        assert prefill_bytes(Setup(PUBLISHED, quantization="int8"), 1, 100) is None

    def test_the_configuration_is_left_alone(self):
        config = TinyLlamaConfig.preset("1.1b")
        batch_memory(Setup(config), 1, 16)
        assert config.to_dict() == TinyLlamaConfig.preset("1.1b").to_dict()


class TestLargestBatch:
    @pytest.mark.parametrize("setup", [Setup(PUBLISHED), Setup(PUBLISHED, torch.float32, "int8")])
    @pytest.mark.parametrize("usable", [5_000_000_000, 8_123_456_789])
    def test_one_more_does_not_fit(self, setup, usable):
        largest = largest_batch(setup, 2048, usable)
        assert batch_memory(setup, largest, 2048).total <= usable < batch_memory(setup, largest + 1, 2048).total

    def test_with_full_prompts(self):
        def needed(batch):
            found = batch_memory(Setup(PUBLISHED), batch, 1000)
            return found.total + found.prefill

        largest = largest_batch(Setup(PUBLISHED), 1000, 10**10, with_prefill=True)
        assert needed(largest) <= 10**10 < needed(largest + 1)
        assert largest < largest_batch(Setup(PUBLISHED), 1000, 10**10)

    def test_exactly_full(self):
        total = batch_memory(Setup(PUBLISHED), 7, 2048).total
        assert [largest_batch(Setup(PUBLISHED), 2048, total - less) for less in (0, 1)] == [7, 6]

    def test_not_even_the_weights(self):
        assert largest_batch(Setup(PUBLISHED), 2048, 10**9) == 0


class TestCheckFits:
    """With a context for which a request takes a given share of the free memory."""

    @pytest.fixture
    def model(self):
        return TinyLlamaForCausalLM(TinyLlamaConfig.preset("micro", vocab_size=512))

    def context(self, model, share):
        return int(share * free_memory(model.device) / model.kv_cache_bytes_per_token(torch.float32))

    def test_names_the_largest(self, model):
        context = self.context(model, 0.1)
        with pytest.raises(InputError) as refused:
            check_fits(model, 50, context)
        largest = int(re.search(r"can be used; the largest that fits is (\d+)$", str(refused.value))[1])
        assert str(refused.value).startswith(f"--batch-size 50: keys and values of {context:,} tokens each take ")
        assert 7 <= largest <= 9  # of the nine tenths that are not kept back; what is free changes
        check_fits(model, largest - 1, context)

    def test_not_even_one(self, model):
        with pytest.raises(
            InputError, match=r"--batch-size 2: .* can be used; not even 1 fits; shorten the sequences"
        ):
            check_fits(model, 2, self.context(model, 1))

    def test_what_fits(self, model):
        check_fits(model, 4, 2048)

    def test_a_draft_has_a_cache_too(self, model, tokenizer_folder, monkeypatch):
        """A draft of half the layers adds half as much; a draft without a model adds nothing."""
        tokenizer = load_tokenizer(tokenizer_folder)
        layers = model.config.num_hidden_layers // 2
        half, lookup = (load_draft(name, model, tokenizer) for name in (f"layers:{layers}", "lookup"))
        one = 128 * model.kv_cache_bytes_per_token(torch.float32)  # slots for 100 tokens and drafted ones
        monkeypatch.setattr(memory_module, "free_memory", lambda device: math.ceil(12 * one / (1 - MEMORY_RESERVE)))
        check_fits(model, 8, 100, half)
        check_fits(model, 12, 100, lookup)
        with pytest.raises(InputError, match=r"tokens each in model and draft take .*; the largest that fits is 8$"):
            check_fits(model, 9, 100, half)

    @pytest.mark.parametrize("draft", [None, "layers:1"])
    def test_counts_what_generation_holds(self, model, tokenizer_folder, monkeypatch, draft):
        """Equal to the largest size of the cache, to the byte."""
        tokenizer, held = load_tokenizer(tokenizer_folder), []
        draft = load_draft(draft, model, tokenizer) if draft else None
        wanted = [Request(i, [5] * 30, 40) for i in range(8)]

        def spy(cache, *arguments, real=RaggedCache.place):
            real(cache, *arguments)
            held.append(
                sum(t.nbytes for layer in cache.layers if layer.keys is not None for t in (layer.keys, layer.values))
            )

        monkeypatch.setattr(RaggedCache, "place", spy)
        assert len(list(generate_many(model, tokenizer, wanted, 4, Sampling(0, 1.0), seed=0, draft=draft))) == 8
        token = model.kv_cache_bytes_per_token(torch.float32)
        assert max(held) == 4 * 96 * token
        free = math.ceil(4 * 96 * token * (1.5 if draft else 1) / (1 - MEMORY_RESERVE))
        monkeypatch.setattr(memory_module, "free_memory", lambda device: free)
        check_fits(model, 4, 70, draft)
        with pytest.raises(InputError, match=r"the largest that fits is 4$"):
            check_fits(model, 5, 70, draft)

    def test_a_quantized_model(self, folders):
        model, _ = load(folders["nano"], quantization="nf4")
        check_fits(model, 2, 60)
        with pytest.raises(InputError, match="--batch-size 10000000: keys and values"):
            check_fits(model, 10_000_000, 64)


CGROUPS = {
    "2": ("", "memory.max", "memory.current", "inactive_file"),
    "1": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


@pytest.mark.parametrize("version", CGROUPS)
def test_the_limit_of_a_container(version, tmp_path):
    """Files in the format of the kernel; the file cache counts as free."""
    folder, limit, used, cached = CGROUPS[version]
    (tmp_path / folder).mkdir(exist_ok=True)
    for name, text in (
        (limit, "4000000\n"),
        (used, "3000000\n"),
        ("memory.stat", f"anon 5\n{cached} 250000\nfile 7\n"),
    ):
        (tmp_path / folder / name).write_text(text)
    assert _container_free(tmp_path) == 1_250_000
    (tmp_path / folder / limit).write_text("max\n")
    assert _container_free(tmp_path) == float("inf")


def test_no_container(tmp_path):
    assert _container_free(tmp_path) == float("inf")


def test_free_memory_of_this_machine():
    assert 0 < free_memory(torch.device("cpu")) < 2**50


class TestArchitecture:
    def test_by_name(self):
        for name in ("1.1b", "step-1431k-3T", "chat-v1.0", "step-715k-token-1499B"):
            found = find_architecture(name)
            assert found.config.to_dict() == PUBLISHED.to_dict() and found.source == "preset 1.1b"
        assert find_architecture("chat-v0.1").config.vocab_size == 32001, "a token was added"

    def test_a_damaged_configuration(self, folders, tmp_path):
        fields = json.loads((folders["nano"] / "config.json").read_text())
        for key, value in (("hidden_size", "wide"), ("num_attention_heads", 0), ("num_attention_heads", 7)):
            (tmp_path / "config.json").write_text(json.dumps(fields | {key: value}))
            with pytest.raises(InputError, match=r"config\.json: damaged or incomplete \("):
                find_architecture(str(tmp_path))


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Runs the command in this process; returns (exit status, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(words):
        done = run_here("tinyllama-hf", "memory", *words.split(), cwd=tmp_path)
        return done.returncode, done.stdout, done.stderr

    return run


class TestCommand:
    @pytest.mark.slow
    def test_published_model_without_hub_and_backend(self, run_command, tmp_path):
        """In a process that cannot import bitsandbytes."""
        (tmp_path / "bitsandbytes.py").write_text("raise ImportError")
        done = run_command(
            "tinyllama-hf",
            *"memory step-1431k-3T --batch 100 --context 2048 --quantization nf4 --device a100-40g".split(),
            cwd=tmp_path,
            env={"PYTHONPATH": str(tmp_path)},
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [
            "model       step-1431k-3T (preset 1.1b)",
            "weights     762.3 MB (nf4; 2.20 GB in bfloat16)",
            "cache       4.61 GB (bfloat16): 22,528 bytes per token, 46.1 MB per request of "
            "2,048 tokens, 100 requests",
            "            36.91 GB if each of the 32 heads had its own keys and values: 180,224 bytes per token, "
            "8 times as much",
            "graphs      6.09 GB of cache, since it has a fixed size on a GPU: 128 rows of 2,112 tokens",
            "total       6.85 GB of weights and cache",
            "prefill     10.70 GB more while prompts of 2,048 tokens are read at once",
            "device      NVIDIA A100-SXM4-40GB: 38.06 GB of 42.28 GB, less 10%",
            "fits        up to 768 sequences of 2,048 tokens; 234 if full prompts are read at once",
        ]

    def test_a_batch_that_does_not_fit(self, call):
        """The table is printed first."""
        status, out, error = call("1.1b --batch 1000 --device 24GB")
        assert status == 2 and "\ntotal       48.34 GB" in out and "\nfits        up to 420 sequences" in out
        assert error == (
            "error: --batch 1000: weights and cache take 48.34 GB, and 21.60 GB can be used; the largest batch that "
            "fits is 420, 441 with --quantization int8, 451 with --quantization nf4\n"
        )

    def test_a_folder_on_this_machine(self, call, folders, tmp_path):
        load(folders["nano"], dtype=torch.bfloat16)[0].save_pretrained(tmp_path / "bf16")
        status, out, error = call("bf16 --quantization int8 --batch 2 --context 50")
        assert (status, error) == (0, "")
        assert "(config.json)" in out and "bfloat16" in out and "prefill     not included" in out
        assert re.search(r"device      \w+ of this machine, free memory: [\d.]+ [GM]B of", out)

    def test_every_head_has_its_own_already(self, call, tmp_path):
        config = TinyLlamaConfig.preset("nano", num_key_value_heads=4)
        config.to_llama().save_pretrained(tmp_path / "model")
        status, out, _ = call("model --dtype fp32 --device 1GiB")
        assert status == 0 and "if each" not in out and "of 1.07 GB" in out and "8,192 bytes per token" in out

    def test_lowercase_units(self, call):
        assert "16gb: 14.40 GB of 16.00 GB" in call("nano --device 16gb")[1]

    def test_downloaded_before(self, call, monkeypatch, tmp_path, folders):
        """The configuration in the Hub's cache has the type of the weights, which the preset has not."""
        repository = tmp_path / "models--TinyLlama--TinyLlama-1.1B-Chat-v1.0"
        snapshot = repository / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc")
        fields = PUBLISHED.to_llama().to_dict() | {"dtype": "float32"}
        (snapshot / "config.json").write_text(json.dumps(fields))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        out = call("chat-v1.0")[1]
        assert "model       chat-v1.0 (downloaded before)\nweights     4.40 GB (float32)\n" in out

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("1.1b --batch 0", "--batch 0: must be at least 1"),
            ("1.1b --context 2049", "--context 2049: must be between 1 and 2048"),
            ("1.1b --context 0", "--context 0: must be between 1 and 2048"),
            (
                "1.1b --quantization nf5",
                "--quantization 'nf5': unknown quantization; use none, int8",
            ),
            ("1.1b --cache fp8", "--cache 'fp8': quantized caches were removed"),
            ("1.1b --dtype fp8", "--dtype 'fp8': "),
            ("1.1b --device a100", "--device 'a100': unknown device; use a100-40g"),
            ("1.1b --device 16XB", "or use a size such as 16GB"),
            ("pythia-1b", "not a Llama"),
            ("nanoo", "model 'nanoo': no such folder, and no released model"),
            ("nanoo", "or use a size: 1.1b, 120m, nano, micro"),
            ("someone/else", "cannot be fetched from the Hub"),
            ("step-3k-token-1B", "checkpoints exist every 5k steps"),
            (".", "holds no config.json"),
        ],
    )
    def test_bad_input(self, call, words, message):
        status, out, error = call(words)
        assert (status, out) == (2, "") and error.startswith("error: ") and message in error

    def test_a_folder_without_a_type(self, call, tmp_path):
        fields = {name: value for name, value in PUBLISHED.to_llama().to_dict().items() if name != "dtype"}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        status, _, error = call(".")
        assert status == 2 and "--dtype auto: the model's config.json has no dtype" in error
        assert "4.40 GB (float32)" in call(". --dtype fp32")[1]

    def test_reserve(self):
        assert MEMORY_RESERVE == 0.1, "as the lines above and the documentation say"


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
SAVED = {
    "int8": {"load_in_8bit": True},
    "nf4": NF4,
    "nf4, plain scales": NF4 | {"bnb_4bit_use_double_quant": False},
    "fp4": NF4 | {"bnb_4bit_quant_type": "fp4"},
    "nf4, in containers of bf16": NF4 | {"bnb_4bit_quant_storage": torch.bfloat16},
    "nf4, parts left plain": NF4 | {"llm_int8_skip_modules": ["model.layers.1.mlp", "q_proj"]},
}


class TestSavedQuantized:
    """Folders that were saved quantized."""

    @pytest.fixture
    def nf4(self, nano_folder, tmp_path):
        return self.save(nano_folder, tmp_path / "nf4", **NF4)

    def save(self, plain, folder, dtype=torch.float32, **configuration):
        options = {"dtype": dtype, "quantization_config": BitsAndBytesConfig(**configuration)}
        QuantizedTinyLlama.from_pretrained(plain, **options).save_pretrained(folder)
        load_tokenizer(plain).save_pretrained(folder)
        return folder

    @pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
    @pytest.mark.parametrize("configuration", SAVED.values(), ids=SAVED)
    def test_byte_for_byte_as_loaded(self, nano_folder, tmp_path, configuration, dtype):
        saved = self.save(nano_folder, tmp_path / "saved", dtype, **configuration)
        found, (model, _) = find_architecture(str(saved)), load(saved)
        assert found.dtype == model.dtype == dtype
        assert weight_bytes(Setup(found.config, dtype, found.quantization)) == measure_footprint(model).weights
        other = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32}[dtype]
        changed, _ = load(saved, dtype=str(other).removeprefix("torch."))
        plain = [p for p in changed.parameters() if p.is_floating_point() and not hasattr(p, "quant_state")]
        assert {p.dtype for p in plain} == {other} == {changed.dtype}
        assert weight_bytes(Setup(found.config, other, found.quantization)) == measure_footprint(changed).weights
        ids = torch.arange(3, 20)[None]
        with torch.inference_mode():
            wanted, logits = model(ids).logits.float(), changed(ids).logits.float()
        assert (logits - wanted).std() < 0.05 * wanted.std(), "the same but for bf16's rounding"

    def test_the_command(self, call, nf4, nano_folder):
        """The table equals that of the unquantized folder with the option, except for the first line."""
        words = "--device 1GiB --batch 3"
        status, out, error = call(f"nf4 {words}")
        assert (status, error) == (0, "")
        first, weights, *others = out.splitlines()
        assert first == "model       nf4 (config.json, saved as nf4)"
        held = measure_footprint(load(nf4)[0])
        assert weights == f"weights     {held.weights / 1e6:.1f} MB (nf4; {held.unquantized / 1e6:.1f} MB in float32)"
        assert call(f"{nano_folder} {words} --quantization nf4")[1].splitlines()[1:] == [weights, *others]
        assert call(f"nf4 {words} --quantization nf4")[1] == out

    @pytest.mark.parametrize("kind", ["int8", "fp4"])
    def test_another_kind(self, call, nf4, kind):
        status, out, error = call(f"nf4 --quantization {kind}")
        with pytest.raises(InputError) as refused:
            load("nf4", quantization=kind)
        assert (status, out, error) == (2, "", f"error: {refused.value}\n")

    def test_bad_input(self, call, nf4):
        assert "--quantization 'nf5': " in call("nf4 --quantization nf5")[2]
        fields = json.loads((nf4 / "config.json").read_text())
        for key, value, message in (
            ("quant_method", "awq", "quantized by awq, "),
            ("llm_int8_skip_modules", 5, "(TypeError: llm_int8_skip_modules: "),
        ):
            changed = fields["quantization_config"] | {key: value}
            (nf4 / "config.json").write_text(json.dumps(fields | {"quantization_config": changed}))
            status, out, error = call("nf4")
            assert (status, out) == (2, "") and message in error

    def test_a_batch_that_does_not_fit(self, call, nf4):
        """A saved quantization cannot be changed, so that none is suggested."""
        status, _, error = call("nf4 --batch 1000 --device 20MB")
        assert status == 2 and "--batch 1000: " in error and "--quantization" not in error

    def test_on_the_hub(self, nf4, call, tmp_path):
        """Only the configuration is downloaded."""
        hub = LocalHub(tmp_path / "hub")
        hub.storage.create("models", "someone/nf4", private=False)
        changes = [change(hub, file) for file in sorted(nf4.iterdir())]
        hub.storage.commit("models", "someone/nf4", "main", "a model", changes, parent="")
        with hub.serving(), client_of(hub.endpoint, tmp_path / "hf-home"):
            status, out, error = call("someone/nf4")
        assert (status, error) == (0, "") and "model       someone/nf4 (config.json, saved as nf4)\n" in out
        (snapshot,) = tmp_path.glob("hf-home/hub/models--someone--nf4/snapshots/*")
        assert [file.name for file in snapshot.iterdir()] == ["config.json"]
