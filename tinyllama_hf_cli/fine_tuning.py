"""The scripts `recipes/sft.py` and `recipes/dpo.py`: options, messages and exit statuses."""

import sys
from typing import TYPE_CHECKING, Any, NamedTuple


if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Iterable
    from pathlib import Path


class Stages(NamedTuple):
    """What a script does with a recipe.

    Attributes:
        open_run (`Callable`): checks everything and loads the data; writes nothing.
        summary_lines (`Callable`): describes an opened run.
        dry_run_lines (`Callable`): shows what it would train on and write.
        train (`Callable`): trains it.
    """

    open_run: "Callable[[Any, bool], Any]"
    summary_lines: "Callable[[Any], Iterable[str]]"
    dry_run_lines: "Callable[[Any], Iterable[str]]"
    train: "Callable[[Any, bool, Callable[[Path], None] | None], None]"


def run_script(
    description: str | None,
    example: str,
    load_config: "Callable[[str, list[str]], Any]",
    import_stages: "Callable[[], Stages]",
) -> int:
    """Runs a fine-tuning script, and returns its exit status.

    Args:
        description (`str`): for `--help`.
        example (`str`): the recipe that explains every key.
        load_config (`Callable`): reads a recipe with its overrides, without torch.
        import_stages (`Callable`): imports what needs torch.
    """
    import os
    from importlib.util import find_spec
    from shlex import quote

    from .openmp import let_threads_sleep
    from .optional_output import TrainingPicture

    arguments = _parse_arguments(description, example)
    let_threads_sleep()

    # Imported here, so that neither --help nor a mistake in the recipe has to wait for torch.
    from tinyllama_hf.errors import InputError

    try:
        config = load_config(arguments.recipe, arguments.overrides)
        is_main = os.environ.get("RANK", "0") == "0"
        if is_main:
            print("loading       libraries, data and model", flush=True)
        from .loading import import_libraries

        import_libraries()
        from tinyllama_hf.progress import quiet_bitsandbytes, quiet_library_bars

        quiet_bitsandbytes()  # which the trainer of transformers imports
        stages = import_stages()
        from tinyllama_hf.finetune.run_callback import DivergedError
        from tinyllama_hf.pretrain.checkpoints import FullDiskError
        from tinyllama_hf.pretrain.signals import Stopped

        quiet_library_bars()
        run = stages.open_run(config, arguments.overwrite)
        if is_main:
            print(*stages.summary_lines(run), sep="\n", flush=True)
        if arguments.dry_run:
            if is_main:
                print(*stages.dry_run_lines(run), sep="\n")
            return 0
        picture = TrainingPicture() if find_spec("matplotlib") else None
        if is_main and not picture:
            print("pictures      none: matplotlib is not installed (pip install 'tinyllama_hf[report]')")
        stages.train(run, arguments.overwrite, picture)
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


def _parse_arguments(description: str | None, example: str) -> "Namespace":
    import argparse

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help=f"YAML file; every key is explained in {example}")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the recipe")
    parser.add_argument("--overwrite", action="store_true", help="replace the existing fine-tuned model in output_dir")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, and exit")
    return parser.parse_intermixed_args()
