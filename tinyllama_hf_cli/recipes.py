"""`tinyllama-hf recipes`: the bundled recipes and scripts."""

from pathlib import Path
from typing import Annotated

import typer


app = typer.Typer(help="List or copy the bundled training recipes and evaluation scripts.", no_args_is_help=True)


@app.command("list")
def list_recipes_command() -> None:
    """List the files with their first lines.

    Example: tinyllama-hf recipes list
    """
    files = _files()
    width = max(len(name) for name, _ in files)
    for name, file in files:
        print(f"{name:<{width}}  {_summary(file)}")


@app.command("copy")
def copy_recipes_command(
    folder: Annotated[Path, typer.Argument(help="Folder to create; must not exist.")],
) -> None:
    """Copy the recipes and scripts, for `accelerate launch --quiet FOLDER/pretrain.py FOLDER/RECIPE.yaml`.

    Example: tinyllama-hf recipes copy my-recipes
    """
    import shutil

    from tinyllama_hf.errors import InputError

    if folder.exists():
        raise InputError(f"{folder}: already exists. Choose another folder, or remove it")
    for name, file in _files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / name)
    print(f"wrote {folder}")


_ARGUMENTS = Annotated[
    list[str] | None, typer.Argument(help="YAML recipe, section.key=value overrides and options of the script.")
]


def train_command(arguments: _ARGUMENTS = None) -> None:
    """Print the command that pretrains: accelerate starts the script, with one process per device.

    Example: tinyllama-hf train recipes/pretrain/micro.yaml
    """
    _name_launch_command("pretrain.py", arguments or ["recipes/pretrain/micro.yaml"])


def sft_command(arguments: _ARGUMENTS = None) -> None:
    """Print the command that fine-tunes: accelerate starts the script, with one process per device.

    Example: tinyllama-hf sft recipes/sft/full.yaml model.path=my-model
    """
    _name_launch_command("sft.py", arguments or ["recipes/sft/full.yaml"])


def dpo_command(arguments: _ARGUMENTS = None) -> None:
    """Print the command that trains on preferences: accelerate starts the script, with one process per device.

    Example: tinyllama-hf dpo recipes/dpo/lora.yaml model.path=my-chat data.preferences=pairs.jsonl
    """
    _name_launch_command("dpo.py", arguments or ["recipes/dpo/lora.yaml"])


def _name_launch_command(script: str, arguments: list[str]) -> None:
    import shlex

    from tinyllama_hf.errors import InputError

    path = Path("recipes") / script
    copy = "" if path.is_file() else "tinyllama-hf recipes copy recipes && "
    command = shlex.join(["accelerate", "launch", "--quiet", str(path), *arguments])
    raise InputError(f"accelerate starts the training. Run: {copy}{command}")


def _files() -> list[tuple[str, Path]]:
    """The name in the copied folder, and the path, of every bundled file."""
    import tinyllama_hf

    package, found = Path(tinyllama_hf.__file__).parent, []
    for part, target in (("recipes", ""), ("eval", "eval/")):
        # In the package in a wheel, next to it in a clone.
        root = next(path for path in (package / part, package.parent / part) if path.is_dir())
        names = sorted(file.relative_to(root) for file in root.rglob("*") if file.is_file())
        # Without the caches of Python and editors in a clone.
        kept = [name for name in names if not any(entry == "__pycache__" or entry[0] == "." for entry in name.parts)]
        found += [(target + name.as_posix(), root / name) for name in kept]
    return found


def _summary(file: Path) -> str:
    if file.suffix == ".jsonl":
        return f"{sum(1 for _ in file.open(encoding='utf-8'))} rows"
    first = file.read_text(encoding="utf-8").lstrip("#! \n").split("\n")
    lines = [line.strip('# "\t') for line in first if line.strip('# "\t') and not line.startswith("/")]
    return lines[0] if lines else ""
