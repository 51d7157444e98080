"""Fine-tunes a base checkpoint into a chat model from a YAML recipe, with TRL.

    accelerate launch recipes/sft.py RECIPE.yaml [section.key=value ...] [--overwrite] [--dry-run]

Full fine-tuning and LoRA; the loss is taken on the assistant's replies and their stop token only. What it writes is a
plain Llama folder with the chat template:

    accelerate launch recipes/sft.py recipes/sft/full.yaml model.path=runs/demo/pretrain/milestones/NAME
    tinyllama-hf chat runs/sft/full

Bad input ends with one message and exit status 2 (`accelerate launch` turns any failure into 1; `--quiet` keeps it from
adding a traceback of its own).
"""

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="sft.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="YAML file; every key is explained in those that come along")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the recipe")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the fine-tuned model that lies in output_dir"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what would happen, and stop")
    arguments = parser.parse_intermixed_args()

    from tinyllama_hf.errors import InputError
    from tinyllama_hf.finetune.config import load_config
    from tinyllama_hf.finetune.sft import finetune
    from tinyllama_hf.progress import quiet_library_bars

    quiet_library_bars()
    try:
        finetune(load_config(arguments.recipe, arguments.overrides), arguments.overwrite, arguments.dry_run)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
