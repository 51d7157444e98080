"""Memory of the keys and values that generation keeps, measured on the cache object itself.

[`measure_cache`] adds up what a filled cache holds. [`cache_size`] fills a cache of transformers for a configuration, without
weights and as a rule without memory, on the meta device; what it then holds is measured in the same way.
"""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import DynamicCache, LlamaConfig, QuantizedCache
from transformers.cache_utils import Cache, CacheLayerMixin

from ..errors import InputError, did_you_mean


# By the name for the command line, as `generate(cache_implementation="quantized", cache_config=...)` takes them. Groups of
# 64 and the last 128 tokens in full precision are the library's defaults.
QUANTIZED_CACHES: dict[str, dict[str, Any]] = {
    "fp8": {"backend": "fp8"},
    "quanto-int4": {"backend": "quanto", "nbits": 4},
    "quanto-int2": {"backend": "quanto", "nbits": 2},
    "hqq-int8": {"backend": "hqq", "nbits": 8},
    "hqq-int4": {"backend": "hqq", "nbits": 4},
    "hqq-int2": {"backend": "hqq", "nbits": 2},
}
CACHES = ("dynamic", *QUANTIZED_CACHES)
_PACKAGES = {"quanto": "optimum-quanto", "hqq": "hqq"}
_GROUP_SIZE = 64
_HELD = ("keys", "values", "_quantized_keys", "_quantized_values")


class CacheSize(NamedTuple):
    """Bytes of a cache.

    Attributes:
        total (`int`): of all layers and requests.
        requests (`int`): rows of the batch.
        tokens (`int`): positions of a request, those that are filled or, in a preallocated cache, all.
    """

    total: int
    requests: int
    tokens: int

    @property
    def per_request(self) -> float:
        """Bytes of a request: all its positions in all layers."""
        return self.total / self.requests

    @property
    def per_token(self) -> float:
        """Bytes of a position in all layers, on average where some are held in another precision."""
        return self.total / (self.requests * self.tokens)


def measure_cache(cache: Cache) -> CacheSize:
    """Measures a filled cache: the memory that its keys and values keep alive, with the scales of quantised ones.

    Args:
        cache (`Cache`): of transformers (dynamic, static, quantised), or any whose `layers` have tensors `keys` and
            `values` of `[batch, num_key_value_heads, positions, head_dim]`.

    Raises:
        InputError: if it is empty, or a layer holds something else than keys and values.
    """
    layers = [layer for layer in getattr(cache, "layers", ()) if _holds_keys(layer)]
    if not layers:
        raise InputError(
            f"cache {type(cache).__name__}: its layers hold no keys and values; measure it after a forward pass"
        )
    memory: dict[StorageWeakRef, int] = {}
    for tensor in _tensors([getattr(layer, name, None) for layer in layers for name in _HELD]):
        storage = tensor.untyped_storage()  # a cropped tensor keeps all of it
        memory[StorageWeakRef(storage)] = storage.nbytes()
    shapes = [_shape(layer) for layer in layers]
    return CacheSize(sum(memory.values()), max(rows for rows, _ in shapes), max(tokens for _, tokens in shapes))


def cache_size(
    config: LlamaConfig, requests: int, tokens: int, dtype: torch.dtype = torch.bfloat16, kind: str = "dynamic"
) -> CacheSize:
    """Measures what the cache of a Llama with this configuration holds once it is filled; no weights are needed.

    One layer of a real cache is filled, on the meta device; all layers hold as much. A cache that quantises in groups keeps
    up to 127 of the latest tokens in `dtype`, depending on where the prompt ended: it is filled so that it keeps as many.

    Args:
        config (`LlamaConfig`): of the model.
        requests (`int`): rows of the batch.
        tokens (`int`): positions of each.
        dtype (`torch.dtype`): of keys and values, which is that of the model's embeddings.
        kind (`str`): one of `CACHES`.

    Raises:
        InputError: if there is no such kind, its package is missing, or it cannot hold keys of this width.
    """
    cache = _empty_cache(config, kind)
    # hqq reads what it quantises: there, one request with real values stands for all.
    reads = kind.startswith("hqq")
    filled = 1 if reads else requests
    unquantized = min(getattr(cache.layers[0], "residual_length", 1), tokens) - 1
    for count in filter(None, (tokens - unquantized, unquantized)):
        shape = (filled, config.num_key_value_heads, count, config.head_dim)
        states = torch.zeros(shape, dtype=dtype, device="cpu" if reads else "meta")
        cache.update(states, states.clone(), layer_idx=0)
    layer = measure_cache(cache)
    return CacheSize(layer.total * config.num_hidden_layers * requests // filled, requests, tokens)


def multi_head(config: LlamaConfig) -> LlamaConfig:
    """The same configuration with keys and values of their own for every head of the queries."""
    config = copy.deepcopy(config)
    config.num_key_value_heads = config.num_attention_heads
    return config


def _empty_cache(config: LlamaConfig, kind: str) -> Cache:
    if kind == "dynamic":
        return DynamicCache(config=config)
    if kind not in CACHES:
        raise InputError(f"--cache {kind!r}: there is none of this name{did_you_mean(kind, CACHES)}")
    options = QUANTIZED_CACHES[kind]
    width = config.num_key_value_heads * config.head_dim
    if options["backend"] != "fp8" and width % _GROUP_SIZE:
        raise InputError(
            f"--cache {kind}: quantises groups of {_GROUP_SIZE} elements, and the keys of a token are {width} here "
            f"({config.num_key_value_heads} heads of {config.head_dim}), which that does not divide; use fp8 or dynamic"
        )
    try:
        return QuantizedCache(config=config, **options)
    except ImportError as error:
        package = _PACKAGES[options["backend"]]
        raise InputError(f"--cache {kind}: needs the package {package}: pip install {package}") from error


def _holds_keys(layer: CacheLayerMixin) -> bool:
    """Whether a layer is filled; a layer of an unknown kind is refused, since part of it would not be counted."""
    kind = type(layer).__name__
    if not hasattr(layer, "keys") or not hasattr(layer, "values"):
        raise InputError(f"cache layer {kind}: has no keys and values, and what it holds is not known here")
    for name, value in vars(layer).items():
        if name not in _HELD and any(tensor.is_floating_point() for tensor in _tensors(value)):
            raise InputError(f"cache layer {kind}: holds {name} beside keys and values, which is not known here")
    return layer.keys is not None and _shape(layer)[1] > 0


def _shape(layer: CacheLayerMixin) -> tuple[int, int]:
    """Requests and positions of a filled layer."""
    quantized = getattr(layer, "_quantized_keys", None)
    if quantized is None:
        return layer.keys.shape[0], layer.keys.shape[-2]
    if isinstance(quantized, tuple):  # fp8's beside its scale, hqq's beside a description
        tensor, beside = quantized
        return (beside["shape"] if isinstance(beside, dict) else tensor.shape)[0], layer.get_seq_length()
    return quantized.shape[0], layer.get_seq_length()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The plain tensors in a value, those inside wrappers, as quanto's, included."""
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):
            yield from _tensors([getattr(value, name) for name in value.__tensor_flatten__()[0]])
        else:
            yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
