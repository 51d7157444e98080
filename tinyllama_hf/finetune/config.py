"""The schema of a fine-tuning recipe."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from ..errors import did_you_mean
from ..recipe import RecipeFile, Section, Trackers, read_recipe, split_names
from .row_formats import CONVERSATIONS, PREFERENCES


class ModelSection(Section):
    """The base model (a folder, a released name or a Hub id), and control tokens to add to its vocabulary."""

    path: str
    new_tokens: Annotated[list[str], BeforeValidator(split_names)] = Field(default_factory=list)


class ChatSection(Section):
    """The chat template: `own` (the model's), `auto` (own, else `llama2`), a bundled one, or a `.jinja` file."""

    template: str = "auto"


class ConversationSource(Section):
    """A file or data set of conversations or preferences.

    `columns` names the columns of the file that have other names than those of the formats; `weight` is the share of
    the source relative to its size.
    """

    path: str
    weight: float = Field(default=1.0, gt=0)
    columns: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("columns")
    @classmethod
    def _of_one_format(cls, columns: dict[str, str]) -> dict[str, str]:
        formats = CONVERSATIONS + PREFERENCES
        known = {name for kind in formats for name in kind.columns + kind.optional}
        if unknown := [name for name in columns if name not in known]:
            raise ValueError(f"unknown column {unknown[0]!r}{did_you_mean(unknown[0], known)}")
        if not any({*columns} <= {*kind.columns, *kind.optional} for kind in formats):
            raise ValueError(f"{' and '.join(columns)} are columns of different formats; name those of one")
        return columns


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, (str, dict)) else value


class DataSection(Section):
    """What is held out, and what happens to rows that are invalid or too long."""

    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    max_length: int | None = Field(default=None, ge=8)  # by default the longest conversation, at most the context
    too_long: Literal["error", "drop", "truncate"] = "error"
    invalid: Literal["error", "drop"] = "error"


class ConversationDataSection(DataSection):
    """The conversations."""

    conversations: Annotated[list[ConversationSource], Field(min_length=1), BeforeValidator(_as_list)]


class PreferenceDataSection(DataSection):
    """The preferences."""

    too_long: Literal["error", "drop"] = "error"
    preferences: Annotated[list[ConversationSource], Field(min_length=1), BeforeValidator(_as_list)]


