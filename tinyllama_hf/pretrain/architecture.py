"""The model that a recipe describes, without building it."""

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from ..configuration_tinyllama import TinyLlamaConfig
from ..errors import InputError, one_line
from ..modeling_tinyllama import TinyLlamaForCausalLM
from .config import PretrainConfig


def architecture(config: PretrainConfig, vocab_size: int, **special_tokens: Any) -> TinyLlamaConfig:
    """The model's configuration: preset and overrides, with the vocabulary given.

    Args:
        config (`PretrainConfig`): the recipe.
        vocab_size (`int`): pieces of the tokenizer.
        **special_tokens: `bos_token_id` and `eos_token_id`.

    Raises:
        InputError: for fields that together make no model, and a sequence longer than the context.
    """
    fields = {
        "max_position_embeddings": config.data.sequence_length,
        **config.model.overrides,
        "vocab_size": vocab_size,
        **special_tokens,
    }
    try:
        built = TinyLlamaConfig.preset(config.model.preset, **fields)
        shapes_only(built)(
            input_ids=torch.zeros(1, 2, dtype=torch.long, device="meta")
        )  # they must make one that runs
    except (StrictDataclassError, ValueError, TypeError, KeyError, ArithmeticError, RuntimeError) as error:
        raise InputError(f"model.overrides: make no model: {one_line(error)}") from error
    if config.data.sequence_length > built.max_position_embeddings:
        raise InputError(
            f"data.sequence_length: {config.data.sequence_length} is longer than the model's context, "
            f"model.overrides.max_position_embeddings {built.max_position_embeddings}; shorten the one or raise the other"
        )
    return built


def shapes_only(config: TinyLlamaConfig) -> TinyLlamaForCausalLM:
    """The model on the meta device: it takes no memory, and counts."""
    with torch.device("meta"):
        return TinyLlamaForCausalLM(config)
