"""A cache and a reader for rows of different lengths, each starting at slot 0 of its part of the cache.

A forward pass reads the same number of tokens of every row, up to that row's end. Slots after a row's end are masked
and are overwritten later, so rejecting tokens costs nothing and no row waits for another.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from ..errors import InputError
from .graphs import Graphs
from .grouped_attention import attention_configs, packed_attention
from .llama_step import is_compiled, is_plain_llama, llama_step
from .rows import Rows


_GROWTH = 32  # the number of slots is a multiple of this
# Kinds of rotary scaling in which angles depend on the longest row of the batch, including drafted tokens.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


class _Placement:
    """The slots of the tokens of one pass, the same in all layers.

    Args:
        slots (`torch.Tensor`): `[rows, tokens]`; negative at padding.
        end (`int`): number of slots that attention reads.
        start (`int`, *optional*): first slot, if it is the same in all rows: then a slice is enough.
        has_padding (`bool`, *optional*, defaults to `False`): whether some slots are negative.
    """

    def __init__(self, slots: torch.Tensor, end: int, start: int | None = None, has_padding: bool = False):
        self.num_rows, self.num_tokens = slots.shape
        self.end, self.start = end, start
        if start is not None:
            return
        self.is_token = slots >= 0 if has_padding else None
        self.rows = torch.arange(self.num_rows, device=slots.device)[:, None].expand_as(slots)
        self.slots = slots
        if self.is_token is not None:
            self.rows, self.slots = self.rows[self.is_token], slots[self.is_token]

    @classmethod
    def exact(cls, slots: torch.Tensor, ends: Sequence[int]) -> "_Placement":
        """Returns the placement of tokens that end at known slots, the last ones + 1."""
        end, num_tokens = max(ends), slots.shape[1]
        start = end - num_tokens if min(ends) == end and num_tokens <= end else None
        return cls(slots, end, start, min(ends) < num_tokens)

    def write(self, buffer: torch.Tensor, states: torch.Tensor) -> None:
        """Writes `[rows, heads, tokens, head_dim]` into `[rows or more, heads, slots, head_dim]`."""
        if self.start is not None:
            buffer[:, :, self.start : self.start + self.num_tokens] = states
            return
        states = states.transpose(1, 2)
        if self.is_token is not None:
            states = states[self.is_token.to(states.device)]
        buffer[self.rows.to(buffer.device), :, self.slots.to(buffer.device)] = states


class RaggedLayer(CacheLayerMixin):
    """Keys and values of one layer, `[rows, key_value_heads, slots, head_dim]`; see [`RaggedCache.place`]."""

    placement: _Placement
    keys: torch.Tensor
    values: torch.Tensor

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Creates empty buffers of the states' dtype, device and sizes; they grow when they are written."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0].clone(), value_states[:, :, :0].clone()
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes `[rows, heads, tokens, head_dim]` to their slots; returns the slots that attention reads."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, end = self.placement.num_rows, self.placement.end
        if end > self.keys.shape[2]:
            # With zeros: a masked slot still enters the attention product, with weight zero, so it must be finite.
            self.keys, self.values = _resized(self.keys, end), _resized(self.values, end)
        self.placement.write(self.keys, key_states)
        self.placement.write(self.values, value_states)
        return self.keys[:rows, :, :end], self.values[:rows, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of slots that a pass sees, and the first of them."""
        return self.placement.end, 0

    def get_seq_length(self) -> int:
        """Slots before the pass if all rows are of equal length; otherwise transformers does not create the mask."""
        return self.placement.start or 0

    def get_max_length(self) -> int:
        """Unlimited: the buffers grow."""
        return -1

    def allocate(self, like: "RaggedLayer", rows: int, slots: int) -> None:
        """Creates buffers of fixed size, with zeros, for states like those of another layer."""
        self.dtype, self.device, self.is_initialized = like.dtype, like.device, True
        self.keys, self.values = (each.new_zeros(rows, each.shape[1], slots, each.shape[3])
                                  for each in (like.keys, like.values))  # fmt: skip

    def keep(self, rows: torch.Tensor) -> None:
        """Keeps the rows with these indices."""
        rows = rows.to(self.keys.device)
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)

    def copy_rows(self, source: "RaggedLayer", rows: slice, start: int) -> None:
        """Overwrites the rows from index `start` with rows of another layer, up to the end of the smaller buffer."""
        slots = min(source.keys.shape[2], self.keys.shape[2])
        for own, other in ((self.keys, source.keys), (self.values, source.values)):
            copied = other[rows, :, :slots]
            own[start : start + len(copied), :, :slots] = copied

    def join(self, other: "RaggedLayer", end: int) -> None:
        """Adds the rows of another layer; all rows end before slot `end`."""
        self.keys = torch.cat([_resized(layer.keys, end) for layer in (self, other)])
        self.values = torch.cat([_resized(layer.values, end) for layer in (self, other)])


