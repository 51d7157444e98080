"""The recipe of a data set: the arguments of `prepare` in a YAML file."""

import os
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from ..recipe import RecipeFile, read_recipe


class PrepareConfig(RecipeFile):
    """A complete recipe. The keys are the arguments of [`prepare`]."""

    sources: list[str] = Field(min_length=1)
    tokenizer: str
    output: str
    separator: Literal["both", "bos", "eos"] = "both"
    text_column: str = "text"
    where: str | None = None
    validation_fraction: float = Field(default=0.005, ge=0, lt=1)
    sample_fraction: float = Field(default=1.0, gt=0, le=1)


def load_prepare_config(path: str | os.PathLike, overrides: Sequence[str] = ()) -> PrepareConfig:
    """Reads a recipe and applies `key=value` overrides, see [`read_recipe`]."""
    return read_recipe(PrepareConfig, path, overrides, lambda sections: [])
