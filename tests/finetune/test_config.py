"""Recipes of fine-tuning: every problem at once, and every recipe that comes along."""

import pytest
import yaml

from tests.conftest import ROOT
from tinyllama_hf.errors import InputError
from tinyllama_hf.finetune.config import load_config


RECIPES = sorted((ROOT / "recipes" / "sft").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_every_recipe_is_valid_complete_and_says_how_to_run_it(path):
    config = load_config(path)
    written = yaml.safe_load(path.read_text())
    for section, values in config.model_dump(mode="json").items():
        assert not isinstance(values, dict) or set(values) == set(written[section]), f"{section} is not complete"
    assert f"recipes/sft.py {path.relative_to(ROOT)}" in path.read_text()
    assert config.adapter.rank == 8


def test_full_and_lora():
    assert {path.stem: load_config(path).adapter.kind for path in RECIPES} == {"full": "none", "lora": "lora"}


def test_all_problems_at_once(tmp_path):
    values = yaml.safe_load(RECIPES[0].read_text())
    values["training"]["learning_rat"] = 1
    values["adapter"]["kind"] = "qlora"
    values["training"]["epochs"] = 0
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(InputError) as caught:
        load_config(tmp_path / "a.yaml")
    for line in (
        "3 problems",
        "training.learning_rat: unknown key; did you mean 'learning_rate'?",
        "adapter.kind: 'qlora': input should be 'none' or 'lora'",
        "training.epochs: 0: input should be greater than 0",
    ):
        assert line in str(caught.value)


def test_a_micro_batch_that_does_not_divide():
    with pytest.raises(
        InputError, match=r"3 does not divide training.sequences_per_step 16; sizes that do: 1, 2, 4, 8, 16"
    ):
        load_config(RECIPES[0], ["training.micro_batch_size=3"])
