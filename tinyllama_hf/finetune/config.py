"""The schema of a fine-tuning recipe."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from ..recipe import Section, read_recipe


class ModelSection(Section):
    """The base model: a folder, a released name or a Hub id."""

    path: str


class ChatSection(Section):
    """The chat template: `own` (of the model), `auto` (own, else `llama2`), `llama2`, or a `.jinja` file."""

    template: str


class DataSection(Section):
    """The conversations: JSON lines with `messages`, or `embedded:questions`."""

    conversations: str
    validation_fraction: float = Field(gt=0, lt=1)
    max_length: int = Field(ge=8)
    overlong: Literal["error", "drop"]


class AdapterSection(Section):
    """`none` trains all weights; `lora` trains low-rank adapters on all linear layers except the head."""

    kind: Literal["none", "lora"]
    rank: int = Field(gt=0)
    alpha: float = Field(gt=0)
    dropout: float = Field(ge=0, lt=1)


class TrainingSection(Section):
    """Number of epochs, learning rate, batch size and precision."""

    epochs: float = Field(gt=0)
    learning_rate: float = Field(gt=0)
    schedule: Literal["constant", "linear", "cosine"]
    warmup_steps: int = Field(ge=0)
    sequences_per_step: int = Field(gt=0)
    micro_batch_size: int = Field(gt=0)
    weight_decay: float = Field(ge=0)
    gradient_clip: float = Field(gt=0)
    precision: Literal["fp32", "bf16"]
    seed: int = Field(ge=0, lt=2**32)  # transformers.set_seed (5.23) seeds numpy, which accepts 32 bits


class LoggingSection(Section):
    """How often a row is written to `metrics.jsonl`."""

    every_steps: int = Field(gt=0)


class FinetuneConfig(Section):
    """A fine-tuning recipe."""

    output_dir: str
    model: ModelSection
    chat: ChatSection
    data: DataSection
    adapter: AdapterSection
    training: TrainingSection
    logging: LoggingSection


def load_finetune_config(path: str | os.PathLike, overrides: Sequence[str] = ()) -> FinetuneConfig:
    """Reads a recipe and applies `section.key=value` overrides. See [`read_recipe`]."""
    return read_recipe(FinetuneConfig, path, overrides, _contradictions)


def _contradictions(sections: Mapping[str, Any]) -> list[str]:
    """Returns the violated rules between keys, each with the keys, the values and the fix."""
    training = sections.get("training")
    if training and training.sequences_per_step % training.micro_batch_size:
        sizes = [n for n in range(1, training.sequences_per_step + 1) if training.sequences_per_step % n == 0]
        return [
            f"training.micro_batch_size: {training.micro_batch_size} does not divide training.sequences_per_step "
            f"{training.sequences_per_step}. Use one of {', '.join(map(str, sizes))}"
        ]
    return []
