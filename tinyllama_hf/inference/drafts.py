"""A draft for the commands: it proposes tokens, which the model checks several at a time; see `speculative.py`."""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..decoding.proposals import PromptLookup, Proposer, first_layers
from ..decoding.speculative import SpeculationStatistics, check_vocabulary_size, speculative_generate
from ..errors import InputError
from ..tokenization_tinyllama import tokenizer_fingerprint
from .load import load


LOOKUP, LAYERS = "lookup", "layers:"
# With a seed the number of drafted tokens must not depend on measured times, or the draws would.
SEEDED_DRAFT_LENGTH = 4


class Draft:
    """A draft that was checked against its target.

    Args:
        model (`PreTrainedModel` or `Proposer`): the smaller model, or what drafts without one.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): the smaller model's tokenizer.
        target (`PreTrainedModel`): the model that decides.
        target_tokenizer (`PreTrainedTokenizerBase`): its tokenizer.

    Raises:
        InputError: if a token id does not mean the same in both.
    """

    def __init__(
        self,
        model: PreTrainedModel | Proposer,
        tokenizer: PreTrainedTokenizerBase | None,
        target: PreTrainedModel,
        target_tokenizer: PreTrainedTokenizerBase,
    ):
        if tokenizer is not None:
            _check_vocabulary(model, tokenizer, target, target_tokenizer)
        self.model = model
        self.statistics: SpeculationStatistics | None = None
        self.context = (model if isinstance(model, PreTrainedModel) else target).config.max_position_embeddings

    def generate(self, target: PreTrainedModel, seeded: bool = False, **arguments: Any) -> torch.Tensor:
        """Generates with this draft's help, and measures it into `statistics`; arguments as of `target.generate`."""
        output = speculative_generate(
            target,
            self.model,
            draft_length=SEEDED_DRAFT_LENGTH if seeded else None,
            return_dict_in_generate=True,
            **arguments,
        )
        self.statistics = output.statistics
        return output.sequences


def load_draft(
    name: str,
    target: PreTrainedModel,
    target_tokenizer: PreTrainedTokenizerBase,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
) -> Draft:
    """Loads what `--draft` names: a model, `lookup`, or `layers:N`, the target's own first layers.

    Raises:
        InputError: if there is none of this name, or it does not fit the target.
    """
    if name == LOOKUP:
        return Draft(PromptLookup(), None, target, target_tokenizer)
    if name.startswith(LAYERS):
        number = name.removeprefix(LAYERS)
        if not number.isdecimal():
            raise InputError(f"--draft {name}: {LAYERS} needs a number of layers, as in {LAYERS}4")
        return Draft(first_layers(target, int(number)), None, target, target_tokenizer)
    return Draft(*load(name, dtype, device), target, target_tokenizer)


def _check_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    target: PreTrainedModel,
    target_tokenizer: PreTrainedTokenizerBase,
) -> None:
    check_vocabulary_size(target, model, "--draft")
    if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(target_tokenizer):
        raise InputError(
            f"--draft: its vocabulary has {model.config.vocab_size} entries as the target's, but other ones; a draft must "
            "have been trained with the target's own tokenizer"
        )
