"""What the scripts that `accelerate launch` runs have in common: arguments, and how they end."""

import sys
from typing import Any


def training_script(
    name: str,
    description: str,
    overwrites: str,
    interrupted: str,
    run: Any,
    flags: dict[str, str] | None = None,
) -> int:
    """Reads the arguments of a training script, runs it, and returns its exit status.

    Args:
        name (`str`): of the script.
        description (`str`): its docstring.
        overwrites (`str`): what `--overwrite` does.
        interrupted (`str`): what Ctrl-C leaves behind.
        run (`Callable`): given recipe, overrides, overwrite, dry run and each flag; returns the exit status.
        flags (`dict[str, str]`, *optional*): options of this script alone, with their help.
    """
    import argparse

    parser = argparse.ArgumentParser(
        prog=name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="YAML file; every key is explained in those that come along")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the recipe")
    parser.add_argument("--overwrite", action="store_true", help=overwrites)
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what would happen, and stop")
    flags = flags or {}
    for flag, text in flags.items():
        parser.add_argument(flag, action="store_true", help=text)
    arguments = parser.parse_intermixed_args()
    own = [getattr(arguments, flag.lstrip("-").replace("-", "_")) for flag in flags]

    from tinyllama_hf.errors import InputError
    from tinyllama_hf.progress import quiet_library_bars

    quiet_library_bars()
    try:
        return run(arguments.recipe, arguments.overrides, arguments.overwrite, arguments.dry_run, *own)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted; {interrupted}", file=sys.stderr)
        return 130
