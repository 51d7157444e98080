"""Memory of the keys and values of generation, measured on the cache object.

[`measure_cache`] adds up the tensors of a filled cache. [`cache_size`] fills a cache of transformers for a
configuration on the meta device, without weights and without memory, and measures it in the same way.
"""

from dataclasses import dataclass
from typing import Any

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
        tokens (`int`): positions per request: the filled ones, or all of a preallocated cache.
    """

    total: int
    requests: int
    tokens: int

    @property
    def per_request(self) -> float:
        """Bytes per request: all its positions in all layers."""
        return self.total / self.requests

    @property
    def per_token(self) -> float:
        """Bytes per position in all layers."""
        return self.total / (self.requests * self.tokens)


def measure_cache(cache: Cache) -> CacheSize:
    """Measures a filled cache: the memory that its keys and values keep alive.

    Args:
        cache (`Cache`): of transformers (dynamic or static), or any whose `layers` have tensors `keys` and `values` of
            `[batch, num_key_value_heads, positions, head_dim]`.

    Raises:
        InputError: if it is empty, or a layer holds other tensors, as a quantized one does.
    """
    layers = [layer for layer in getattr(cache, "layers", ()) if _holds_keys(layer)]
    if not layers:
        raise InputError(
            f"cache {type(cache).__name__}: its layers hold no keys and values; measure it after a forward pass"
        )
    memory: dict[StorageWeakRef, int] = {}
    for layer in layers:
        for tensor in (layer.keys, layer.values):
            storage = tensor.untyped_storage()  # cropping a tensor does not shrink its storage
            memory[StorageWeakRef(storage)] = storage.nbytes()
    requests, tokens = (max(layer.keys.shape[axis] for layer in layers) for axis in (0, -2))
    return CacheSize(sum(memory.values()), requests, tokens)


def cache_size(config: LlamaConfig, requests: int, tokens: int, dtype: torch.dtype = torch.bfloat16) -> CacheSize:
    """Measures the filled cache of a Llama with this configuration, without weights.

    One layer of a real cache is filled on the meta device; all layers have the same size.

    Args:
        config (`LlamaConfig`): of the model.
        requests (`int`): rows of the batch.
        tokens (`int`): positions per request.
        dtype (`torch.dtype`): of keys and values; that of the embeddings.
    """
    cache = DynamicCache(config=config)
    shape: tuple[Any, ...] = (requests, config.num_key_value_heads, tokens, config.head_dim)
    states = torch.empty(shape, dtype=dtype, device="meta")
    cache.update(states, states.clone(), layer_idx=0)
    return CacheSize(measure_cache(cache).total * config.num_hidden_layers, requests, tokens)


def _holds_keys(layer: CacheLayerMixin) -> bool:
    """Whether a layer is filled. Refuses a layer with other tensors, which would not be counted."""
    kind = type(layer).__name__
    if not hasattr(layer, "keys") or not hasattr(layer, "values"):
        raise InputError(f"cache layer {kind}: has no keys and values; it cannot be measured")
    for name in sorted(vars(layer).keys() - {"keys", "values"}):
        leaves = tree_leaves(getattr(layer, name))
        if any(isinstance(each, torch.Tensor) and each.is_floating_point() for each in leaves):
            raise InputError(f"cache layer {kind}: holds {name} in addition to keys and values; it cannot be measured")
    return layer.keys is not None and layer.keys.shape[-2] > 0
