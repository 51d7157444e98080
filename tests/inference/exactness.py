"""Speculative output against stock `generate`, sequence by sequence, with the ties counted."""

import copy
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from tinyllama_hf.inference.speculative import SpeculationStatistics, speculative_generate


TIE = 1e-4
PAD = 0


@dataclasses.dataclass
class Tally:
    """What was compared, and what was found."""

    sequences: int = 0
    ties: int = 0
    statistics: SpeculationStatistics = dataclasses.field(default_factory=lambda: SpeculationStatistics(0))

    def add(self, statistics: SpeculationStatistics) -> None:
        for field in dataclasses.fields(statistics):
            total = getattr(self.statistics, field.name) + getattr(statistics, field.name)
            setattr(self.statistics, field.name, total)

    def __str__(self) -> str:
        found = self.statistics
        return (
            f"{self.sequences} sequences, {self.ties} differ at a tie; {found.drafted} tokens drafted, "
            f"{found.acceptance * 100:.0f} % accepted, {found.tokens_per_pass:.2f} tokens a pass and row"
        )


class Reference:
    """Stock greedy output of each prompt by itself; kept, since many drafts are compared with it."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self._outputs: dict[Any, list[int]] = {}

    def __call__(self, prompt: Sequence[int], options: dict[str, Any]) -> list[int]:
        key = (tuple(prompt), tuple(sorted(options.items())))
        if key not in self._outputs:
            self._outputs[key] = self._generate(prompt, options).sequences[0, len(prompt) :].tolist()
        return self._outputs[key]

    def is_tie(self, prefix: Sequence[int], options: dict[str, Any]) -> bool:
        """Whether the two best scores after processors are closer than rounding may decide."""
        output = self._generate(prefix, options | {"max_new_tokens": 1}, output_scores=True)
        best = output.scores[0][0].topk(2).values
        return (best[0] - best[1]).item() < TIE

    def _generate(self, prompt: Sequence[int], options: dict[str, Any], **more: Any) -> Any:
        ids = torch.tensor([prompt])
        return self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            pad_token_id=PAD,
            return_dict_in_generate=True,
            **options,
            **more,
        )


def left_padded(prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Prompts as `generate` takes them."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def first_difference(ours: Sequence[int], stock: Sequence[int]) -> int | None:
    """The first place where the outputs differ; padding may follow ours."""
    for place, (a, b) in enumerate(itertools.zip_longest(ours, stock)):
        if a != b:
            return None if place >= len(stock) and set(ours[place:]) == {PAD} else place
    return None


def compare(
    reference: Reference,
    target: PreTrainedModel,
    draft: Any,
    prompts: Sequence[Sequence[int]],
    options: Iterable[dict[str, Any]],
    batches: Sequence[int],
    draft_lengths: Sequence[int],
) -> Tally:
    """Generates with each draft length, batches of each size in turn, and asserts that every sequence is the reference's."""
    tally = Tally()
    for chosen, draft_length in itertools.product(options, draft_lengths):
        sizes, rest = itertools.cycle(batches), list(prompts)
        while rest:
            size = next(sizes)
            batch, rest = rest[:size], rest[size:]
            output = speculative_generate(
                target,
                copy.copy(draft),
                **left_padded(batch),
                draft_length=draft_length,
                do_sample=False,
                pad_token_id=PAD,
                return_dict_in_generate=True,
                **chosen,
            )
            new = output.sequences[:, max(map(len, batch)) :].tolist()
            for prompt, ours in zip(batch, new, strict=True):
                stock = reference(prompt, chosen)
                place = first_difference(ours, stock)
                if place is not None:
                    assert reference.is_tie([*prompt, *stock[:place]], chosen), (
                        f"{prompt} with {chosen}, {draft_length} drafted, batch of {len(batch)}: {ours} instead of {stock}"
                    )
                    tally.ties += 1
                tally.sequences += 1
            tally.add(output.statistics)
    return tally
