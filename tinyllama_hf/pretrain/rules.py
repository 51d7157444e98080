"""The rules between the keys of a pretraining recipe. Each message has the keys, the values and the fix."""

import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import did_you_mean
from ..presets import PRESETS
from .schedule import Steps


# Fields of a Llama that a recipe may not override, and why.
_NOT_OVERRIDDEN = {
    "vocab_size": "is set by the tokenizer",
    "bos_token_id": "is set by the tokenizer",
    "eos_token_id": "is set by the tokenizer",
    "pad_token_id": "would freeze an embedding row; tokenizer and generation config use <unk> for padding",
    "attention_dropout": "is not supported: validation runs in training mode and relies on the absence of dropout",
    "model_type": "is always llama",
}


def contradictions(sections: Mapping[str, Any]) -> Iterator[str]:
    """One message per broken rule, checked on the sections that could be read."""
    data, schedule, training, branch = (sections.get(name) for name in ("data", "schedule", "training", "branch"))
    if "model" in sections:
        yield from _model_problems(sections["model"])
    if data:
        yield from _data_problems(data)
    if schedule:
        yield from _schedule_problems(schedule, branch)
    if training:
        yield from _training_problems(training, data, schedule)
    if training and "milestones" in sections:
        yield from _milestone_problems(sections["milestones"], training)
    if branch and "model" in sections and sections["model"].init_from:
        yield "branch: takes its weights from the milestone; remove model.init_from"


def _data_problems(data: Any) -> Iterator[str]:
    weights = {"data.sources": [source.weight for source in data.sources]}
    weights |= {f"data.mixture_changes.{i}.weights": change.weights for i, change in enumerate(data.mixture_changes)}
    for key, values in weights.items():
        if len(values) != len(data.sources):
            yield (
                f"{key}: {len(values)} weights for {len(data.sources)} sources; give one weight per source, in the "
                "same order"
            )
        elif abs(math.fsum(values) - 1) > 1e-6:
            yield f"{key}: the weights sum to {math.fsum(values):.6g}; they must sum to 1"
    for place, source in enumerate(data.sources):
        if not any(values[place] for values in weights.values() if len(values) == len(data.sources)):
            yield f"data.sources.{place}.weight: 0 and never changed, so {source.path} is not used; remove it"
    paths = [os.path.abspath(source.path) for source in data.sources]
    if repeated := sorted({path for path in paths if paths.count(path) > 1}):
        yield f"data.sources: {repeated[0]} appears twice; list it once, with the sum of the weights"
    for place, (before, change) in enumerate(itertools.pairwise(data.mixture_changes), start=1):
        if (end := before.from_tokens + before.ramp_tokens) > change.from_tokens:
            yield (
                f"data.mixture_changes.{place}.from_tokens: {change.from_tokens} is before the end of the previous "
                f"ramp, {end}; shorten that ramp or start later"
            )


def _schedule_problems(schedule: Any, branch: Any) -> Iterator[str]:
    name, is_cooldown = schedule.name, branch is not None and branch.schedule == "cooldown"
    if name == "constant" and schedule.floor is not None and not is_cooldown:
        yield f"schedule.floor: {schedule.floor} has no effect on a constant schedule; use null"
    if name != "constant" and schedule.floor is None:
        yield f"schedule.floor: is required by {name}; the published recipe uses a tenth of the peak"
    if schedule.floor is not None and schedule.floor > schedule.peak:
        yield f"schedule.floor: {schedule.floor} is above schedule.peak {schedule.peak}"
    if schedule.floor == schedule.peak:
        # TinyLlama trained its first 0.5T tokens at a constant rate by this mistake.
        yield f"schedule.floor: {schedule.floor} equals schedule.peak, so {name} is constant; use name: constant"
    if (schedule.decay_tokens is None) == (name == "wsd"):
        rule = "is required by wsd" if name == "wsd" else f"{schedule.decay_tokens} has no effect on {name}; use null"
        yield f"schedule.decay_tokens: {rule}"


