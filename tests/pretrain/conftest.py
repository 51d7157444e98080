"""A finished run, as a reference for others."""

from pathlib import Path

import pytest

from tests.conftest import write_recipe
from tests.pretrain.runs import run


@pytest.fixture(scope="module")
def uninterrupted(prepared, tokenizer_folder, tmp_path_factory) -> Path:
    return run(write_recipe(tmp_path_factory.mktemp("uninterrupted"), prepared, tokenizer_folder))
