"""The model compared with `transformers.LlamaForCausalLM` with the same weights."""

import json
import math
import subprocess
import sys
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, losses
from tinyllama_hf.errors import InputError


@pytest.fixture(params=["eager", "sdpa"])
def pair(request):
    """Returns (ours, stock) with equal weights, for each attention implementation."""
    return make_pair(request.param)


def make_pair(attention: str = "sdpa", **overrides) -> tuple[TinyLlamaForCausalLM, LlamaForCausalLM]:
    torch.manual_seed(0)
    fields = {"vocab_size": 320, "max_position_embeddings": 64, **overrides}
    config = TinyLlamaConfig.preset("micro", **fields)
    ours = TinyLlamaForCausalLM._from_config(config, attn_implementation=attention).eval()
    # With the published initialization, attention would hardly matter: widen the weights.
    for parameter in ours.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.08)
    stock = LlamaForCausalLM._from_config(config.to_llama(), attn_implementation=attention).eval()
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def ids(batch: int, length: int, vocab: int = 320) -> torch.Tensor:
    return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(1))


class TestLogits:
    def test_state_dict_keys_are_stock(self, pair):
        ours, stock = pair
        assert list(ours.state_dict()) == list(stock.state_dict())

    @pytest.mark.parametrize("use_cache", [False, True])
    def test_equal_bit_for_bit(self, pair, use_cache):
        ours, stock = pair
        inputs = {"input_ids": ids(3, 40), "use_cache": use_cache}
        assert torch.equal(ours(**inputs).logits, stock(**inputs).logits)

    def test_equal_token_by_token_through_the_cache(self, pair):
        ours, stock = pair
        tokens, caches = ids(2, 12), [None, None]
        for i in range(12):
            outputs = []
            for j, model in enumerate((ours, stock)):
                output = model(input_ids=tokens[:, i : i + 1], past_key_values=caches[j], use_cache=True)
                caches[j] = output.past_key_values
                outputs.append(output.logits)
            assert torch.equal(*outputs)

    def test_equal_left_padded(self, pair):
        ours, stock = pair
        tokens, mask = ids(3, 20), torch.ones(3, 20, dtype=torch.long)
        mask[1, :7] = 0
        mask[2, :13] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        assert torch.equal(ours(**inputs).logits, stock(**inputs).logits)

    def test_equal_packed(self, pair):
        ours, stock = pair
        positions = torch.tensor([[*range(9), *range(20), *range(11)]])
        packed = ours(input_ids=ids(1, 40), position_ids=positions).logits
        assert torch.equal(packed, stock(input_ids=ids(1, 40), position_ids=positions, use_cache=False).logits)
        alone = ours(input_ids=ids(1, 40)[:, 9:29]).logits
        torch.testing.assert_close(packed[:, 9:29], alone, atol=1e-5, rtol=1e-5)

    def test_generate_equals_stock(self, pair):
        ours, stock = pair
        tokens, mask = ids(3, 10), torch.ones(3, 10, dtype=torch.long)
        mask[1, :4] = 0
        inputs = {
            "input_ids": tokens,
            "attention_mask": mask,
            "max_new_tokens": 20,
            "do_sample": False,
            "pad_token_id": 0,
        }
        assert torch.equal(ours.generate(**inputs), stock.generate(**inputs))


class TestPacking:
    positions = torch.tensor([[*range(9), *range(20), *range(11)]])

    def test_stock_joins_documents_under_a_mask(self):
        """With a mask of ones, stock Llama lets documents attend to each other. Ours refuses it."""
        _, stock = make_pair()
        inputs = {"input_ids": ids(1, 40), "position_ids": self.positions}
        apart = stock(**inputs, use_cache=False).logits
        joined = stock(**inputs, attention_mask=torch.ones(1, 40, dtype=torch.long)).logits
        assert (apart - joined).abs().max() > 0.01

    @pytest.mark.parametrize("given", ["attention_mask", "use_cache", "past_key_values"])
    def test_mask_or_cache_is_refused(self, given):
        from transformers import DynamicCache

        ours, _ = make_pair()
        value = {
            "attention_mask": torch.ones(1, 40, dtype=torch.long),
            "use_cache": True,
            "past_key_values": DynamicCache(config=ours.config),
        }[given]
        with pytest.raises(ValueError, match=f"packed, but .*{given}"):
            ours(input_ids=ids(1, 40), position_ids=self.positions, **{given: value})

    def test_each_documents_loss_is_its_loss_alone(self):
        ours, _ = make_pair()
        ours.train()
        tokens, labels = ids(1, 40), torch.full((1, 40), -100)
        labels[:, 9:29] = tokens[:, 9:29]
        labels[:, 9] = -100  # its predecessor is in another document
        packed = ours(input_ids=tokens, labels=labels, position_ids=self.positions).loss
        alone = ours(input_ids=tokens[:, 9:29], labels=tokens[:, 9:29]).loss
        torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


