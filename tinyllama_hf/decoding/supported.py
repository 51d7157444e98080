"""The options of `generate` that the engine supports."""

from typing import Any

from transformers.generation import GenerationConfig, GenerationMode

from ..errors import InputError


_PREPARED = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
SUPPORTED_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


def check_supported(config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    """Refuses options of other decoding methods, which the engine would ignore.

    Args:
        config (`GenerationConfig`): as `generate` resolved it.
        model_kwargs (`dict`): what `generate` prepared for the model.

    Raises:
        InputError: if an option is not supported.
    """
    mode, chunk, kind = config.get_generation_mode(), config.prefill_chunk_size, config.cache_implementation
    if mode not in SUPPORTED_MODES:
        raise InputError(f"{mode.value}: a draft supports greedy decoding and sampling only. Generate without a draft")
    own_cache = "rows of different lengths need their own kind of cache. Leave it out"
    outputs = "is not supported for rows of different lengths. Leave it out"
    refused = {
        "use_cache=False: rows of different lengths need a cache. Leave it on": not config.use_cache,
        f"output_attentions=True: {outputs}": config.output_attentions,
        f"output_hidden_states=True: {outputs}": config.output_hidden_states,
        f"prefill_chunk_size={chunk}: prompts are read in one pass here. Leave it out": chunk is not None,
        f"past_key_values: {own_cache}": getattr(model_kwargs.get("past_key_values"), "_is_user_defined", False),
        f"cache_implementation={kind!r}: {own_cache}": kind not in (None, "dynamic"),
    }
    for name in sorted(set(model_kwargs) - _PREPARED):
        refused[f"{name}: is not supported with a draft. Generate without a draft"] = True
    for message, applies in refused.items():
        if applies:
            raise InputError(message)
