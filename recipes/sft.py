"""Fine-tunes a base checkpoint into a chat model from a YAML recipe, with TRL.

    accelerate launch --quiet recipes/sft.py RECIPE.yaml [section.key=value ...] [--overwrite] [--dry-run]

Full fine-tuning and LoRA. The loss covers the replies of the assistant and their stop tokens only. The result is a
plain Llama folder with a chat template:

    accelerate launch --quiet recipes/sft.py recipes/sft/full.yaml model.path=runs/demo/pretrain/milestones/NAME
    tinyllama-hf chat runs/sft/full

Invalid input ends with one message and exit status 2 (`accelerate launch` turns every failure into 1; `--quiet` keeps
it from printing its own traceback).
"""

import argparse
import os
import sys
from shlex import quote

from tinyllama_hf_cli.loading import import_libraries
from tinyllama_hf_cli.openmp import let_threads_sleep


def main() -> int:
    arguments = parse_arguments()
    let_threads_sleep()

    # Imported here, so that neither --help nor a mistake in the recipe has to wait for torch.
    from tinyllama_hf.errors import InputError
    from tinyllama_hf.finetune.config import load_finetune_config

    try:
        config = load_finetune_config(arguments.recipe, arguments.overrides)
        is_main = os.environ.get("RANK", "0") == "0"
        if is_main:
            print("loading       libraries, data and model", flush=True)
        import_libraries()
        from tinyllama_hf.finetune.run_callback import DivergedError
        from tinyllama_hf.finetune.run_summary import dry_run_lines, summary_lines
        from tinyllama_hf.finetune.sft import finetune_run, open_run
        from tinyllama_hf.pretrain.checkpoints import FullDiskError
        from tinyllama_hf.pretrain.signals import Stopped
        from tinyllama_hf.progress import quiet_library_bars

        quiet_library_bars()
        run = open_run(config, arguments.overwrite)  # checks everything, writes nothing
        if is_main:
            print(*summary_lines(run), sep="\n", flush=True)
        if arguments.dry_run:
            if is_main:
                print(*dry_run_lines(run), sep="\n")
            return 0
        finetune_run(run, arguments.overwrite)
        if is_main:
            print(f"wrote {run.output}. Next, for example: tinyllama-hf chat {quote(str(run.output))}")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from the last checkpoint, if there is one", file=sys.stderr)
        return 130
    except (DivergedError, FullDiskError, Stopped) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="YAML file; every key is explained in recipes/sft/full.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the recipe")
    parser.add_argument("--overwrite", action="store_true", help="replace the existing fine-tuned model in output_dir")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, and exit")
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    sys.exit(main())
