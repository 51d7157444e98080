"""A finished run, as a reference for others."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import write_recipe
from tests.pretrain.runs import run


@pytest.fixture(scope="module")
def uninterrupted(prepared, tokenizer_folder, tmp_path_factory) -> Path:
    return run(write_recipe(tmp_path_factory.mktemp("uninterrupted"), prepared, tokenizer_folder))


@pytest.fixture
def output(recipe, uninterrupted) -> Path:
    """The output folder of the recipe with the finished run, as after running the recipe."""
    return Path(shutil.copytree(uninterrupted, recipe.parent / "run"))
