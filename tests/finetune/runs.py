"""Runs of a recipe in the test process."""

from tinyllama_hf.finetune import sft
from tinyllama_hf.finetune.config import load_finetune_config
from tinyllama_hf.finetune.run_summary import dry_run_lines, summary_lines


COLORS = ("red", "green", "blue", "white")
THINGS = ("sky", "sea", "sun", "car", "cat", "hat", "box", "bag", "cup", "pen")


def finetune(config, overwrite=False, dry_run=False):
    """The stages of recipes/sft.py."""
    run = sft.open_run(config, overwrite)
    print(*summary_lines(run), *(dry_run_lines(run) if dry_run else []), sep="\n")
    if not dry_run:
        sft.finetune_run(run, overwrite)


def tuned(recipe, *overrides):
    config = load_finetune_config(recipe, overrides)
    finetune(config)
    return recipe.parent / "chat"
