"""Pretrains a small Llama from a YAML recipe.

    accelerate launch recipes/pretrain.py RECIPE.yaml [section.key=value ...] [--overwrite] [--dry-run]

In about a minute on a CPU, from a folder that holds recipes/ (`tinyllama-hf recipes copy recipes` writes it):

    tinyllama-hf tokenizer train embedded:prose --vocab-size 1024 --output runs/micro/tokenizer
    tinyllama-hf prepare embedded:prose --tokenizer runs/micro/tokenizer --output runs/micro/data --validation-fraction 0.05
    accelerate launch recipes/pretrain.py recipes/pretrain/micro.yaml

Bad input ends with one message and exit status 2 (`accelerate launch` turns any failure into 1; `--quiet` keeps it from
adding a traceback of its own).
"""

import sys
from collections.abc import Sequence

from tinyllama_hf_cli.scripts import training_script


def run(recipe: str, overrides: Sequence[str], overwrite: bool, dry_run: bool) -> int:
    from tinyllama_hf.pretrain.config import load_config
    from tinyllama_hf.pretrain.loop import NonFiniteError, pretrain

    try:
        pretrain(load_config(recipe, overrides), overwrite, dry_run)
    except NonFiniteError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 3
    return 0


def main() -> int:
    overwrites = "remove the run that lies in output_dir"
    interrupted = "milestones that were written are whole, --overwrite starts anew"
    return training_script("pretrain.py", __doc__, overwrites, interrupted, run)


if __name__ == "__main__":
    sys.exit(main())
