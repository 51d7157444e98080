"""Tests the format `awq` with a reader written from the published layout, and against rounding on trained models.

transformers 5.23 cannot unpack the layout itself; it uses gptqmodel.
"""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, LlamaForCausalLM
from transformers.utils.quantization_config import AwqConfig, AwqFormat

from tinyllama_hf import load_tokenizer
from tinyllama_hf.conversion.awq.packing import pack, unpack
from tinyllama_hf.conversion.awq.write import GROUP_SIZE, write_awq
from tinyllama_hf.conversion.checkpoint import Checkpoint, LazyTensor, plain_config, validate
from tinyllama_hf.conversion.quantized import four_bit, search
from tinyllama_hf.conversion.quantized.rounding import dequantize_groups, quantize_groups
from tinyllama_hf.conversion.quantized.search import calibration_tokens, clip_layer, observe_layer, scale_layer
from tinyllama_hf.errors import InputError
from tinyllama_hf.provenance import file_sha256
from tinyllama_hf.tokenization_tinyllama import encode_text


MICRO = {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 128}  # fmt: skip
# As vLLM documents it: where each of a word's eight columns begins.
SHIFTS = np.array([0, 16, 4, 20, 8, 24, 12, 28])


def random_model(**fields):
    torch.manual_seed(0)
    return LlamaForCausalLM(plain_config(**MICRO | fields)).eval()


def as_checkpoint(model, tokenizer=None, loaded=None):
    """A checkpoint with a model's tensors; `loaded` receives the name of every tensor that is read."""

    def lazy(name, tensor):
        def read():
            if loaded is not None:
                loaded.append(name)
            return tensor.clone()

        return LazyTensor(tuple(tensor.shape), tensor.dtype, read, f"model:{name}")

    tensors = {name: lazy(name, tensor) for name, tensor in model.state_dict().items()}
    return validate(Checkpoint(tokenizer, "test", model.config, tensors, tokenizer))


def written(checkpoint, folder, calibration=None):
    folder.mkdir(exist_ok=True)
    note, digests = write_awq(checkpoint, folder, calibration, 1 << 30)
    assert digests == {"model.safetensors": file_sha256(folder / "model.safetensors")}
    return load_file(folder / "model.safetensors"), [note]


def unpack_as_published(words):
    """int32 `[rows, columns / 8]` to `[rows, columns]`."""
    return ((words.numpy()[..., None] >> SHIFTS) & 15).reshape(words.shape[0], -1)


def dequantize_awq(tensors, config):
    """The model from tensors in this layout, computed without the package."""
    state = {name: t.float() for name, t in tensors.items() if not name.endswith(("qweight", "qzeros", "scales"))}
    for name in [name for name in tensors if name.endswith(".qweight")]:
        module = name.removesuffix("qweight")
        integers, zeros = unpack_as_published(tensors[name]), unpack_as_published(tensors[f"{module}qzeros"])
        scales = tensors[f"{module}scales"].numpy()
        groups = integers.shape[0] // scales.shape[0]
        weight = (integers - zeros.repeat(groups, 0)).astype(np.float16) * scales.repeat(groups, 0)  # [in, out]
        state[f"{module}weight"] = torch.from_numpy(weight.T.astype(np.float32))
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(state)
    return model


def fake_quantized(checkpoint, tokens=None):
    """The model with every linear weight rounded in memory, after the search if tokens are given."""
    state = {name: checkpoint.load(name, torch.float32) for name in checkpoint.tensors}
    for name in state:
        if ".layers." not in name:
            state[name] = state[name].half().float()
    model = LlamaForCausalLM(checkpoint.config).eval()
    model.load_state_dict(state)
    hidden = None if tokens is None else state["model.embed_tokens.weight"][tokens]
    for layer in model.model.layers:
        weights = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        if hidden is not None:
            seen = observe_layer(checkpoint.config, weights, hidden)
            scale_layer(checkpoint.config, weights, seen, GROUP_SIZE)
            clip_layer(checkpoint.config, weights, seen, GROUP_SIZE)
        for name, weight in weights.items():
            rounded = dequantize_groups(*quantize_groups(weight, GROUP_SIZE)) if weight.ndim == 2 else weight.half()
            weights[name] = rounded.float()
        layer.load_state_dict(weights)
    return model


@torch.no_grad()
def log_probabilities(model, ids):
    return torch.cat([model(input_ids=batch).logits.log_softmax(-1) for batch in ids.split(16)])


def perplexity(log_probs, ids):
    return math.exp(-log_probs[:, :-1].gather(2, ids[:, 1:, None]).mean().item())