class AdapterSection(Section):
    """What is trained: all weights (`full`), or an adapter: LoRA, DoRA, or LoRA over weights in 4 bit (QLoRA)."""

    kind: Literal["full", "lora", "qlora", "dora"] = "full"
    rank: int = Field(default=8, gt=0)
    alpha: float = Field(default=16, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Annotated[list[str], BeforeValidator(split_names)] = Field(default_factory=lambda: ["all-linear"])
    modules_to_save: Annotated[list[str], BeforeValidator(split_names)] = Field(default_factory=list)


class TrainingSection(Section):
    """Number of epochs, learning rate, batch size, optimizer and precision."""

    epochs: float = Field(default=3, gt=0)
    learning_rate: float = Field(gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = Field(default=10, ge=0)
    sequences_per_step: int = Field(default=16, gt=0)
    micro_batch_size: int = Field(gt=0)
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    weight_decay: float = Field(default=0.0, ge=0)
    gradient_clip: float = Field(default=1.0, gt=0)
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # bf16 on a GPU that computes with it, fp32 otherwise
    activation_checkpointing: bool = False
    kernels: Literal["none", "liger"] = "none"
    neftune_alpha: float | None = Field(default=None, gt=0)
    seed: int = Field(default=3407, ge=0, lt=2**32)  # transformers.set_seed (5.23) seeds numpy, which accepts 32 bits


class ConversationTrainingSection(TrainingSection):
    """The same, with packing."""

    packing: bool = True


class PreferenceTrainingSection(TrainingSection):
    """The same, for one epoch. A sequence is a pair, with both replies."""

    epochs: float = Field(default=1, gt=0)


class PreferenceSection(Section):
    """The loss of direct preference optimization (DPO)."""

    beta: float = Field(default=0.1, gt=0)
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"


class EvaluationSection(Section):
    """The loss of held-out replies during training, which model is kept, and early stopping."""

    every_steps: int | None = Field(default=None, gt=0)  # by default ten times in a run
    keep: Literal["best", "last"] = "best"
    patience: int | None = Field(default=None, gt=0)  # evaluations without a new best loss before the run ends


class CheckpointsSection(Section):
    """Rolling checkpoints, from which a stopped run resumes; the last `keep` are kept, and the best one."""

    every_steps: int | None = Field(default=None, gt=0)  # by default as often as evaluation
    keep: int = Field(default=2, ge=1)


class LoggingSection(Section):
    """How often a row is written to `metrics.jsonl` and the trackers, and the progress bar moves."""

    every_steps: int = Field(default=10, gt=0)
    trackers: Trackers = Field(default_factory=list)


class FinetuneConfig(RecipeFile):
    """What all fine-tuning recipes have."""

    output_dir: str
    model: ModelSection
    chat: ChatSection = ChatSection()
    data: DataSection
    adapter: AdapterSection = AdapterSection()
    training: TrainingSection
    evaluation: EvaluationSection = EvaluationSection()
    checkpoints: CheckpointsSection = CheckpointsSection()
    logging: LoggingSection = LoggingSection()


class ConversationConfig(FinetuneConfig):
    """A recipe for supervised fine-tuning."""

    data: ConversationDataSection
    training: ConversationTrainingSection


class PreferenceConfig(FinetuneConfig):
    """A recipe for preference tuning."""

    data: PreferenceDataSection
    preference: PreferenceSection = PreferenceSection()
    training: PreferenceTrainingSection


def load_finetune_config(path: str | os.PathLike, overrides: Sequence[str] = ()) -> ConversationConfig:
    """Reads a recipe, applies `section.key=value` overrides, and fills in what it leaves out. See [`read_recipe`]."""
    fill_in = partial(_fill_in, name=Path(path).stem, rates=(2e-5, 2e-4))
    return read_recipe(ConversationConfig, path, overrides, _contradictions, fill_in)


def load_preference_config(path: str | os.PathLike, overrides: Sequence[str] = ()) -> PreferenceConfig:
    """Does the same for preference tuning."""
    fill_in = partial(_fill_in, name=Path(path).stem, rates=(5e-7, 5e-6))
    return read_recipe(PreferenceConfig, path, overrides, _contradictions, fill_in)


def _fill_in(recipe: dict[str, Any], name: str, rates: tuple[float, float]) -> None:
    """Fills in what depends on other keys. `rates` are the learning rates of all weights and of an adapter."""
    recipe.setdefault("output_dir", f"runs/{name}")
    adapter = recipe.get("adapter")
    has_adapter = isinstance(adapter, dict) and adapter.get("kind", "full") != "full"
    training = recipe.setdefault("training", {})
    if isinstance(training, dict):
        training.setdefault("learning_rate", rates[has_adapter])
        sequences = training.get("sequences_per_step", 16)
        dividing = isinstance(sequences, int) and next(size for size in (8, 4, 2, 1) if sequences % size == 0)
        training.setdefault("micro_batch_size", dividing or 1)


def _contradictions(sections: Mapping[str, Any]) -> list[str]:
    """Returns the violated rules between keys, each with the keys, the values and the fix."""
    training, adapter, found = sections.get("training"), sections.get("adapter"), []
    if training and training.sequences_per_step % training.micro_batch_size:
        sizes = [n for n in range(1, training.sequences_per_step + 1) if training.sequences_per_step % n == 0]
        found.append(
            f"training.micro_batch_size: {training.micro_batch_size} does not divide training.sequences_per_step "
            f"{training.sequences_per_step}. Use one of {', '.join(map(str, sizes))}"
        )
    if adapter and adapter.kind != "full" and "lm_head" in adapter.targets:
        found.append(
            "adapter.targets: lm_head cannot have an adapter, which TRL (1.16) would not train. Add it to "
            "adapter.modules_to_save instead"
        )
    return found
