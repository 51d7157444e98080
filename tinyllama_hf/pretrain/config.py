"""The recipe of a pretraining run. Every quantity of data is in tokens; the rules between keys are in `rules.py`."""

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from ..recipe import Section, Seed, read_recipe
from .rules import contradictions
from .schedule import Steps


def _unquoted_off(value: Any) -> Any:
    return "off" if value is False else value  # YAML 1.1 reads an unquoted off as false


def _no_longer_watch(value: Any) -> Any:
    if value == "watch":
        raise ValueError("no longer exists; use off, and run `tinyllama-hf eval RUN --watch` in another process")
    return value


class ModelSection(Section):
    """The architecture: a preset, and fields of `TinyLlamaConfig` that differ from it."""

    preset: str
    overrides: dict[str, Any] = Field(default_factory=dict)
    init_from: str | None = None  # a Llama whose weights the run begins with; the token count begins at 0


class SourceSection(Section):
    """A prepared data set and its share of the tokens."""

    path: str
    weight: float = Field(ge=0, le=1)


class MixtureChange(Section):
    """New shares of the sources, reached linearly over `ramp_tokens` from `from_tokens` on."""

    from_tokens: int = Field(gt=0)
    ramp_tokens: int = Field(ge=0)
    weights: list[Annotated[float, Field(ge=0, le=1)]]


class DataSection(Section):
    """What is read, in what shape."""

    tokenizer: str
    sources: list[SourceSection] = Field(min_length=1)
    mixture_changes: list[MixtureChange] = Field(default_factory=list)
    sequence_length: int = Field(ge=2)
    document_masking: bool = False


class ScheduleSection(Section):
    """Learning rate: linear warm-up to `peak`, then by name.

    `cosine` falls to `floor` at the last token; `wsd` stays and falls linearly to `floor` over the last `decay_tokens`;
    `constant` stays.
    """

    name: Literal["cosine", "wsd", "constant"]
    peak: float = Field(gt=0)
    floor: float | None = Field(default=None, ge=0)
    warmup_tokens: int = Field(ge=0)
    decay_tokens: int | None = Field(default=None, gt=0)


class OptimizerSection(Section):
    """AdamW on every parameter, norms and embeddings included, as TinyLlama."""

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]
    eps: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    gradient_clip: float = Field(gt=0)


class BatchChange(Section):
    """Another batch from the first step on that begins with `from_tokens` seen; of several that one step passes, the last."""

    from_tokens: int = Field(gt=0)
    tokens_per_step: int = Field(gt=0)


class TrainingSection(Section):
    """How long, in what batches, with what arithmetic."""

    total_tokens: int = Field(gt=0)
    tokens_per_step: int = Field(gt=0)
    batch_changes: list[BatchChange] = Field(default_factory=list)
    micro_batch_size: int = Field(gt=0)
    precision: Literal["fp32", "bf16"]
    compile: Annotated[Literal["auto", "off", "layers", "model"], BeforeValidator(_unquoted_off)] = "auto"
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex"] = "sdpa"
    kernels: Literal["none", "liger"] = "none"
    activation_checkpointing: bool = False
    deterministic: bool = False  # CUDA: algorithms that give the same bits each time
    skip_spikes_sigma: float | None = Field(default=None, gt=0)
    seed: Seed


class MilestonesSection(Section):
    """Where a complete model folder is written: at the first step that reaches each count, and at the last step."""

    tokens: list[int] = Field(default_factory=list)
    steps: list[int] = Field(default_factory=list)
    keep_training_state: bool = False  # keeps the optimiser beside each, for `branch`


class CheckpointsSection(Section):
    """What a run that was stopped goes on from; the last `keep` stay."""

    every_tokens: int = Field(gt=0)
    keep: int = Field(ge=1)


class BranchSection(Section):
    """A fork of another run at one of its milestones that kept its training state."""

    model_config = ConfigDict(populate_by_name=True)

    from_: str = Field(alias="from")  # the milestone's folder
    schedule: Literal["cooldown", "continue"]


class ValidationSection(Section):
    """Loss on held-out blocks, every so many tokens and at the end."""

    every_tokens: int = Field(gt=0)
    max_tokens: int = Field(gt=0)


class LoggingSection(Section):
    """A row of `metrics.jsonl` and a move of the progress bar; the same rows to trackers."""

    every_steps: int = Field(gt=0)
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)


class PretrainConfig(Section):
    """A whole recipe."""

    output_dir: str
    resume: Literal["auto", "never"] = "auto"
    model: ModelSection
    data: DataSection
    schedule: ScheduleSection
    optimizer: OptimizerSection
    training: TrainingSection
    milestones: MilestonesSection
    evaluate_at_milestones: Annotated[
        Literal["off", "inline"], BeforeValidator(_no_longer_watch), BeforeValidator(_unquoted_off)
    ] = "off"
    checkpoints: CheckpointsSection
    branch: BranchSection | None = None
    validation: ValidationSection
    logging: LoggingSection

    @cached_property
    def steps(self) -> Steps:
        """Which optimiser step begins with how many tokens seen."""
        training = self.training
        changes = [(change.from_tokens, change.tokens_per_step) for change in training.batch_changes]
        return Steps(training.total_tokens, training.tokens_per_step, changes)

    def sequences(self, step: int) -> int:
        """Blocks of an optimiser step, all processes together."""
        return self.steps.tokens_of(step) // self.data.sequence_length


def load_config(path: str | os.PathLike, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Reads a recipe and applies `section.key=value` overrides; see [`read_recipe`]."""
    return read_recipe(PretrainConfig, path, overrides, contradictions)