class TestLoss:
    @pytest.mark.parametrize("num_items", [None, 50, torch.tensor(50)])
    @pytest.mark.parametrize("tied", [False, True])
    def test_loss_and_gradients_equal_stock(self, num_items, tied):
        ours, stock = make_pair(tie_word_embeddings=tied)
        tokens = ids(4, 60)
        labels = tokens.clone()
        labels[0, :30] = -100
        arguments = {"input_ids": tokens, "labels": labels}
        if num_items is not None:
            arguments["num_items_in_batch"] = num_items
        losses = []
        for model in (ours.train(), stock.train()):
            losses.append(model(**arguments).loss)
            losses[-1].backward()
        torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)
        for (name, a), (_, b) in zip(ours.named_parameters(), stock.named_parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5, msg=name)

    def test_more_tokens_than_a_chunk(self, monkeypatch):
        from tinyllama_hf import losses

        ours, stock = make_pair()
        monkeypatch.setattr(losses, "chunk_tokens", lambda *_: 7)
        monkeypatch.setitem(losses.ROWS, "cpu", 3)
        tokens = ids(3, 50)
        a, b = (model(input_ids=tokens, labels=tokens).loss for model in (ours.train(), stock.train()))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

    def test_shift_labels(self):
        ours, _ = make_pair()
        ours.train()
        tokens = ids(2, 33)
        shifted = ours(input_ids=tokens[:, :-1], labels=tokens[:, 1:], shift_labels=tokens[:, 1:]).loss
        plain = torch.cat([tokens[:, :-1], tokens[:, -1:]], dim=1)
        torch.testing.assert_close(shifted, ours(input_ids=plain, labels=plain).loss)

    def test_bf16_autocast_is_near_stock(self):
        ours, stock = make_pair()
        tokens = ids(4, 60)
        losses = []
        for model in (ours.train(), stock.train()):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                losses.append(model(input_ids=tokens, labels=tokens).loss)
            losses[-1].backward()
        torch.testing.assert_close(*losses, atol=1e-2, rtol=1e-2)
        assert ours.lm_head.weight.grad.dtype == torch.float32
        torch.testing.assert_close(ours.lm_head.weight.grad, stock.lm_head.weight.grad, atol=2e-3, rtol=0.1)

    def test_logits_are_none_only_in_training_with_labels(self):
        ours, stock = make_pair()
        tokens = ids(2, 8)
        assert ours.train()(input_ids=tokens, labels=tokens).logits is None
        assert ours(input_ids=tokens).logits is not None
        evaluated, reference = ours.eval()(input_ids=tokens, labels=tokens), stock(input_ids=tokens, labels=tokens)
        assert torch.equal(evaluated.logits, reference.logits) and torch.equal(evaluated.loss, reference.loss)

    def test_training_keeps_no_cache(self):
        model, _ = make_pair()
        tokens = ids(1, 8)
        assert model.train()(input_ids=tokens, labels=tokens).past_key_values is None

    def test_without_gradients_none_are_computed(self, monkeypatch):
        """Validation runs in training mode under no_grad, where no gradient of the weight may be computed."""
        hidden, weight, labels = torch.randn(6, 8), torch.randn(16, 8, requires_grad=True), torch.randint(0, 16, (6,))
        expected = losses.linear_cross_entropy_sum(hidden, weight, labels)
        products = []
        monkeypatch.setattr(torch.Tensor, "scatter_add_", lambda *arguments: products.append(1))
        with torch.no_grad():
            assert torch.equal(losses.linear_cross_entropy_sum(hidden, weight, labels), expected.detach())
        assert not products

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from /proc")
    @pytest.mark.parametrize("which", ["ours", pytest.param("stock", marks=pytest.mark.slow)])
    def test_peak_memory_is_bounded(self, which):
        """4096 tokens x 32000 ids are 524 MB of logits. Stock needs several copies, ours none."""
        script = """
import sys, torch
from tinyllama_hf.losses import linear_cross_entropy_sum
hidden = torch.randn(4096, 64, requires_grad=True); weight = torch.randn(32000, 64, requires_grad=True)
labels = torch.randint(0, 32000, (4096,))
def peak():  # of this process alone; getrusage would begin at the peak of pytest
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) // 1024
before = peak()
if sys.argv[1] == "ours":
    loss = linear_cross_entropy_sum(hidden, weight, labels)
else:
    loss = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum")
loss.backward()
print(peak() - before)
"""
        command = [sys.executable, "-c", script, which]
        used = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert used < 300 if which == "ours" else used > 1000