def divergence(log_probs, other):
    """Mean Kullback-Leibler divergence of a model from the first, in nats per token."""
    return (log_probs.exp() * (log_probs - other)).sum(-1).mean().item()


# Packing and rounding


def test_packing_round_trip_in_the_published_order():
    integers = torch.randint(0, 16, (5, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    words = pack(integers)
    assert words.dtype == torch.int32 and words.shape == (5, 8)
    assert torch.equal(unpack(words), integers)
    assert np.array_equal(unpack_as_published(words), integers.numpy())
    # Columns 0 to 7 of a word, written out: nibbles from the low end hold 0, 2, 4, 6, 1, 3, 5, 7.
    assert pack(torch.arange(8)[None]).item() & 0xFFFFFFFF == 0x75316420


@pytest.mark.parametrize("shift", (0.0, 3.0, -3.0))
def test_rounding_takes_the_nearest_level_of_the_scale_in_the_file(shift):
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0)) * 0.02 + shift
    integers, scales, zeros = quantize_groups(weight, 128)
    assert (integers.shape, scales.shape, zeros.shape) == ((16, 256), (16, 2), (16, 2))
    assert scales.dtype == torch.float16 and integers.max() <= 15 and zeros.max() <= 15
    again = dequantize_groups(integers, scales, zeros)
    assert again.dtype == torch.float16
    # Half a step; the last level gives way by what the scale was rounded, and the product is rounded once.
    bound = scales.float().repeat_interleave(128, 1) * 0.51 + weight.abs() * 2.0**-11
    assert ((again.float() - weight).abs() <= bound).all()


def test_groups_of_zeros_and_exact_levels_come_back_bit_for_bit():
    assert not dequantize_groups(*quantize_groups(torch.zeros(8, 128), 128)).any()
    levels = (torch.arange(128) % 16 - 5).repeat(8, 1) * 0.25
    assert torch.equal(dequantize_groups(*quantize_groups(levels, 128)).float(), levels)


# What is written


def test_the_folder_read_as_published_is_the_rounded_model(tmp_path):
    checkpoint = as_checkpoint(random_model())
    tensors, notes = written(checkpoint, tmp_path)
    ids = torch.arange(3, 67)[None]
    with torch.no_grad():
        found = dequantize_awq(tensors, checkpoint.config)(input_ids=ids).logits
        expected = fake_quantized(checkpoint)(input_ids=ids).logits
    assert (found - expected).abs().max() <= 1e-5
    assert notes[0].startswith("rounding (RTN)") and "AWQ" not in "".join(notes)


@pytest.mark.slow
def test_the_folder_read_as_published_is_the_searched_model(tmp_path, tokenizer_folder, documents):
    checkpoint = as_checkpoint(random_model(), tokenizer_folder)
    tensors, notes = written(checkpoint, tmp_path / "first", documents[:2])
    again, _ = written(checkpoint, tmp_path / "second", documents[:2])
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())
    tokens = calibration_tokens(documents[:2], load_tokenizer(tokenizer_folder), checkpoint.config)
    assert tokens.shape[1] == 128 and tokens[0, 0] == 1
    ids = torch.arange(3, 67)[None]
    with torch.no_grad():
        found = dequantize_awq(tensors, checkpoint.config)(input_ids=ids).logits
        expected = fake_quantized(checkpoint, tokens)(input_ids=ids).logits
    assert (found - expected).abs().max() <= 1e-5
    assert notes[0].startswith("AWQ") and f"{len(tokens)} sequences of 128 tokens" in notes[0]


