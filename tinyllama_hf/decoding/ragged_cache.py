"""A batch whose rows have different lengths, each from slot 0 of its own part of the cache.

A pass reads the same number of tokens of every row, ending wherever that row ends. What lies in the cache beyond a row's
end is never seen and is overwritten later, so that taking back tokens costs nothing, and no row waits for another.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from ..errors import InputError
from .grouped_attention import packed_attention
from .rows import sized


_GROWTH = 32  # slots that are added at a time
# Rotary angles that depend on how long the longest row is, drafted tokens included.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


class _Placement:
    """Where the tokens of one pass go, the same in all layers."""

    def __init__(self, slots: torch.Tensor, ends: Sequence[int]):
        self.end = max(ends)
        self.start = None  # of all rows, where they agree
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
        """Puts `[rows, heads, tokens, head_dim]` into `[rows, heads, slots, head_dim]`."""
        if self.start is not None:
            buffer[:, :, self.start : self.end] = states
            return
        states = states.transpose(1, 2)
        if self.is_token is not None:
            states = states[self.is_token.to(states.device)]
        buffer[self.rows.to(buffer.device), :, self.slots.to(buffer.device)] = states


class RaggedLayer(CacheLayerMixin):
    """Keys and values of one layer, `[rows, num_key_value_heads, capacity, head_dim]`; its cache says where tokens go."""

    placement: _Placement

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Takes type, device and sizes from the first states; the buffers are grown when they are written."""
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
            # With zeros, since what is masked still enters a product with weight zero.
            self.keys, self.values = (sized(states, 2, num_slots(end)) for states in (self.keys, self.values))
        self.placement.write(self.keys, key_states)
        self.placement.write(self.values, value_states)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Slots that a pass sees, and the first of them."""
        return self.placement.end, 0

    def get_seq_length(self) -> int:
        """Slots before those of a pass over rows of equal length, where alone the library makes the mask."""
        return self.placement.start or 0

    def get_max_length(self) -> int:
        """No limit: the buffers grow."""
        return -1

    def keep(self, rows: torch.Tensor) -> None:
        """Keeps the rows of these indices."""
        rows = rows.to(self.keys.device)
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)

    def join(self, other: "RaggedLayer", end: int) -> None:
        """Takes in the rows of another one; of both what lies before slot `end` is needed."""
        self.keys = torch.cat([sized(layer.keys, 2, num_slots(end)) for layer in (self, other)])
        self.values = torch.cat([sized(layer.values, 2, num_slots(end)) for layer in (self, other)])


def num_slots(end: int) -> int:
    """Slots that each row of a cache has, of which the longest row has filled `end`."""
    return -(-end // _GROWTH) * _GROWTH


class RaggedCache(Cache):
    """A cache for rows of different lengths; [`RaggedModel`] says before each pass where its tokens go."""

    def __init__(self, num_layers: int):
        super().__init__(layers=[RaggedLayer() for _ in range(num_layers)])

    def place(self, slots: torch.Tensor, ends: Sequence[int]) -> None:
        """Sets the slots `[rows, tokens]` of the next pass; a negative one is padding. `ends` are the last ones + 1."""
        placement = _Placement(slots, ends)
        for layer in self.layers:
            layer.placement = placement


class RaggedModel:
    """A causal language model that reads rows of different lengths.

    Args:
        model (`PreTrainedModel`): any causal language model of transformers with full attention and `position_ids`.
            [`check_full_attention`] tells.
    """

    def __init__(self, model: PreTrainedModel):
        config = model.config.get_text_config(decoder=True)
        self.model, self.context = model, config.max_position_embeddings
        self._has_position_table = getattr(config, "rope_parameters", None) is None
        self.cache = RaggedCache(config.num_hidden_layers)
        self.passes = 0

    def read(self, tokens: torch.Tensor, ends: Sequence[int], num_logits: int = 1) -> torch.Tensor:
        """Reads `[rows, tokens]`, whose last column lies before slot `ends[row]`; returns the last `num_logits` logits.

        A row with fewer tokens has padding of any id on its left.

        Returns:
            `[rows, num_logits, vocab_size]` in fp32.
        """
        num_tokens = tokens.shape[1]
        slots = torch.tensor(ends, device=tokens.device)[:, None] + torch.arange(-num_tokens, 0, device=tokens.device)
        self.cache.place(slots, ends)
        mask = None
        if min(ends) < max(ends) or 1 < num_tokens < ends[0]:
            # Padding sees slot 0, so that no row of the mask is empty.
            seen = slots.clamp(min=0)[:, None, :, None]
            mask = torch.arange(max(ends), device=tokens.device) <= seen  # [rows, 1, tokens, slots]
        with packed_attention(self.model):
            output = self.model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=slots.clamp(0, self.context - 1 if self._has_position_table else None),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=num_logits,
            )
        self.passes += 1
        return output.logits[:, -num_logits:].float()

    def check_length(self, length: int) -> None:
        """Refuses rows longer than a table of positions; rotary angles go on, as in stock `generate`.

        Drafted tokens may reach beyond the table, and read its last entry: they are never accepted.

        Raises:
            InputError: with the context.
        """
        if self._has_position_table and length > self.context:
            raise InputError(
                f"max_new_tokens: rows of {length} tokens are longer than the context of {self.context}, and this model has no "
                "positions beyond it; give fewer"
            )

    def keep(self, rows: Sequence[int]) -> None:
        """Keeps the rows of these indices."""
        kept = torch.tensor(rows, dtype=torch.long, device=self.model.device)
        for layer in self.cache.layers:
            layer.keep(kept)

    def join(self, other: "RaggedModel", end: int) -> None:
        """Takes in the rows of another reader of the same model; none of either is longer than `end`."""
        for layer, joining in zip(self.cache.layers, other.cache.layers, strict=True):
            layer.join(joining, end)
        self.passes += other.passes


def check_full_attention(model: PreTrainedModel, name: str, drafts: bool = True) -> None:
    """Refuses a model that rows of different lengths would not be exact for.

    Args:
        model (`PreTrainedModel`): see [`RaggedModel`].
        name (`str`): what it is called in messages.
        drafts (`bool`, *optional*, defaults to `True`): whether it reads drafted tokens, which may lie beyond the context.

    Raises:
        InputError: naming the model's kind and what it has instead of full attention.
    """
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    reason = None
    if model.config.is_encoder_decoder:
        reason = "it has an encoder"
    elif kinds != {"full_attention"} or window is not None:
        reason = f"its layers are of the kinds {', '.join(sorted(kinds))} (sliding window: {window})"
    elif rope in _LENGTH_DEPENDENT_ROPE and (drafts or rope != "dynamic"):  # which begins beyond the context
        reason = f"its rotary scaling {rope!r} depends on the longest row"
    elif model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        reason = "it is in training mode with activation checkpointing, which leaves out the cache (call eval())"
    elif not getattr(model, "_supports_sdpa", False) or not getattr(model, "_supports_attention_backend", False):
        reason = "its attention cannot be chosen by name"
    if reason:
        raise InputError(
            f"{name} {type(model).__name__}: rows of different lengths are generated together with full attention over one "
            f"cache, and {reason}; use transformers' own methods, one prompt at a time"
        )
