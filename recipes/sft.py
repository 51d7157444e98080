"""Fine-tunes a base checkpoint into a chat model from a YAML recipe, with TRL.

    accelerate launch --quiet recipes/sft.py RECIPE.yaml [section.key=value ...] [--overwrite] [--dry-run]

Full fine-tuning and LoRA. The loss covers the replies of the assistant and their stop tokens only. The result is a
plain Llama folder with a chat template:

    accelerate launch --quiet recipes/sft.py recipes/sft/full.yaml model.path=runs/demo/pretrain/milestones/NAME
    tinyllama-hf chat runs/sft/full

Invalid input ends with one message and exit status 2 (`accelerate launch` turns every failure into 1; `--quiet` keeps
it from printing its own traceback).
"""

import sys
from typing import TYPE_CHECKING

from tinyllama_hf_cli.fine_tuning import Stages, run_script


if TYPE_CHECKING:
    from tinyllama_hf.finetune.config import ConversationConfig


def main() -> int:
    return run_script(__doc__, "recipes/sft/full.yaml", load_config, import_stages)


def load_config(recipe: str, overrides: list[str]) -> "ConversationConfig":
    from tinyllama_hf.finetune.config import load_finetune_config

    return load_finetune_config(recipe, overrides)


def import_stages() -> Stages:
    from tinyllama_hf.finetune.run_summary import dry_run_lines, summary_lines
    from tinyllama_hf.finetune.sft import finetune_run, open_run

    return Stages(open_run, summary_lines, dry_run_lines, finetune_run)


if __name__ == "__main__":
    sys.exit(main())
