"""Recipes: all problems are reported at once, with the nearest valid name or the fix; and every bundled recipe."""

import pytest
import torch
import yaml

from tests.conftest import ROOT, assert_recipe_is_complete
from tinyllama_hf.errors import InputError
from tinyllama_hf.pretrain import setup
from tinyllama_hf.pretrain.config import load_pretrain_config


RECIPES = sorted(p for p in (ROOT / "recipes").rglob("*.yaml") if p.parent.name in ("pretrain", "demo"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_recipe_is_valid_complete_and_says_how_to_run_it(path):
    assert_recipe_is_complete(path, load_pretrain_config(path))


def test_all_problems_at_once(recipe):
    values = yaml.safe_load(recipe.read_text())
    values["data"]["sequence_lenght"] = 3
    values["training"]["precision"] = "fp17"
    values["shedule"] = {}
    values["data"]["sources"][0]["wieght"] = 1
    del values["model"]["preset"]
    values["schedule"]["floor"] = 9.0
    values["milestones"]["tokens"] = [5, 4]
    recipe.write_text(yaml.safe_dump(values))
    with pytest.raises(InputError) as caught:
        load_pretrain_config(recipe)
    message = str(caught.value)
    assert message.startswith(f"{recipe}: 6 problems")
    assert "schedule.floor: 9.0 is above schedule.peak 0.005" in message, "rules between keys are checked as well"
    assert "data.sequence_lenght: unknown key; did you mean 'sequence_length'?" in message
    assert "training.precision: 'fp17': input should be 'auto', 'fp32' or 'bf16'" in message
    assert "shedule: unknown key; did you mean 'schedule'?" in message
    assert "data.sources.0.wieght: unknown key; did you mean 'weight'?" in message
    assert "model.preset: is required" in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.tokens_per_step=100"], "training.tokens_per_step: 100 .*data.sequence_length 32; use 96"),
        (["training.total_tokens=100"], "100 is less than one step of 256"),
        (
            ["data.sources=[{path: a, weight: 0.7}, {path: b, weight: 0.2}]"],
            "the weights sum to 0.9; they must sum to 1",
        ),
        (["schedule.floor=1.0"], "schedule.floor: 1.0 is above schedule.peak 0.005"),
        (
            ["schedule.name=wsd", "schedule.decay_tokens=999", "schedule.warmup_tokens=2999"],
            "must be below training.total_tokens 3072",
        ),
        (["milestones.tokens=[9999999]"], r"milestones.tokens: \[9999999\] .*training.total_tokens 3072"),
        (["milestones.tokens=[512, 256]"], "must increase"),
        (["data.sources=[{path: a, weight: 0.7}, {path: ./a, weight: 0.3}]"], "data.sources: .*a appears twice"),
        (["model.preset=nanno", "model.overrides={hiden_size: 64, rope: 1}"], "3 problems"),
        (["training.seed=["], "its value is not valid YAML"),
        (["training.seed"], "write section.key=value"),
        (["training.seed.more=1"], "is a value, not a section"),
        (["training.micro_batch_size=-1"], "training.micro_batch_size: -1: input should be greater than 0"),
    ],
)
def test_contradictions(recipe, overrides, message):
    with pytest.raises(InputError, match=message):
        load_pretrain_config(recipe, overrides)


@pytest.mark.parametrize("seed", [-1, 2**64, 10**30])
def test_a_seed_that_no_generator_takes(recipe, seed):
    with pytest.raises(InputError, match=rf"training.seed: {seed}: .*{2**64 - 1}"):
        load_pretrain_config(recipe, [f"training.seed={seed}"])


def test_the_largest_seed_works(recipe):
    """For the weights and for the order of the data."""
    opened = setup.open_pretrain_run(load_pretrain_config(recipe, [f"training.seed={2**64 - 1}"]))
    torch.manual_seed(opened.config.training.seed)
    assert len(opened.mixture.blocks(0, 8)) == 8


INTEGERS = [
    "data.sequence_length",
    "schedule.warmup_tokens",
    "schedule.decay_tokens",
    "training.total_tokens",
    "training.tokens_per_step",
    "training.micro_batch_size",
    "checkpoints.every_tokens",
    "checkpoints.keep",
    "validation.every_tokens",
    "validation.max_tokens",
    "logging.every_steps",
    "model.overrides.hidden_size",
]
LISTS = {
    "milestones.tokens": "[{}]",
    "milestones.steps": "[{}]",
    "data.mixture_changes": "[{{from_tokens: {}, ramp_tokens: 0, weights: [1]}}]",
    "training.batch_changes": "[{{from_tokens: 256, tokens_per_step: {}}}]",
}


@pytest.mark.parametrize("key", [*INTEGERS, *LISTS])
def test_integers_of_more_than_64_bits(recipe, key):
    with pytest.raises(InputError, match=rf"{key}.*{2**64}"):
        load_pretrain_config(recipe, [f"{key}={LISTS.get(key, '{}').format(2**64)}"])


def test_overrides(recipe):
    config = load_pretrain_config(
        recipe, ["training.total_tokens=10_000", "schedule.peak=4e-4", "training.compile=off"]
    )
    assert (config.training.total_tokens, config.schedule.peak, config.training.compile) == (10_000, 4e-4, "off")
    assert config.steps.number == 40 and config.sequences(1) == 8


def test_what_is_no_recipe(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_pretrain_config(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text("{")
    with pytest.raises(InputError, match="not valid YAML"):
        load_pretrain_config(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("- 1")
    with pytest.raises(InputError, match="mapping of sections"):
        load_pretrain_config(tmp_path / "a.yaml")


def test_thirds_sum_to_one(recipe):
    third = 0.3333333333333333
    sources = ", ".join(f"{{path: {name}, weight: {third}}}" for name in "abc")
    assert len(load_pretrain_config(recipe, [f"data.sources=[{sources}]"]).data.sources) == 3


def test_a_recipe_that_is_no_text(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        load_pretrain_config(tmp_path / "a.yaml")
