"""Shared by the checks of exactness.py: models, prompts, and a comparison with the loop of transformers."""

import copy
import random
from collections.abc import Sequence
from typing import Any

import torch
from measuring import Bench, Figures, endless, without_graphs

from tests.exactness import PAD, TIE, first_difference, left_padded
from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM


GREEDY = {"do_sample": False, "pad_token_id": PAD}


class NoTokenizer:
    """Tokens without text and without end-of-sequence."""

    pad_token_id, eos_token_id = PAD, None


class Comparison:
    """Counts sequences that equal the loop of transformers, and those that differ where two scores are equal."""

    def __init__(self, reference: Any):
        self.model, self.rows, self.equal, self.ties, self.wrong = reference, 0, 0, 0, 0
        self.first: str | None = None

    def add(self, prompt: Sequence[int], ours: Sequence[int], **options: Any) -> None:
        """Compares the new tokens of a prompt."""
        with without_graphs():
            output = self.model.generate(
                torch.tensor([prompt], device=self.model.device),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=self.model.device),
                return_dict_in_generate=True, output_scores=True, **GREEDY, **options,
            )  # fmt: skip
        stock = output.sequences[0, len(prompt) :].tolist()
        self.rows += 1
        place = first_difference(ours, stock)
        if place is None:
            self.equal += 1
            return
        best = output.scores[place][0].topk(2).values if place < len(stock) else None
        if best is not None and float(best[0] - best[1]) < TIE:
            self.ties += 1
            return
        self.wrong += 1
        self.first = self.first or f"{stock[place : place + 4]} and not {list(ours[place : place + 4])} at {place}"

    def row(self, variant: str, **more: Any) -> Figures:
        """Returns the counts, and starts again."""
        counts = {"rows": self.rows, "equal": self.equal, "ties": self.ties}
        row = {"variant": variant, **counts, "wrong": self.wrong, **more}
        row |= {"first_difference": self.first} if self.first else {}
        self.rows, self.equal, self.ties, self.wrong, self.first = 0, 0, 0, 0, None
        return row


def wide_model(bench: Bench) -> TinyLlamaForCausalLM:
    """Returns a small model with wide weights, so that its output depends on its input."""
    torch.manual_seed(0)
    config = TinyLlamaConfig.preset("micro", vocab_size=128, max_position_embeddings=512)
    made = TinyLlamaForCausalLM(config).eval()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return endless(made.to(bench.device))


def noisy(target: Any, spread: float) -> Any:
    """Returns a copy with noise on its weights: a draft that is right in part."""
    draft = copy.deepcopy(target)
    for parameter in draft.parameters():
        parameter.data += spread * torch.randn_like(parameter)
    return draft


def ragged(number: int, seed: int, vocabulary: int = 128, longest: int = 40) -> list[list[int]]:
    """Returns prompts of different lengths."""
    generator = random.Random(seed)
    return [generator.choices(range(8, vocabulary), k=generator.randint(1, longest)) for _ in range(number)]


def generated(target: Any, prompts: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
    """Returns the new tokens of a batch."""
    inputs = {name: tensor.to(target.device) for name, tensor in left_padded(prompts).items()}
    return target.generate(**inputs, **GREEDY | options)[:, max(map(len, prompts)) :].tolist()