def _training_problems(training: Any, data: Any, schedule: Any) -> Iterator[str]:
    total = training.total_tokens
    if training.tokens_per_step > total:
        yield f"training.total_tokens: {total} is less than one step of {training.tokens_per_step}"
    if training.deterministic and training.attention == "flash_attention_3":
        yield "training.deterministic: flash_attention_3 is not deterministic; use sdpa or flash_attention_2"
    yield from _order_problems("training.batch_changes", training.batch_changes, total)
    if data:
        if data.document_masking and training.attention.startswith("flash"):
            # transformers (5.23) detects documents only in a batch of one row, and silently joins them in a larger
            # one. Flash attention has no fp32, which a test of equality with the dense mask would need.
            yield (
                f"training.attention: {training.attention} does not support data.document_masking; use flex, or set "
                "data.document_masking: false"
            )
        sizes = {"training.tokens_per_step": training.tokens_per_step}
        for place, change in enumerate(training.batch_changes):
            sizes[f"training.batch_changes.{place}.tokens_per_step"] = change.tokens_per_step
        length = data.sequence_length
        for key, size in sizes.items():
            if size % length:
                nearest = size // length * length or length
                yield f"{key}: {size} is not a multiple of data.sequence_length {length}; use {nearest}"
        yield from _order_problems("data.mixture_changes", data.mixture_changes, total)
    # A warm-up that alone is longer than the run is a warning of `describe_recipe`.
    if schedule and schedule.decay_tokens and schedule.warmup_tokens + schedule.decay_tokens >= total:
        yield (
            f"schedule.warmup_tokens: {schedule.warmup_tokens} and schedule.decay_tokens "
            f"{schedule.decay_tokens} together must be below training.total_tokens {total}"
        )


def _order_problems(key: str, changes: Sequence[Any], total: int) -> Iterator[str]:
    """Changes must be in increasing order and before the end of the run."""
    starts = [change.from_tokens for change in changes]
    if sorted(set(starts)) != starts:
        yield f"{key}: from_tokens {starts} must increase"
    if beyond := [start for start in starts if start >= total]:
        yield f"{key}: from_tokens {beyond} must be below training.total_tokens {total}"


def _milestone_problems(milestones: Any, training: Any) -> Iterator[str]:
    total = training.total_tokens
    if beyond := [count for count in milestones.tokens if not 0 < count <= total]:
        yield f"milestones.tokens: {beyond} must be above 0 and at most training.total_tokens {total}"
    for name in ("tokens", "steps"):
        values = getattr(milestones, name)
        if sorted(set(values)) != values:
            yield f"milestones.{name}: {values} must increase"
    changes = sorted((change.from_tokens, change.tokens_per_step) for change in training.batch_changes)
    number = Steps(total, training.tokens_per_step, changes).number
    if beyond := [step for step in milestones.steps if not 0 < step <= number]:
        yield (
            f"milestones.steps: {beyond} must be above 0 and at most {number}, the step that reaches "
            f"training.total_tokens {total}"
        )


def _model_problems(model: Any) -> Iterator[str]:
    if model.preset is None and model.init_from is None:
        yield f"model.preset: is required ({', '.join(PRESETS)}), or model.init_from, which brings its architecture"
    if model.preset is not None and model.preset not in PRESETS:
        yield f"model.preset: unknown preset {model.preset!r}{did_you_mean(model.preset, PRESETS)}"
    if not model.overrides:
        return
    from ..configuration_tinyllama import TinyLlamaConfig  # imports torch, which takes seconds

    known = TinyLlamaConfig().to_dict()
    for name, value in model.overrides.items():
        if name not in known:
            yield f"model.overrides.{name}: unknown field of a Llama config{did_you_mean(name, known)}"
        elif name in _NOT_OVERRIDDEN:
            yield f"model.overrides.{name}: {_NOT_OVERRIDDEN[name]}; remove it"
        elif name in PRESETS["1.1b"] and (not isinstance(value, int) or value < 1):
            yield f"model.overrides.{name}: {value!r}: must be an integer above 0"