def num_slots(end: int) -> int:
    """Number of slots per row of a cache in which the longest row has `end` tokens."""
    return -(-end // _GROWTH) * _GROWTH


def _resized(states: torch.Tensor, end: int) -> torch.Tensor:
    """Returns `[rows, heads, slots, head_dim]` with the slots for `end` tokens: cut, or padded with zeros."""
    return nn.functional.pad(states, (0, 0, 0, num_slots(end) - states.shape[2]))


class RaggedCache(Cache):
    """A cache for rows of different lengths; [`RaggedModel`] sets the slots of the tokens before each pass."""

    def __init__(self, num_layers: int):
        self.ragged_layers = [RaggedLayer() for _ in range(num_layers)]
        super().__init__(layers=[*self.ragged_layers])

    def place(self, placement: _Placement) -> None:
        """Sets the slots of the next pass."""
        for layer in self.ragged_layers:
            layer.placement = placement

    def fixed(self, rows: int, slots: int) -> "RaggedCache":
        """Returns an empty cache of fixed size, for the same kind of keys and values."""
        cache = RaggedCache(len(self.ragged_layers))
        for layer, like in zip(cache.ragged_layers, self.ragged_layers, strict=True):
            layer.allocate(like, rows, slots)
        return cache

    def fixed_bytes(self, rows: int, slots: int) -> int:
        """Returns the bytes of a cache of fixed size, see [`fixed`]."""
        states = [states for layer in self.ragged_layers for states in (layer.keys, layer.values)]
        return sum(rows * slots * each.shape[1] * each.shape[3] * each.element_size() for each in states)

    def copy_rows(self, source: "RaggedCache", rows: slice, start: int = 0) -> None:
        """Overwrites the rows from index `start` with rows of another cache, up to the end of the smaller buffers."""
        for layer, other in zip(self.ragged_layers, source.ragged_layers, strict=True):
            layer.copy_rows(other, rows, start)


class RaggedModel:
    """A causal language model that reads rows of different lengths.

    Args:
        model (`PreTrainedModel`): any causal language model of transformers with full attention and `position_ids`,
            see [`check_full_attention`].

    Attributes:
        context (`int`): maximum number of tokens that the model was trained for.
        vocab_size (`int`): size of the vocabulary.
        has_position_table (`bool`): whether the model has no positions beyond its context, unlike rotary models.
        is_compiled (`bool`): whether layers are compiled in recorded steps.
        passes (`int`): number of forward passes.
    """

    def __init__(self, model: PreTrainedModel):
        config = model.config.get_text_config(decoder=True)
        self.model, self.context, self.vocab_size = model, config.max_position_embeddings, config.vocab_size
        self.has_position_table = getattr(config, "rope_parameters", None) is None
        heads = config.num_attention_heads
        self._groups = heads // (getattr(config, "num_key_value_heads", None) or heads)
        self._is_plain_llama, self.is_compiled = is_plain_llama(model), is_compiled(model)
        self._configs = attention_configs(model)
        self.cache = RaggedCache(config.num_hidden_layers)
        self.passes = 0
        self._graphs: Graphs | None = None

    def read(self, rows: Rows, num_tokens: int, offset: int = 0, num_logits: int = 1) -> torch.Tensor:
        """Runs the model on the tokens of each row up to `offset` tokens after its end.

        Args:
            rows (`Rows`): the rows. Those with fewer than `num_tokens` tokens have padding on the left.
            num_tokens (`int`): number of tokens to read.
            offset (`int`, *optional*, defaults to 0): number of drafted tokens to read.
            num_logits (`int`, *optional*, defaults to 1): number of the last positions to return logits for.

        Returns:
            `[rows, num_logits, vocab_size]` in fp32. After a step of fixed shape, the next one overwrites it.
        """
        self.passes += 1
        forward = functools.partial(self._forward, rows, num_tokens, offset, num_logits)
        if self._graphs is None:
            return forward()
        return self._graphs.run((id(self.cache), rows.bucket, num_tokens, offset, num_logits), forward)

    def _forward(self, rows: Rows, num_tokens: int, offset: int, num_logits: int) -> torch.Tensor:
        slots = rows.state.slots(num_tokens, offset)
        if rows.bucket is None:
            ends = [length + offset for length in rows.lengths]
            placement = _Placement.exact(slots, ends)
            # No mask if all rows are of equal length and either one token is read, which sees everything, or the pass
            # begins at slot 0, where the model's own causal mask is right.
            is_masked = min(ends) < max(ends) or 1 < num_tokens < ends[0]
            mask = self._mask(slots, placement.end) if is_masked else None
        else:
            # Rows that are too short read tokens after their end instead: those slots are overwritten.
            slots = slots - slots[:, :1].clamp(max=0)
            placement = _Placement(slots, rows.bucket.slots)
            mask = self._packed_mask(slots, placement.end)
            if self._is_plain_llama:
                caches = [(layer.keys, layer.values) for layer in self.cache.ragged_layers]
                return llama_step(self.model, rows.state.read(slots), slots, mask, caches, num_logits).float()
        self.cache.place(placement)
        with packed_attention(self._configs):
            output = self.model(
                input_ids=rows.state.read(slots),
                attention_mask=mask,
                # Drafted tokens may exceed a table of positions. They use its last entry and are never accepted.
                position_ids=slots.clamp(0, self.context - 1 if self.has_position_table else None),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=num_logits,
            )
        return output.logits[:, -num_logits:].float()

    def _mask(self, slots: torch.Tensor, end: int) -> torch.Tensor:
        """Returns which slots each token sees, `[rows, 1, tokens, slots]`."""
        # Padding sees slot 0: a softmax over a fully masked row would be nan.
        return torch.arange(end, device=slots.device) <= slots.clamp(min=0)[:, None, :, None]

    def _packed_mask(self, slots: torch.Tensor, end: int) -> torch.Tensor:
        """Returns the mask as a summand in the layout of [`gqa_packed_attention`], made once for all layers."""
        seen = self._mask(slots, end)
        mask = torch.zeros_like(seen, dtype=self.model.dtype).masked_fill_(~seen, -math.inf)
        return mask if self._groups == 1 else mask.repeat(1, 1, self._groups, 1)

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps the rows with these indices, in this order."""
        kept = torch.tensor(rows, dtype=torch.long, device=self.model.device)
        for layer in self.cache.ragged_layers:
            if self._graphs is None:
                layer.keep(kept)
                continue
            for target, source in enumerate(rows):
                if source != target:
                    layer.copy_rows(layer, slice(source, source + 1), target)

    def move_to(self, cache: RaggedCache, graphs: Graphs, num_rows: int) -> None:
        """Moves the rows to a cache of fixed size, whose steps run as graphs."""
        cache.copy_rows(self.cache, slice(num_rows))
        self.cache, self._graphs = cache, graphs

    def join(self, other: "RaggedModel", start: int, end: int) -> None:
        """Adds the rows of another reader of the same model.

        Args:
            other (`RaggedModel`): the reader.
            start (`int`): number of own rows.
            end (`int`): number of tokens of the longest row.
        """
        if self._graphs is not None:
            self.cache.copy_rows(other.cache, slice(None), start)
        else:
            for layer, joining in zip(self.cache.ragged_layers, other.cache.ragged_layers, strict=True):
                layer.join(joining, end)
        self.passes += other.passes


def check_full_attention(model: PreTrainedModel, name: str, drafts: bool = True) -> None:
    """Refuses a model with which generation for rows of different lengths would not be exact.

    Args:
        model (`PreTrainedModel`): see [`RaggedModel`].
        name (`str`): name of the model in messages.
        drafts (`bool`, *optional*, defaults to `True`): whether it reads drafted tokens, which may exceed the context.

    Raises:
        InputError: if it has no full attention, or its attention depends on the other rows or cannot be replaced.
    """
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    reason = None
    if model.config.is_encoder_decoder:
        reason = "it has an encoder"
    elif kinds != {"full_attention"} or window is not None:
        reason = f"its layers are {', '.join(sorted(kinds))} (sliding window: {window})"
    elif rope in _LENGTH_DEPENDENT_ROPE and (drafts or rope != "dynamic"):  # this one scales beyond the context only
        reason = f"its rotary scaling {rope!r} depends on the longest row"
    elif model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        reason = "it is in training mode with activation checkpointing, which disables the cache (call eval())"
    elif not getattr(model, "_supports_sdpa", False) or not getattr(model, "_supports_attention_backend", False):
        reason = "its attention implementation cannot be set"
    if reason:
        raise InputError(
            f"{name} {type(model).__name__}: rows of different lengths need full attention over one cache, "
            f"but {reason}. Use the model's own `generate`, one prompt at a time"
        )
