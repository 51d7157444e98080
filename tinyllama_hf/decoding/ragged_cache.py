"""A cache and a reader for rows of different lengths, each starting at slot 0 of its part of the cache.

A forward pass reads the same number of tokens of every row, up to that row's end. Slots after a row's end are masked
and are overwritten later, so rejecting tokens costs nothing and no row waits for another.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from ..errors import InputError
from .grouped_attention import packed_attention


_GROWTH = 32  # the number of slots is a multiple of this
# Kinds of rotary scaling in which angles depend on the longest row of the batch, including drafted tokens.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


class _Placement:
    """The slots of the tokens of one pass, the same in all layers."""

    def __init__(self, slots: torch.Tensor, ends: Sequence[int]):
        self.end = max(ends)
        self.start: int | None = None  # first slot, if it is the same in all rows: then a slice is enough
        num_tokens = slots.shape[1]
        if min(ends) == self.end and num_tokens <= self.end:
            self.start = self.end - num_tokens
            return
        self.is_token = slots >= 0 if min(ends) < num_tokens else None
        self.rows = torch.arange(len(ends), device=slots.device)[:, None].expand_as(slots)
        self.slots = slots
        if self.is_token is not None:
            self.rows, self.slots = self.rows[self.is_token], slots[self.is_token]

    def write(self, buffer: torch.Tensor, states: torch.Tensor) -> None:
        """Writes `[rows, heads, tokens, head_dim]` into `[rows, heads, slots, head_dim]`."""
        if self.start is not None:
            buffer[:, :, self.start : self.end] = states
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
        """Writes `[rows, heads, tokens, head_dim]` to their slots; returns all slots up to the longest row's end."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.placement.end
        if end > self.keys.shape[2]:
            # With zeros: a masked slot still enters the attention product, with weight zero, so it must be finite.
            self.keys, self.values = _resized(self.keys, end), _resized(self.values, end)
        self.placement.write(self.keys, key_states)
        self.placement.write(self.values, value_states)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of slots that a pass sees, and the first of them."""
        return self.placement.end, 0

    def get_seq_length(self) -> int:
        """Slots before the pass if all rows are of equal length; otherwise transformers does not create the mask."""
        return self.placement.start or 0

    def get_max_length(self) -> int:
        """Unlimited: the buffers grow."""
        return -1

    def keep(self, rows: torch.Tensor) -> None:
        """Keeps the rows with these indices."""
        rows = rows.to(self.keys.device)
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)

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

    def place(self, slots: torch.Tensor, ends: Sequence[int]) -> None:
        """Sets the slots `[rows, tokens]` of the next pass, negative at padding; `ends` are the last slots + 1."""
        placement = _Placement(slots, ends)
        for layer in self.ragged_layers:
            layer.placement = placement


class RaggedModel:
    """A causal language model that reads rows of different lengths.

    Args:
        model (`PreTrainedModel`): any causal language model of transformers with full attention and `position_ids`,
            see [`check_full_attention`].

    Attributes:
        context (`int`): maximum number of tokens that the model was trained for.
        has_position_table (`bool`): whether the model has no positions beyond its context, unlike rotary models.
        passes (`int`): number of forward passes.
    """

    def __init__(self, model: PreTrainedModel):
        config = model.config.get_text_config(decoder=True)
        self.model, self.context = model, config.max_position_embeddings
        self.has_position_table = getattr(config, "rope_parameters", None) is None
        self.cache = RaggedCache(config.num_hidden_layers)
        self.passes = 0

    def read(self, tokens: torch.Tensor, ends: Sequence[int], num_logits: int = 1) -> torch.Tensor:
        """Runs the model on `[rows, tokens]` and returns the logits of the last `num_logits` positions.

        Args:
            tokens (`torch.Tensor`): `[rows, tokens]`. Rows with fewer new tokens have padding with any id on the left.
            ends (`Sequence[int]`): number of tokens of each row after the pass.
            num_logits (`int`, *optional*, defaults to 1): number of positions.

        Returns:
            `[rows, num_logits, vocab_size]` in fp32.
        """
        num_tokens = tokens.shape[1]
        slots = torch.tensor(ends, device=tokens.device)[:, None] + torch.arange(-num_tokens, 0, device=tokens.device)
        self.cache.place(slots, ends)
        # No mask if all rows are of equal length and either one token is read, which sees everything, or the pass
        # begins at slot 0, where the model's own causal mask is right.
        mask = None
        if min(ends) < max(ends) or 1 < num_tokens < ends[0]:
            # Padding sees slot 0: a softmax over a fully masked row would be nan.
            seen = slots.clamp(min=0)[:, None, :, None]
            mask = torch.arange(max(ends), device=tokens.device) <= seen  # [rows, 1, tokens, slots]
        with packed_attention(self.model):
            output = self.model(
                input_ids=tokens,
                attention_mask=mask,
                # Drafted tokens may exceed a table of positions. They use its last entry and are never accepted.
                position_ids=slots.clamp(0, self.context - 1 if self.has_position_table else None),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=num_logits,
            )
        self.passes += 1
        return output.logits[:, -num_logits:].float()

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps the rows with these indices."""
        kept = torch.tensor(rows, dtype=torch.long, device=self.model.device)
        for layer in self.cache.ragged_layers:
            layer.keep(kept)

    def join(self, other: "RaggedModel", end: int) -> None:
        """Adds the rows of another reader of the same model; no row is longer than `end`."""
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
