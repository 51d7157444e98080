"""Compares greedy output with stock transformers: exactly in fp32, with ties counted, and up to rounding in 16 bit."""

import copy
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from tinyllama_hf.decoding.proposals import SpeculationStatistics
from tinyllama_hf.decoding.speculative import speculative_generate


TIE = 1e-4
PAD = 0
# How much rounding may change a logit, relative to the largest: four steps of bf16, which has eight significant bits.
# int8 and nf4 round at least as much, whatever the dtype of the rest.
ROUNDING = 4 * 2.0**-8


def stepwise_logits(model: PreTrainedModel, sequences: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    """Returns the logits of each new token, `[rows, new, vocab_size]`: the prompt in one pass, then token by token.

    In int8, activations of a pass are rounded together, so the passes have the same shapes as in `generate`.
    """
    width, cache, found = prompt.shape[1], None, []
    mask = torch.cat([prompt, torch.ones_like(sequences[:, width:])], dim=1).long()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    for start, end in itertools.pairwise((0, *range(width, sequences.shape[1]))):
        output = model(
            sequences[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        found.append(output.logits[:, -1].float())
    return torch.stack(found, dim=1)


def assert_greedy(model: PreTrainedModel, sequences: torch.Tensor, prompt: torch.Tensor) -> None:
    """Asserts that every new token has the model's largest logit, up to rounding in 16 bit.

    Rounding depends on the order in which attention reads keys and values, on the processor and on the number of
    threads. Tokens of two computations are equal only if the best logit leads by more than that.

    Args:
        model (`PreTrainedModel`): the reference.
        sequences (`torch.Tensor`): `[rows, slots]`, as `generate` returns them.
        prompt (`torch.Tensor`): `[rows, prompt slots]`, the mask of the prompts, padded on the left.
    """
    new = sequences[:, prompt.shape[1] :]
    with torch.inference_mode():
        logits = stepwise_logits(model, sequences, prompt)
    behind = logits.amax(dim=-1) - logits.gather(-1, new[..., None])[..., 0]  # [rows, new]
    is_end = new == model.generation_config.eos_token_id
    behind = behind.masked_fill((is_end.cumsum(dim=1) - is_end.int()) > 0, 0.0)  # padding after a row's end
    assert new.shape[1] > 0 and behind.max() <= ROUNDING * logits.abs().max(), behind


@dataclasses.dataclass
class Tally:
    """Counts of compared sequences and differences."""

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
    """Stock greedy output of each prompt alone; cached, since many drafts are compared with it."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self._outputs: dict[Any, list[int]] = {}

    def __call__(self, prompt: Sequence[int], options: dict[str, Any]) -> list[int]:
        key = (tuple(prompt), tuple(sorted(options.items())))
        if key not in self._outputs:
            self._outputs[key] = self._generate(prompt, options).sequences[0, len(prompt) :].tolist()
        return self._outputs[key]

    def is_tie(self, prefix: Sequence[int], options: dict[str, Any]) -> bool:
        """Returns whether the two best scores after processors differ by less than rounding."""
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
    """Returns prompts as arguments of `generate`."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def first_difference(ours: Sequence[int], stock: Sequence[int]) -> int | None:
    """Returns the first index where the outputs differ; padding may follow ours."""
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
    """Generates with each draft length and batch size, and asserts that every sequence equals the reference."""
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
                        f"{prompt}, {chosen}, {draft_length} drafted, batch of {len(batch)}: {ours} instead of {stock}"
                    )
                    tally.ties += 1
                tally.sequences += 1
            tally.add(output.statistics)
    return tally
