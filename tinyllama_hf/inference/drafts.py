"""A draft model: a smaller one that proposes tokens, which the target model checks several at a time.

transformers' assisted generation does the work, for one prompt at a time. Greedy output is the target's own; sampled
output follows the target's distribution (speculative sampling, Leviathan et al. 2023, arXiv:2211.17192).
"""

import copy
import time
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError
from ..progress import quiet_assisted_generation
from ..tokenization_tinyllama import tokenizer_fingerprint


class DraftStatistics(NamedTuple):
    """What a draft was worth in one generation, from counted forward passes.

    `drafted` tokens were proposed, one a pass of the draft; `accepted` of them stand in the output, to which each pass of
    the target added one of its own.
    """

    drafted: int
    target_passes: int
    new_tokens: int
    seconds: float

    @property
    def accepted(self) -> int:
        """Proposed tokens that stand in the output."""
        return self.new_tokens - self.target_passes

    def __str__(self) -> str:
        share = self.accepted / self.drafted if self.drafted else 0.0
        return (
            f"draft: {share * 100:.0f} % of {self.drafted} drafted tokens accepted, {self.target_passes} target passes for "
            f"{self.new_tokens} tokens, {self.seconds:.1f} s"
        )


class Draft:
    """A draft model that was checked against its target.

    Args:
        model (`PreTrainedModel`): the smaller model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        target (`PreTrainedModel`): the model that decides.
        target_tokenizer (`PreTrainedTokenizerBase`): its tokenizer.

    Raises:
        InputError: if a token id does not mean the same in both.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        target: PreTrainedModel,
        target_tokenizer: PreTrainedTokenizerBase,
    ):
        own, wanted = model.config.vocab_size, target.config.vocab_size
        if own != wanted:
            raise InputError(
                f"--draft: its vocabulary has {own} entries, the model's {wanted}; a draft must have been trained with the "
                "model's own tokenizer"
            )
        if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(target_tokenizer):
            raise InputError(
                f"--draft: its vocabulary has {own} entries as the model's, but other ones; a draft must have been trained "
                "with the model's own tokenizer"
            )
        self.model = model
        self.statistics: DraftStatistics | None = None

    @property
    def context(self) -> int:
        """Tokens that it can read."""
        return self.model.config.max_position_embeddings

    def generate(self, target: PreTrainedModel, **arguments: Any) -> torch.Tensor:
        """Calls `target.generate(**arguments)` with this draft's help, and measures it into `statistics`."""
        quiet_assisted_generation()
        passes = {"draft": 0, "target": 0}

        def count(name: str) -> Any:
            def hook(*_: Any) -> None:
                passes[name] += 1

            return hook

        hooks = [self.model.register_forward_hook(count("draft")), target.register_forward_hook(count("target"))]
        # The library adapts the number of drafted tokens, and the confidence that they need, in the draft's own
        # generation config (5.23): what one generation learns must not change the next.
        kept, self.model.generation_config = self.model.generation_config, copy.deepcopy(self.model.generation_config)
        began = time.perf_counter()
        try:
            output = target.generate(**arguments, assistant_model=self.model)
        finally:
            self.model.generation_config = kept
            for hook in hooks:
                hook.remove()
        new_tokens = output.shape[1] - arguments["input_ids"].shape[1]
        seconds = time.perf_counter() - began
        self.statistics = DraftStatistics(passes["draft"], passes["target"], new_tokens, seconds)
        return output