class TestInitialisation:
    @pytest.mark.parametrize("preset", ["nano", "micro"])
    def test_measured_spread_of_every_parameter(self, preset):
        torch.manual_seed(0)
        config = TinyLlamaConfig.preset(preset, vocab_size=1024)
        for name, parameter in TinyLlamaForCausalLM(config).named_parameters():
            if "norm" in name:
                assert torch.equal(parameter, torch.ones_like(parameter)), name
                continue
            ends_block = name.endswith(("o_proj.weight", "down_proj.weight"))
            d = config.hidden_size
            expected = 1 / (math.sqrt(d) * config.num_hidden_layers) if ends_block else math.sqrt(2 / (5 * d))
            assert parameter.std().item() == pytest.approx(expected, rel=0.02), name
            assert abs(parameter.mean().item()) < expected / 20, name

    def test_biases_and_the_padding_row_are_zero_unless_loaded(self, tmp_path):
        config = TinyLlamaConfig.preset(
            "micro",
            vocab_size=64,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=1,
            pad_token_id=3,
            attention_bias=True,
            mlp_bias=True,
        )
        torch.manual_seed(0)
        model = TinyLlamaForCausalLM(config)
        biases = {name: parameter for name, parameter in model.named_parameters() if name.endswith("bias")}
        assert {name.split(".")[-2] for name in biases} == {
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        }
        for name, zeros in {**biases, "padding": model.model.embed_tokens.weight[3]}.items():
            assert torch.equal(zeros, torch.zeros_like(zeros)), name
        for parameter in model.parameters():
            parameter.data.fill_(0.5)
        model.save_pretrained(tmp_path)
        for name, parameter in TinyLlamaForCausalLM.from_pretrained(tmp_path).named_parameters():
            assert torch.equal(parameter, torch.full_like(parameter, 0.5)), name

    def test_published_values_for_1_1b(self):
        config = TinyLlamaConfig.preset("1.1b")
        assert math.sqrt(2 / (5 * config.hidden_size)) == pytest.approx(0.01398, abs=1e-5)
        assert 1 / (math.sqrt(config.hidden_size) * config.num_hidden_layers) == pytest.approx(0.001004, abs=1e-6)

    def test_loaded_weights_are_not_redrawn(self, tmp_path):
        ours, _ = make_pair()
        ours.save_pretrained(tmp_path)
        loaded = TinyLlamaForCausalLM.from_pretrained(tmp_path)
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name]), name


class TestSaving:
    def test_plain_llama_folder(self, tmp_path):
        ours, _ = make_pair()
        ours.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
        assert config["pad_token_id"] is None
        assert json.loads((tmp_path / "generation_config.json").read_text())["pad_token_id"] == 0
        assert (tmp_path / "model.safetensors").is_file()
        stock = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(stock) is LlamaForCausalLM
        assert torch.equal(stock(input_ids=ids(1, 9)).logits, ours(input_ids=ids(1, 9)).logits)
        assert type(ours.config) is TinyLlamaConfig, "saving must not change the model"

    def test_as_tinyllama(self, tmp_path):
        ours, _ = make_pair()
        ours.save_pretrained(tmp_path, as_tinyllama=True)
        assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "tinyllama"
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is TinyLlamaForCausalLM

    def test_loading_a_plain_folder_warns_of_nothing(self, tmp_path, caplog):
        ours, _ = make_pair()
        ours.save_as_llama(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = TinyLlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
        assert not caplog.records
        assert loaded.dtype == torch.bfloat16 and loaded.config._attn_implementation == "eager"

    def test_another_family_is_refused(self, tmp_path):
        from transformers import GPT2Config

        GPT2Config(n_layer=1, n_embd=8, n_head=2).save_pretrained(tmp_path)
        with pytest.raises(InputError, match="gpt2"):
            TinyLlamaForCausalLM.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def big():
    """Returns the published architecture on the meta device."""
    with torch.device("meta"):
        return TinyLlamaForCausalLM(TinyLlamaConfig.preset("1.1b"))


class TestAccounting:
    def test_parameters(self, big):
        assert sum(p.numel() for p in big.parameters()) == 1_100_048_384
        assert len(big.state_dict()) == 201

    def test_flops(self, big):
        assert big.flops_per_token() / 1e9 == pytest.approx(7.31, abs=0.005)
        assert big.flops_per_token(2048, "all_parameters") / 1e9 == pytest.approx(7.71, abs=0.005)
        with pytest.raises(ValueError, match="convention"):
            big.flops_per_token(convention="halved")

    def test_tied_weights_multiply_once(self):
        tied, untied = make_pair(tie_word_embeddings=True)[0], make_pair()[0]
        assert tied.flops_per_token(64) == untied.flops_per_token(64)
        assert tied.flops_per_token(64, "all_parameters") == untied.flops_per_token(64, "all_parameters")

    def test_kv_cache(self, big):
        assert big.kv_cache_bytes_per_token() == 22_528
        ours, _ = make_pair()
        cache = ours(input_ids=ids(1, 10), use_cache=True).past_key_values
        measured = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
        assert ours.kv_cache_bytes_per_token(torch.float32) * 10 == measured
