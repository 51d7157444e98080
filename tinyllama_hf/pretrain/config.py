"""The recipe of a pretraining run. Every quantity of data is in tokens."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from ..configuration_tinyllama import PRESETS, TinyLlamaConfig
from ..errors import did_you_mean
from ..recipe import Section, read_recipe


# Fields of a Llama that a recipe does not decide, and what does.
_NOT_OVERRIDDEN = {
    "vocab_size": "follows from the tokenizer",
    "bos_token_id": "follows from the tokenizer",
    "eos_token_id": "follows from the tokenizer",
    "pad_token_id": "would freeze an embedding row; padding is <unk>, in the tokenizer and the generation config",
    "attention_dropout": "pretraining has no dropout, and validation relies on it",
    "model_type": "is llama",
}


class ModelSection(Section):
    """The architecture: a preset, and fields of `TinyLlamaConfig` that differ from it."""

    preset: str
    overrides: dict[str, Any] = Field(default_factory=dict)


class SourceSection(Section):
    """A prepared data set and its share of the tokens."""

    path: str
    weight: float = Field(gt=0, le=1)


class DataSection(Section):
    """What is read, in what shape."""

    tokenizer: str
    sources: list[SourceSection] = Field(min_length=1)
    sequence_length: int = Field(ge=2)
    document_masking: bool = False


class ScheduleSection(Section):
    """Learning rate: linear warm-up, then a cosine from `peak` to `floor` at the last token."""

    name: Literal["cosine"] = "cosine"
    peak: float = Field(gt=0)
    floor: float = Field(ge=0)
    warmup_tokens: int = Field(ge=0)


class OptimizerSection(Section):
    """AdamW on every parameter, norms and embeddings included, as TinyLlama."""

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]
    eps: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    gradient_clip: float = Field(gt=0)


class TrainingSection(Section):
    """How long, in what batches, with what arithmetic."""

    total_tokens: int = Field(gt=0)
    tokens_per_step: int = Field(gt=0)
    micro_batch_size: int = Field(gt=0)
    precision: Literal["fp32", "bf16"]
    compile: Literal["auto", "off", "layers"] = "auto"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    seed: int = Field(ge=0)

    @field_validator("compile", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML 1.1 reads an unquoted off as false


class MilestonesSection(Section):
    """Where a complete model folder is written: at the first step that reaches each count, and at the last step."""

    tokens: list[int] = Field(default_factory=list)


class ValidationSection(Section):
    """Loss on held-out blocks, every so many tokens and at the end."""

    every_tokens: int = Field(gt=0)
    max_tokens: int = Field(gt=0)


class LoggingSection(Section):
    """A row of `metrics.jsonl` and a move of the progress bar."""

    every_steps: int = Field(gt=0)


class PretrainConfig(Section):
    """A whole recipe."""

    output_dir: str
    model: ModelSection
    data: DataSection
    schedule: ScheduleSection
    optimizer: OptimizerSection
    training: TrainingSection
    milestones: MilestonesSection
    validation: ValidationSection
    logging: LoggingSection

    @property
    def num_steps(self) -> int:
        """Optimiser steps: the last one reaches `total_tokens`."""
        return -(-self.training.total_tokens // self.training.tokens_per_step)

    @property
    def sequences_per_step(self) -> int:
        """Blocks of an optimiser step, all processes together."""
        return self.training.tokens_per_step // self.data.sequence_length


def load_config(path: str | os.PathLike, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Reads a recipe and applies `section.key=value` overrides; see [`read_recipe`]."""
    return read_recipe(PretrainConfig, path, overrides, _contradictions)


def _contradictions(sections: Mapping[str, Any]) -> list[str]:
    """Broken rules between keys, of the sections that could be read; each names the keys, the values and the fix."""
    problems = _model_problems(sections["model"]) if "model" in sections else []
    data, schedule, training = (sections.get(name) for name in ("data", "schedule", "training"))
    if data:
        total = math.fsum(source.weight for source in data.sources)
        if abs(total - 1) > 1e-6:
            problems.append(f"data.sources: the weights sum to {total:.6g}; they must sum to 1")
        paths = [os.path.abspath(source.path) for source in data.sources]
        if repeated := sorted({path for path in paths if paths.count(path) > 1}):
            problems.append(f"data.sources: {repeated[0]} is named twice; name it once, with the sum of the weights")
    if schedule and schedule.floor > schedule.peak:
        problems.append(f"schedule.floor: {schedule.floor} is above schedule.peak {schedule.peak}")
    if not training:
        return problems
    step, total = training.tokens_per_step, training.total_tokens
    if data and step % data.sequence_length:
        nearest = step // data.sequence_length * data.sequence_length or data.sequence_length
        problems.append(
            f"training.tokens_per_step: {step} is no multiple of data.sequence_length {data.sequence_length}; use {nearest}"
        )
    if step > total:
        problems.append(f"training.total_tokens: {total} is less than one step of {step}")
    if schedule and schedule.warmup_tokens >= total:
        problems.append(
            f"schedule.warmup_tokens: {schedule.warmup_tokens} must be below training.total_tokens {total}"
        )
    if "milestones" in sections:
        problems += _milestone_problems(sections["milestones"].tokens, total)
    return problems


def _milestone_problems(tokens: list[int], total: int) -> list[str]:
    problems = []
    if beyond := [count for count in tokens if not 0 < count <= total]:
        problems.append(f"milestones.tokens: {beyond} must lie above 0 and up to training.total_tokens {total}")
    if sorted(set(tokens)) != tokens:
        problems.append(f"milestones.tokens: {tokens} must increase")
    return problems


def _model_problems(model: ModelSection) -> list[str]:
    known = TinyLlamaConfig().to_dict()
    problems = []
    if model.preset not in PRESETS:
        problems.append(f"model.preset: {model.preset!r} does not exist{did_you_mean(model.preset, PRESETS)}")
    for name, value in model.overrides.items():
        if name not in known:
            problems.append(f"model.overrides.{name}: no field of a Llama{did_you_mean(name, known)}")
        elif name in _NOT_OVERRIDDEN:
            problems.append(f"model.overrides.{name}: {_NOT_OVERRIDDEN[name]}; leave it out")
        elif name in PRESETS["1.1b"] and (not isinstance(value, int) or value < 1):
            problems.append(f"model.overrides.{name}: {value!r}: must be a whole number above 0")
    return problems
