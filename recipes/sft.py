"""Fine-tunes a base checkpoint into a chat model from a YAML recipe, with TRL.

    accelerate launch recipes/sft.py RECIPE.yaml [section.key=value ...] [--overwrite] [--dry-run]

Full fine-tuning and LoRA; the loss is taken on the assistant's replies and their stop token only. What it writes is a
plain Llama folder with the chat template:

    accelerate launch recipes/sft.py recipes/sft/full.yaml model.path=runs/demo/pretrain/milestones/NAME
    tinyllama-hf chat runs/sft/full

Bad input ends with one message and exit status 2 (`accelerate launch` turns any failure into 1; `--quiet` keeps it from
adding a traceback of its own).
"""

import sys
from collections.abc import Sequence

from tinyllama_hf_cli.scripts import training_script


def run(recipe: str, overrides: Sequence[str], overwrite: bool, dry_run: bool) -> int:
    from tinyllama_hf.finetune.config import load_config
    from tinyllama_hf.finetune.sft import finetune

    finetune(load_config(recipe, overrides), overwrite, dry_run)
    return 0


def main() -> int:
    overwrites = "replace the fine-tuned model that lies in output_dir"
    return training_script("sft.py", __doc__, overwrites, "nothing was written", run)


if __name__ == "__main__":
    sys.exit(main())
