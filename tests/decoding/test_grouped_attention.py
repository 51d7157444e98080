"""Attention without copies of keys and values: equal to sdpa, also in stock models, and free of copies."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations import sdpa_attention

from tinyllama_hf.decoding.grouped_attention import GQA_PACKED, gqa_packed_attention, packed_attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask_kind", ["none", "bool", "added", "by head"])
@pytest.mark.parametrize(
    "shape", [(1, 8, 2, 5, 33), (3, 8, 1, 4, 17), (2, 6, 6, 3, 9), (2, 8, 4, 1, 20), (1, 4, 2, 90, 90)]
)
def test_equal_to_sdpa(shape, mask_kind, dtype):
    batch, heads, key_value_heads, queries, keys = shape
    torch.manual_seed(0)
    query = torch.randn(batch, heads, queries, 16, dtype=dtype)
    # Views of a larger buffer, as from a cache.
    key, value = (torch.randn(batch, key_value_heads, keys + 7, 16, dtype=dtype)[:, :, :keys] for _ in range(2))
    mask = torch.rand(batch, heads if mask_kind == "by head" else 1, queries, keys) < 0.7
    mask[..., 0] = True
    mask = {"none": None, "added": torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)}.get(
        mask_kind, mask
    )
    module = SimpleNamespace(num_key_value_groups=heads // key_value_heads, is_causal=True)
    expected, _ = sdpa_attention.sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    ours, weights = gqa_packed_attention(module, query, key, value, mask, scaling=0.3)
    assert weights is None and ours.shape == expected.shape == (batch, queries, heads, 16) and ours.is_contiguous()
    # Both sum values with weights that add up to one; each weight and each sum is rounded at least once.
    assert (ours - expected).abs().max() <= 2 * torch.finfo(dtype).eps * value.abs().max()


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    stock = LlamaForCausalLM(config).eval()
    packed = LlamaForCausalLM._from_config(copy.deepcopy(config), attn_implementation=GQA_PACKED).eval()
    packed.load_state_dict(stock.state_dict())
    assert stock.config._attn_implementation == "sdpa" and packed.config._attn_implementation == GQA_PACKED
    return stock, packed


def test_a_stock_model_by_name(models):
    """Left-padded, several tokens after a cache: the pass that verifies drafted tokens."""
    stock, packed = models
    ids = torch.randint(1, 96, (3, 20))
    mask = torch.ones_like(ids)
    mask[0, :6] = mask[2, :11] = 0
    for model in (stock, packed):
        with torch.inference_mode():
            first = model(ids[:, :15], attention_mask=mask[:, :15], use_cache=True)
            model.last = model(ids[:, 15:], attention_mask=mask, past_key_values=first.past_key_values).logits
    assert (stock.last - packed.last).abs().max() < 1e-5
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(stock.generate(ids, **options), packed.generate(ids, **options))


def test_gradients_pass(models):
    stock, packed = models
    ids = torch.randint(1, 96, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for model in (stock, packed):
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids.where(mask.bool(), -100)).loss.backward()
    for a, b in zip(stock.parameters(), packed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_nothing_is_copied(models, monkeypatch):
    """Stock sdpa repeats keys and values here. If this fails, ours is no longer needed."""
    stock, packed = models
    ids = torch.randint(1, 96, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0

    def refuse(*args):
        raise AssertionError("keys and values are repeated")

    monkeypatch.setattr(sdpa_attention, "repeat_kv", refuse)
    packed(ids, attention_mask=mask)
    with pytest.raises(AssertionError, match="repeated"):
        stock(ids, attention_mask=mask)


def test_for_a_while_and_by_several_at_a_time(models):
    """Two contexts for one model, as in threads of a server: the first exit does not restore the attention."""
    stock, _ = models
    first, second = packed_attention([stock.config]), packed_attention([stock.config])
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert stock.config._attn_implementation == GQA_PACKED
    second.__exit__(None, None, None)
    assert stock.config._attn_implementation == "sdpa"
    with pytest.raises(KeyError), packed_attention([stock.config]):
        raise KeyError
    assert stock.config._attn_implementation == "sdpa"
