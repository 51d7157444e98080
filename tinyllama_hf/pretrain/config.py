"""The schema of a pretraining recipe. Amounts of data are in tokens.

Rules between keys are in `rules.py`, defaults that follow from other keys in `defaults.py`.
"""

import os
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from ..recipe import RecipeFile, Section, Seed, TokenCount, Trackers, read_recipe
from .defaults import fill_in
from .rules import contradictions
from .schedule import Steps


def _unquoted_off(value: Any) -> Any:
    return "off" if value is False else value  # YAML 1.1 reads an unquoted off as false


def _no_longer_watch(value: Any) -> Any:
    if value == "watch":
        raise ValueError("no longer exists; use off, and run `tinyllama-hf eval text RUN --watch` in another process")
    return value


class ModelSection(Section):
    """The architecture: a preset, or that of `init_from`, and fields of `TinyLlamaConfig` that differ from it."""

    preset: str | None = None
    overrides: dict[str, Any] = Field(default_factory=dict)
    init_from: str | None = None  # a Llama that provides the initial weights; the token count starts at 0


class SourceSection(Section):
    """A prepared data set and its share of the tokens."""

    path: str
    weight: float = Field(ge=0, le=1)


class MixtureChange(Section):
    """New weights of the sources, reached linearly over `ramp_tokens` tokens from `from_tokens` on."""

    from_tokens: TokenCount = Field(gt=0)
    ramp_tokens: TokenCount = Field(ge=0)
    weights: list[Annotated[float, Field(ge=0, le=1)]]


class DataSection(Section):
    """The training data and the length of its sequences."""

    tokenizer: str
    sources: list[SourceSection] = Field(min_length=1)
    mixture_changes: list[MixtureChange] = Field(default_factory=list)
    sequence_length: int = Field(ge=2)
    document_masking: bool = False


class ScheduleSection(Section):
    """Learning rate: linear warm-up to `peak`, then one of three shapes.

    `cosine` decays to `floor` at the last token; `wsd` stays at `peak` and decays linearly to `floor` over the last
    `decay_tokens`; `constant` stays at `peak`.
    """

    name: Literal["cosine", "wsd", "constant"] = "cosine"
    peak: float = Field(gt=0)
    floor: float | None = Field(default=None, ge=0)
    warmup_tokens: TokenCount = Field(ge=0)
    decay_tokens: TokenCount | None = Field(default=None, gt=0)


class OptimizerSection(Section):
    """AdamW with weight decay on every parameter, including norms and embeddings, as in TinyLlama."""

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    gradient_clip: float = Field(default=1.0, gt=0)


class BatchChange(Section):
    """A new batch size, from the first step that starts at or after `from_tokens`; the last one if several apply."""

    from_tokens: TokenCount = Field(gt=0)
    tokens_per_step: TokenCount = Field(gt=0)


class TrainingSection(Section):
    """Length, batch size and numerics of the run."""

    total_tokens: TokenCount = Field(gt=0)
    tokens_per_step: TokenCount = Field(gt=0)
    batch_changes: list[BatchChange] = Field(default_factory=list)
    micro_batch_size: int = Field(gt=0)
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # see `with_precision`
    compile: Annotated[Literal["auto", "off", "layers", "model"], BeforeValidator(_unquoted_off)] = "auto"
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex"] = "sdpa"
    kernels: Literal["none", "liger"] = "none"
    activation_checkpointing: bool = False
    deterministic: bool = False  # CUDA: use deterministic algorithms
    skip_spikes_sigma: float | None = Field(default=None, gt=0)
    seed: Seed = 3407


class MilestonesSection(Section):
    """When a complete model folder is written: at the first step that reaches each count, and at the last step."""

    tokens: list[TokenCount] = Field(default_factory=list)
    steps: list[int] = Field(default_factory=list)
    keep_training_state: bool = False  # also keep the optimizer state of each, for `branch`


class CheckpointsSection(Section):
    """Rolling checkpoints, from which a stopped run resumes; the last `keep` are kept."""

    every_tokens: TokenCount = Field(gt=0)
    keep: int = Field(default=2, ge=1)


class BranchSection(Section):
    """Starts from a milestone of another run that kept its training state."""

    model_config = ConfigDict(populate_by_name=True)

    from_: str = Field(alias="from")  # folder of the milestone
    schedule: Literal["cooldown", "continue"]


class ValidationSection(Section):
    """Loss on held-out blocks, every `every_tokens` tokens and at milestones."""

    every_tokens: TokenCount = Field(gt=0)
    max_tokens: TokenCount = Field(gt=0)


class LoggingSection(Section):
    """How often a row is written to `metrics.jsonl` and the trackers, and the progress bar moves."""

    every_steps: int = Field(default=10, gt=0)
    trackers: Trackers = Field(default_factory=list)


class PretrainConfig(RecipeFile):
    """A complete recipe."""

    output_dir: str
    resume: Literal["auto", "never"] = "auto"
    model: ModelSection
    data: DataSection
    schedule: ScheduleSection
    optimizer: OptimizerSection = OptimizerSection()
    training: TrainingSection
    milestones: MilestonesSection = MilestonesSection()
    evaluate_at_milestones: Annotated[
        Literal["off", "inline"], BeforeValidator(_no_longer_watch), BeforeValidator(_unquoted_off)
    ] = "off"
    checkpoints: CheckpointsSection
    branch: BranchSection | None = None
    validation: ValidationSection
    logging: LoggingSection = LoggingSection()

    @cached_property
    def steps(self) -> Steps:
        """The optimizer steps, and the tokens seen before and after each."""
        training = self.training
        changes = [(change.from_tokens, change.tokens_per_step) for change in training.batch_changes]
        return Steps(training.total_tokens, training.tokens_per_step, changes)

    def with_precision(self, precision: Literal["fp32", "bf16"]) -> "PretrainConfig":
        """The same recipe, with this precision in place of `auto`."""
        if self.training.precision != "auto":
            return self
        return self.model_copy(update={"training": self.training.model_copy(update={"precision": precision})})

    def sequences(self, step: int) -> int:
        """Sequences per optimizer step, all processes together."""
        return self.steps.tokens_of(step) // self.data.sequence_length


def load_pretrain_config(path: str | os.PathLike, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Reads a recipe, applies `section.key=value` overrides, and fills in what it leaves out; see [`read_recipe`]."""
    return read_recipe(PretrainConfig, path, overrides, contradictions, partial(fill_in, name=Path(path).stem))
