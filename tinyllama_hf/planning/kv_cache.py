"""Memory of the keys and values that generation keeps, measured on the cache object itself.

[`measure_cache`] adds up what a filled cache holds. [`cache_size`] fills a cache of transformers for a configuration on the meta
device, without weights and without memory, and measures it in the same way.
"""

import copy
from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, LlamaConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from ..errors import InputError


@dataclass(frozen=True)
class CacheSize:
    """Bytes of a cache.

    Attributes:
        total (`int`): of all layers and requests.
        requests (`int`): rows of the batch.
        tokens (`int`): positions of a request: the filled ones, or all of a preallocated cache.
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
        """Bytes of a position in all layers."""
        return self.total / (self.requests * self.tokens)


def measure_cache(cache: Cache) -> CacheSize:
    """Measures a filled cache: the memory that its keys and values keep alive.

    Args:
        cache (`Cache`): of transformers (dynamic or static), or any whose `layers` have tensors `keys` and `values` of
            `[batch, num_key_value_heads, positions, head_dim]`.

    Raises:
        InputError: if it is empty, or a layer holds something other than keys and values, as quantized ones do.
    """
    layers = [layer for layer in getattr(cache, "layers", ()) if _holds_keys(layer)]
    if not layers:
        raise InputError(
            f"cache {type(cache).__name__}: its layers hold no keys and values; measure it after a forward pass"
        )
    memory: dict[StorageWeakRef, int] = {}
    for layer in layers:
        for tensor in (layer.keys, layer.values):
            storage = tensor.untyped_storage()  # a cropped tensor keeps all of it
            memory[StorageWeakRef(storage)] = storage.nbytes()
    requests, tokens = (max(layer.keys.shape[axis] for layer in layers) for axis in (0, -2))
    return CacheSize(sum(memory.values()), requests, tokens)


def cache_size(config: LlamaConfig, requests: int, tokens: int, dtype: torch.dtype = torch.bfloat16) -> CacheSize:
    """Measures what the cache of a Llama with this configuration holds once it is filled; no weights are needed.

    One layer of a real cache is filled, on the meta device; all layers hold as much.

    Args:
        config (`LlamaConfig`): of the model.
        requests (`int`): rows of the batch.
        tokens (`int`): positions of each.
        dtype (`torch.dtype`): of keys and values, which is that of the model's embeddings.
    """
    cache = DynamicCache(config=config)
    shape = (requests, config.num_key_value_heads, tokens, config.head_dim)
    states = torch.empty(shape, dtype=dtype, device="meta")
    cache.update(states, states.clone(), layer_idx=0)
    return CacheSize(measure_cache(cache).total * config.num_hidden_layers, requests, tokens)


def multi_head(config: LlamaConfig) -> LlamaConfig:
    """The same configuration with keys and values of their own for every head of the queries."""
    config = copy.deepcopy(config)
    config.num_key_value_heads = config.num_attention_heads
    return config


def _holds_keys(layer: CacheLayerMixin) -> bool:
    """Whether a layer is filled. A layer that holds more than keys and values is refused: a part of it would not be counted."""
    kind = type(layer).__name__
    if not hasattr(layer, "keys") or not hasattr(layer, "values"):
        raise InputError(f"cache layer {kind}: has no keys and values; only caches of keys and values can be measured")
    for name, value in vars(layer).items():
        floating = (each for each in tree_leaves(value) if isinstance(each, torch.Tensor) and each.is_floating_point())
        if name not in ("keys", "values") and any(True for _ in floating):
            raise InputError(
                f"cache layer {kind}: holds {name} in addition to keys and values; only caches of keys and values can be measured"
            )
    return layer.keys is not None and layer.keys.shape[-2] > 0
