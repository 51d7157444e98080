"""Logits processors of single rows, beyond those of transformers."""

from collections.abc import Mapping

import torch
from transformers.generation.logits_process import LogitsProcessor


class CountPenalty(LogitsProcessor):
    """OpenAI's penalties: `presence + c * frequency` off the logit of each token that is in the reply c > 0 times.

    Args:
        presence, frequency (`float`): the penalties; negative ones favor tokens.
        num_prompt_tokens (`int`): tokens before the reply, which are not counted.
    """

    def __init__(self, presence: float, frequency: float, num_prompt_tokens: int):
        self.presence, self.frequency, self.num_prompt_tokens = presence, frequency, num_prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens, counts = input_ids[0, self.num_prompt_tokens :].unique(return_counts=True)
        scores[0, tokens] -= self.presence + self.frequency * counts
        return scores


class TokenBias(LogitsProcessor):
    """Adds a number to the logits of some tokens.

    Args:
        biases (`Mapping[int, float]`): the number to add, by token.
        device (`torch.device`): of the logits.
    """

    def __init__(self, biases: Mapping[int, float], device: torch.device):
        self.tokens = torch.tensor(list(biases), device=device)
        self.values = torch.tensor(list(biases.values()), device=device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self.tokens] += self.values
        return scores
