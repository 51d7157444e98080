"""Fine-tuning recipes: all problems are reported at once, and all bundled recipes are valid."""

import pytest
import yaml
from transformers import set_seed

from tests.conftest import ROOT, assert_recipe_is_complete
from tinyllama_hf.errors import InputError
from tinyllama_hf.finetune.config import load_finetune_config, load_preference_config


RECIPES = sorted((ROOT / "recipes" / "sft").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_every_recipe_is_valid_complete_and_says_how_to_run_it(path):
    assert_recipe_is_complete(path, load_finetune_config(path))


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "dpo").glob("*.yaml")), ids=lambda p: p.name)
def test_every_recipe_for_preferences_too(path):
    assert_recipe_is_complete(path, load_preference_config(path))


@pytest.mark.parametrize(("kind", "rate"), [("full", 5e-7), ("lora", 5e-6), ("qlora", 5e-6)])
def test_the_learning_rate_of_preferences(kind, rate, tmp_path):
    short = {"model": {"path": "x"}, "data": {"preferences": "y"}, "adapter": {"kind": kind}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(short))
    config = load_preference_config(tmp_path / "a.yaml")
    assert (config.training.learning_rate, config.training.epochs) == (rate, 1)


def test_preferences_are_not_packed():
    path = ROOT / "recipes" / "dpo" / "lora.yaml"
    with pytest.raises(InputError, match=r"training.packing: unknown key"):
        load_preference_config(path, ["training.packing=true"])
    with pytest.raises(InputError, match=r"preference.loss: 'kto': input should be 'sigmoid', 'ipo' or 'hinge'"):
        load_preference_config(path, ["preference.loss=kto"])


def test_the_kind_of_adapter_is_in_the_name():
    recipes = {path.stem: load_finetune_config(path) for path in RECIPES if path.parent.name == "sft"}
    named = {name: name.split("-")[-1] for name in recipes if name.split("-")[-1] != "sft"}
    assert {name: recipes[name].adapter.kind for name in named} == named
    assert all(recipe.training.packing for recipe in recipes.values())


def test_all_problems_at_once(tmp_path):
    values = yaml.safe_load(RECIPES[0].read_text())
    values["training"]["learning_rat"] = 1
    values["adapter"]["kind"] = "rslora"
    values["training"]["epochs"] = 0
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(InputError) as caught:
        load_finetune_config(tmp_path / "a.yaml")
    for line in (
        "3 problems",
        "training.learning_rat: unknown key; did you mean 'learning_rate'?",
        "adapter.kind: 'rslora': input should be 'full', 'lora', 'qlora' or 'dora'",
        "training.epochs: 0: input should be greater than 0",
    ):
        assert line in str(caught.value)


def test_a_micro_batch_that_does_not_divide():
    with pytest.raises(InputError, match=r"micro_batch_size: 3 .*sequences_per_step 16\b.* 1, 2, 4, 8, 16"):
        load_finetune_config(RECIPES[0], ["training.micro_batch_size=3"])


def test_an_adapter_on_the_head():
    with pytest.raises(InputError, match=r"adapter.targets: lm_head .*Add it to adapter.modules_to_save"):
        load_finetune_config(RECIPES[0], ["adapter.kind=lora", "adapter.targets=q_proj,lm_head"])
    load_finetune_config(RECIPES[0], ["adapter.kind=full", "adapter.targets=lm_head"])


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64])
def test_a_seed_that_the_trainer_does_not_take(seed):
    with pytest.raises(InputError, match=f"training.seed: {seed}: "):
        load_finetune_config(RECIPES[0], [f"training.seed={seed}"])


def test_transformers_takes_no_larger_seed():
    """The reason for the limit of 32 bits. If this fails, the limit can be that of pretraining."""
    with pytest.raises(ValueError, match="Seed must be between 0"):
        set_seed(2**32)
    set_seed(2**32 - 1)
