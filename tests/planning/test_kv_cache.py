"""The memory of caches: published figures, real generations, and refusal of unknown layers."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, LlamaConfig, StaticCache
from transformers.cache_utils import Cache, DynamicIndexedLayer, LinearAttentionLayer

from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM
from tinyllama_hf.errors import InputError
from tinyllama_hf.planning.kv_cache import CacheSize, cache_size, measure_cache
from tinyllama_hf.presets import PRESETS


NANO = TinyLlamaConfig.preset("nano", vocab_size=512, max_position_embeddings=512)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return TinyLlamaForCausalLM(NANO).eval()


def generate(model, prompt_tokens, new_tokens, **options):
    """Returns the cache after a real generation for three prompts, one of them padded on the left."""
    ids = torch.randint(3, 512, (3, prompt_tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        **options,
    )
    return output.past_key_values


def test_published_figures():
    config = TinyLlamaConfig.preset("1.1b")
    grouped = cache_size(config, 100, 2048)
    assert grouped.per_token == 22_528
    assert grouped == CacheSize(22_528 * 2048 * 100, 100, 2048) and grouped.per_request == 22_528 * 2048
    every_head = TinyLlamaConfig.preset("1.1b", num_key_value_heads=config.num_attention_heads)
    assert cache_size(every_head, 100, 2048).per_token == 180_224


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("preset", PRESETS)
def test_equal_to_the_method_of_the_model(preset, dtype):
    config = TinyLlamaConfig.preset(preset)
    every_head = TinyLlamaConfig.preset(preset, num_key_value_heads=config.num_attention_heads)
    for each in (config, every_head):
        with torch.device("meta"):
            expected = TinyLlamaForCausalLM(each).kv_cache_bytes_per_token(dtype)
        assert cache_size(each, 3, 77, dtype).per_token == expected
    assert cache_size(LlamaConfig(), 1, 10).per_token == 2 * 32 * 32 * 128 * 2, "any Llama, as Llama-2-7B"


@pytest.mark.parametrize("given", [True, False])
def test_a_real_generation(model, given):
    """The last token is never read and has no cache entry."""
    options = {"past_key_values": DynamicCache(config=model.config)} if given else {}
    cache = generate(model, 17, 9, **options)
    measured = measure_cache(cache)
    assert measured == CacheSize(sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers), 3, 17 + 9 - 1)
    assert measured == cache_size(model.config, 3, 25, torch.float32)
    assert measured.per_token == model.kv_cache_bytes_per_token(torch.float32)


def test_a_static_cache_counts_what_it_allocates(model):
    cache = generate(model, 17, 9, past_key_values=StaticCache(config=model.config, max_cache_len=200))
    measured = measure_cache(cache)
    assert (measured.requests, measured.tokens) == (3, 200)
    assert measured.per_token == model.kv_cache_bytes_per_token(torch.float32)


def test_a_cropped_cache_keeps_its_memory(model):
    cache = generate(model, 17, 9)
    before = measure_cache(cache)
    cache.crop(-10)
    assert cache.get_seq_length() == 15
    assert measure_cache(cache) == replace(before, tokens=15)


def test_shared_memory_counts_once():
    """As in RaggedCache, where keys and values share one buffer."""
    buffer = torch.zeros(2, 3, 4, 50, 8)
    layer = SimpleNamespace(keys=buffer[0, :, :, :20], values=buffer[1, :, :, :20], lengths=torch.tensor([20, 7, 3]))
    assert measure_cache(SimpleNamespace(layers=[layer])) == CacheSize(buffer.nbytes, 3, 20)


def filled(layer):
    layer.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))
    return layer


def test_unknown_layers_are_refused(model):
    with pytest.raises(InputError, match="cache DynamicCache: its layers hold no keys and values; measure it after a"):
        measure_cache(DynamicCache(config=NANO))
    with pytest.raises(InputError, match="cache EncoderDecoderCache: its layers hold no keys"):
        measure_cache(EncoderDecoderCache(DynamicCache(), DynamicCache()))
    with pytest.raises(InputError, match="cache layer LinearAttentionLayer: "):
        measure_cache(Cache(layers=[LinearAttentionLayer()]))
    indexed = filled(DynamicIndexedLayer())
    assert measure_cache(Cache(layers=[indexed])).total == 2 * 1 * 2 * 3 * 4 * 4
    indexed.update_indexer(torch.zeros(1, 3, 4))
    with pytest.raises(InputError, match="cache layer DynamicIndexedLayer: holds indexer_keys "):
        measure_cache(Cache(layers=[indexed]))
    quantized = generate(model, 17, 9, cache_implementation="quantized", cache_config={"backend": "fp8"})
    with pytest.raises(InputError, match=r"cache layer .*: holds _quantized_keys "):
        measure_cache(quantized)
