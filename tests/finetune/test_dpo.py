"""Preference tuning: the loss equals a reference of 20 lines, and reference values are computed once."""

import json

import datasets
import pytest
import yaml

from tests.conftest import ROOT
from tests.finetune.runs import COLORS, THINGS
from tests.finetune.test_sft_runs import metrics
from tinyllama_hf.finetune import dpo
from tinyllama_hf.finetune.config import load_preference_config
from tinyllama_hf.finetune.pair_summary import preference_dry_run_lines, preference_lines


def user(text):
    return {"role": "user", "content": text}


def reply(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path / "datasets"


@pytest.fixture
def pairs(base, tmp_path, cache):
    """A recipe that prefers the color to be said first."""
    rows = [
        {
            "prompt": [user(f"Which {thing} is number {i}?")],
            "chosen": [reply(f"The {color} one." + " Really." * (i % 3))],
            "rejected": [reply(f"One that is {color}")],
        }
        for thing in THINGS
        for i, color in enumerate(COLORS)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = yaml.safe_load((ROOT / "recipes" / "dpo" / "lora.yaml").read_text())
    values["output_dir"] = str(tmp_path / "chat")
    values["model"]["path"] = str(base)
    values["data"] |= {"preferences": str(tmp_path / "pairs.jsonl"), "max_length": 96, "validation_fraction": 0.2}
    values["adapter"]["kind"] = "full"
    values["training"] |= {"epochs": 3, "learning_rate": 1e-3, "sequences_per_step": 8, "micro_batch_size": 4}
    values["evaluation"]["every_steps"] = 3
    values["logging"]["every_steps"] = 2
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml"


def tune(recipe, *overrides, overwrite=False):
    """The stages of recipes/dpo.py; returns the folder and the summary."""
    run = dpo.open_preference_run(load_preference_config(recipe, overrides), overwrite)
    lines = preference_lines(run)
    dpo.tune_preferences(run, overwrite)
    return run.output, "\n".join(lines)


def test_it(pairs):
    folder, lines = tune(pairs)
    print(lines)
    print(*metrics(folder), sep="\n")
    print((folder / "provenance.json").read_text())
    folder, lines = tune(pairs, overwrite=True)
    print(lines)
    print(*preference_dry_run_lines(dpo.open_preference_run(load_preference_config(pairs), True)))
    assert 0
