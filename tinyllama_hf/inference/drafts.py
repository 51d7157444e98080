"""Drafts for the commands, by the value of `--draft`; see [`~decoding.speculative`]."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..decoding.proposals import ModelProposer, PromptLookup, Proposer, first_layers
from ..decoding.speculative import check_vocabulary_size
from ..errors import InputError
from ..tokenization_tinyllama import tokenizer_fingerprint
from .load import load


LOOKUP, LAYERS = "lookup", "layers:"
# With a seed, the number of drafted tokens must not depend on measured times, or the samples would.
SEEDED_DRAFT_LENGTH = 4


def load_draft(
    name: str,
    target: PreTrainedModel,
    target_tokenizer: PreTrainedTokenizerBase,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
) -> Proposer:
    """Loads a draft by name: a model, `lookup`, or `layers:N` for the target's own first layers.

    Raises:
        InputError: if the name is unknown, or the draft does not match the target.
    """
    if name == LOOKUP:
        return PromptLookup()
    if name.startswith(LAYERS):
        number = name.removeprefix(LAYERS)
        if not number.isdecimal():
            raise InputError(f"--draft {name}: {LAYERS} needs a number of layers, such as {LAYERS}4")
        return ModelProposer(first_layers(target, int(number)))
    model, tokenizer = load(name, dtype, device)
    check_vocabulary(model, tokenizer, target, target_tokenizer)
    return ModelProposer(model)


def check_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    target: PreTrainedModel,
    target_tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Refuses a draft with another vocabulary than the target.

    Raises:
        InputError: with the sizes of both vocabularies.
    """
    check_vocabulary_size(target, model, "--draft")
    if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(target_tokenizer):
        raise InputError(
            f"--draft: its vocabulary has {model.config.vocab_size} entries, as the target's, but other tokens. A "
            "draft must have the target's own tokenizer"
        )
