"""Trains a chat model on preferences from a YAML recipe, with TRL: direct preference optimization (DPO).

    accelerate launch --quiet recipes/dpo.py RECIPE.yaml [section.key=value ...] [--overwrite] [--dry-run]

Each row of the data has a prompt, a chosen and a rejected reply. The model is usually one that recipes/sft.py wrote;
it is also the reference, of which only log-probabilities are kept. They are cached for later runs. The result is a
plain Llama folder with a chat template:

    accelerate launch --quiet recipes/dpo.py recipes/dpo/lora.yaml model.path=runs/sft/full data.preferences=FILE.jsonl
    tinyllama-hf chat runs/dpo/lora

Invalid input ends with one message and exit status 2 (`accelerate launch` turns every failure into 1; `--quiet` keeps
it from printing its own traceback).
"""

import sys
from typing import TYPE_CHECKING

from tinyllama_hf_cli.fine_tuning import Stages, run_script


if TYPE_CHECKING:
    from tinyllama_hf.finetune.config import PreferenceConfig


def main() -> int:
    return run_script(__doc__, "recipes/dpo/lora.yaml", load_config, import_stages)


def load_config(recipe: str, overrides: list[str]) -> "PreferenceConfig":
    from tinyllama_hf.finetune.config import load_preference_config

    return load_preference_config(recipe, overrides)


def import_stages() -> Stages:
    from tinyllama_hf.finetune.dpo import open_preference_run, tune_preferences
    from tinyllama_hf.finetune.pair_summary import preference_dry_run_lines, preference_lines

    return Stages(open_preference_run, preference_lines, preference_dry_run_lines, tune_preferences)


if __name__ == "__main__":
    sys.exit(main())
