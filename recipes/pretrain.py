"""Pretrains a small Llama from a YAML recipe.

    accelerate launch recipes/pretrain.py RECIPE.yaml [section.key=value ...] [--overwrite] [--dry-run]

In about a minute on a CPU, from a folder that holds recipes/ (`tinyllama-hf recipes copy recipes` writes it):

    tinyllama-hf tokenizer train embedded:prose --vocab-size 1024 --output runs/micro/tokenizer
    tinyllama-hf prepare embedded:prose --tokenizer runs/micro/tokenizer --output runs/micro/data --validation-fraction 0.05
    accelerate launch recipes/pretrain.py recipes/pretrain/micro.yaml

Bad input ends with one message and exit status 2 (`accelerate launch` turns any failure into 1; `--quiet` keeps it from
adding a traceback of its own).
"""

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="pretrain.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="YAML file; every key is explained in those that come along")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the recipe")
    parser.add_argument("--overwrite", action="store_true", help="remove the run that lies in output_dir")
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what would happen, and stop")
    arguments = parser.parse_intermixed_args()

    from tinyllama_hf.errors import InputError
    from tinyllama_hf.pretrain.config import load_config
    from tinyllama_hf.pretrain.loop import NonFiniteError, pretrain
    from tinyllama_hf.progress import quiet_library_bars

    quiet_library_bars()
    try:
        config = load_config(arguments.recipe, arguments.overrides)
        pretrain(config, arguments.overwrite, arguments.dry_run)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NonFiniteError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("interrupted; milestones that were written are whole, --overwrite starts anew", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