def test_layout_and_configuration_are_what_readers_take(tmp_path):
    checkpoint = as_checkpoint(random_model(tie_word_embeddings=True))
    tensors, _ = written(checkpoint, tmp_path)
    assert tensors["model.layers.1.mlp.down_proj.qweight"].shape == (512, 256 // 8)
    assert tensors["model.layers.1.mlp.down_proj.qzeros"].shape == (512 // 128, 256 // 8)
    assert tensors["model.layers.1.mlp.down_proj.scales"].shape == (512 // 128, 256)
    assert len([name for name in tensors if name.endswith("qweight")]) == 2 * 7
    assert {t.dtype for t in tensors.values()} == {torch.int32, torch.float16}
    assert "lm_head.weight" not in tensors
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.dtype == torch.float16 and config.model_type == "llama"
    assert config.quantization_config["quant_method"] == "awq"
    read = AwqConfig.from_dict(config.quantization_config)
    assert (read.bits, read.group_size, read.zero_point, read.format) == (4, 128, True, AwqFormat.GEMM)
    assert read.modules_to_not_convert == ["lm_head"]
    assert not hasattr(checkpoint.config, "quantization_config")


@pytest.mark.slow
def test_one_decoder_layer_is_read_at_a_time(tmp_path, tokenizer_folder, documents, monkeypatch):
    loaded = []
    checkpoint = as_checkpoint(random_model(num_hidden_layers=3), tokenizer_folder, loaded)

    def in_step(folder, specs, tensors, max_shard_size):
        for name, _ in zip(specs, tensors, strict=True):
            if ".layers." in name:
                assert loaded[-1].split(".")[2] == name.split(".")[2]

    monkeypatch.setattr(four_bit, "write_safetensors", in_step)
    write_awq(checkpoint, tmp_path, documents[:1], 1 << 30)
    assert sorted(loaded) == sorted(checkpoint.tensors)


# The search


@pytest.mark.parametrize("fields", ({}, {"num_key_value_heads": 4}, {"head_dim": 32, "hidden_act": "gelu"}), ids=str)
def test_folded_scales_change_nothing_but_the_rounding(fields, tokenizer_folder, documents, monkeypatch):
    # The widest spread of scales that the grid has, for every group.
    monkeypatch.setattr(search, "_output_error", lambda weight, scales, *others: -scales.max().item())
    model = random_model(**fields)
    ids = calibration_tokens(documents[:1], load_tokenizer(tokenizer_folder), model.config)
    with torch.no_grad():
        before = model(input_ids=ids, output_hidden_states=True)
        for i, layer in enumerate(model.model.layers):
            weights, hidden = dict(layer.state_dict()), before.hidden_states[i].clone()
            seen = observe_layer(model.config, weights, hidden)
            if i + 1 < len(model.model.layers):
                assert torch.allclose(hidden, before.hidden_states[i + 1], atol=1e-5)
            old = {name: weight.clone() for name, weight in weights.items()}
            scale_layer(model.config, weights, seen, GROUP_SIZE)
            assert all(not torch.equal(old[name], weights[name]) for name in weights), "some weight was left out"
            again = observe_layer(model.config, weights, before.hidden_states[i].clone())
            for producer, inputs in seen.items():  # that clipping is measured with
                scale = inputs.gram.abs().max()
                assert torch.allclose(inputs.gram / scale, again[producer].gram / scale, atol=1e-4), producer
        assert torch.allclose(model(input_ids=ids).logits, before.logits, atol=1e-4)


@pytest.fixture(scope="module")
def trained(documents, tokenizer_folder):
    """A micro model after 150 steps, and ids `[windows, 128]` of unseen text from the same sources."""
    tokenizer = load_tokenizer(tokenizer_folder)
    train, held_out = (
        torch.tensor([i for text in documents for i in encode_text(tokenizer, text[part])])
        for part in (slice(5400), slice(5400, None))
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # steps this small are faster without waiting for each other
    model, generator = random_model().train(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=150, pct_start=0.1)
    for _ in range(150):
        starts = torch.randint(0, len(train) - 128, (8,), generator=generator)
        ids = torch.stack([train[i : i + 128] for i in starts])
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    torch.set_num_threads(threads)
    count = len(held_out) // 128
    return model.eval(), held_out[: count * 128].view(count, 128)


def with_outlier_channels(model, channels=24, factor=30.0):
    """The same function with some channels `factor` times as large, like outliers in large language models.

    The layer before the channel is multiplied, the layer after it divided.
    """
    state, generator = {name: t.clone() for name, t in model.state_dict().items()}, torch.Generator().manual_seed(1)
    attention, mlp = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
    for i in range(model.config.num_hidden_layers):
        for producer, consumers in (
            ("input_layernorm", attention),
            ("post_attention_layernorm", mlp),
            ("mlp.up_proj", ("mlp.down_proj",)),
        ):
            weight = state[f"model.layers.{i}.{producer}.weight"]
            chosen = torch.randperm(len(weight), generator=generator)[:channels]
            weight[chosen] *= factor
            for consumer in consumers:
                state[f"model.layers.{i}.{consumer}.weight"][:, chosen] /= factor
    other = LlamaForCausalLM(model.config).eval()
    other.load_state_dict(state)
    return other


def compared(model, ids, folder, calibration):
    """Perplexity and divergence from the float model for each way of writing it."""
    checkpoint, calibrated = as_checkpoint(model, calibration[0]), calibration[1]
    float_model = log_probabilities(model, ids)
    found = {"float": (perplexity(float_model, ids), 0.0)}
    for name, texts in (("rounding", None), ("AWQ", calibrated)):
        tensors, _ = written(checkpoint, folder / name, texts)
        log_probs = log_probabilities(dequantize_awq(tensors, checkpoint.config), ids)
        found[name] = (perplexity(log_probs, ids), divergence(float_model, log_probs))
    print(found)
    return found


@pytest.mark.slow
def test_scales_bring_a_trained_model_nearer_to_what_it_was(trained, documents, tokenizer_folder, tmp_path):
    """Rounding costs such a small model, which has no outlier channels, less perplexity than random variation."""
    model, ids = trained
    found = compared(model, ids, tmp_path, (tokenizer_folder, [text[:5400] for text in documents[:12]]))
    assert found["AWQ"][1] < found["rounding"][1]
    assert found["AWQ"][0] < found["float"][0] * 1.005


@pytest.mark.slow
def test_perplexity_is_below_that_of_rounding_where_channels_stand_out(trained, documents, tokenizer_folder, tmp_path):
    model, ids = trained
    other = with_outlier_channels(model)
    assert torch.allclose(log_probabilities(other, ids[:4]), log_probabilities(model, ids[:4]), atol=1e-3)
    found = compared(other, ids, tmp_path, (tokenizer_folder, [text[:5400] for text in documents[:12]]))
    assert found["AWQ"][0] < found["rounding"][0]
    # At least nine tenths of what rounding does to the distribution is undone.
    assert found["AWQ"][1] < 0.1 * found["rounding"][1]


@pytest.mark.slow
def test_a_cut_of_the_shape_of_1_1b(tmp_path, tokenizer_folder, documents):
    model = random_model(
        hidden_size=2048, intermediate_size=5632, num_attention_heads=32, num_key_value_heads=4, num_hidden_layers=1
    )
    checkpoint = as_checkpoint(model, tokenizer_folder)
    tensors, notes = written(checkpoint, tmp_path, documents[:1])
    assert notes[0].startswith("AWQ")
    for name, weight in model.model.layers[0].state_dict().items():
        module = f"model.layers.0.{name.removesuffix('weight')}"
        if weight.ndim == 1:
            continue
        rows, width = weight.shape
        assert tensors[f"{module}qweight"].shape == (width, rows // 8)
        assert tensors[f"{module}qzeros"].shape == (width // 128, rows // 8)
        assert tensors[f"{module}scales"].shape == (width // 128, rows)
    ids = torch.arange(3, 67)[None]
    loss = divergence(
        log_probabilities(model, ids), log_probabilities(dequantize_awq(tensors, checkpoint.config), ids)
    )
    assert loss < 0.1  # plain rounding: 0.055; a wrong order of anything would be whole nats away


# What is refused


@pytest.mark.parametrize(
    ("fields", "named"),
    (
        (
            {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3},
            r"q_proj\.weight: 576 inputs.* 128",
        ),
        ({"intermediate_size": 1000}, r"layers\.0\.mlp\.down_proj\.weight: 1000 inputs.* 128"),
        ({"num_attention_heads": 32, "num_key_value_heads": 1, "head_dim": 4}, r"k_proj\.weight: 4 outputs.* 8"),
        ({"attention_bias": True}, r"layers\.0\.self_attn\.q_proj\.bias: .*bias"),
        ({"mlp_bias": True}, r"layers\.0\.mlp\.gate_proj\.bias: .*bias"),
    ),
    ids=str,
)
def test_what_the_layout_cannot_hold_is_refused_by_name(fields, named, tmp_path):
    with pytest.raises(InputError, match=named) as raised:
        write_awq(as_checkpoint(random_model(**fields)), tmp_path, None, 1 << 30)
    assert "AWQ" not in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name",
    (
        "model.embed_tokens.weight",
        "model.layers.1.input_layernorm.weight",
        "lm_head.weight",
        "model.layers.1.mlp.up_proj.weight",
    ),
)
def test_values_beyond_float16_are_refused_by_name(name, tmp_path):
    model = random_model()
    with torch.no_grad():
        model.get_parameter(name).flatten()[7] = 2e6
    with pytest.raises(InputError, match=rf"{name}: .*65504"):
        write_awq(as_checkpoint(model), tmp_path, None, 1 << 30)


def test_calibration_needs_a_tokenizer_and_a_sequence(tmp_path, tokenizer_folder):
    with pytest.raises(InputError, match=r"no tokenizer.*rounding \(RTN\)"):
        write_awq(as_checkpoint(random_model()), tmp_path, ["text"], 1 << 30)
    with pytest.raises(InputError, match=r"\d+ tokens; .* 128"):
        write_awq(as_checkpoint(random_model(), tokenizer_folder), tmp_path, ["too short"], 1 << 30)
    assert not list(tmp_path.iterdir())
