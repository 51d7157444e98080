"""`tinyllama-hf recipes`: the recipes and scripts that come with the package."""

from pathlib import Path
from typing import Annotated

import typer


app = typer.Typer(help="The training recipes and evaluation scripts that come along.", no_args_is_help=True)


@app.command("list")
def list_recipes() -> None:
    """List the files, each with its first line.

    Example: tinyllama-hf recipes list
    """
    for name, file in _files():
        if file.suffix != ".jsonl":  # rows, described by the README beside them
            print(f"{name:<28} {_summary(file)}")


@app.command()
def copy(
    folder: Annotated[Path, typer.Argument(help="Where to; must not exist.")],
) -> None:
    """Write recipes and scripts into a folder, ready for `accelerate launch FOLDER/pretrain.py FOLDER/RECIPE.yaml`.

    Example: tinyllama-hf recipes copy my-recipes
    """
    import shutil

    if folder.exists():
        typer.echo(f"error: {folder}: exists already; choose another folder, or remove it", err=True)
        raise typer.Exit(2)
    for name, file in _files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / name)
    print(f"wrote {folder}")


def _files() -> list[tuple[str, Path]]:
    """(name under the copied folder, file) of everything that travels with the package."""
    import importlib.util

    package = Path(importlib.util.find_spec("tinyllama_hf").origin).parent
    found = []
    for part, target in (("recipes", ""), ("eval", "eval/")):
        # A wheel carries them inside the package, a clone beside it.
        root = next(path for path in (package / part, package.parent / part) if path.is_dir())
        files = sorted(
            p for p in root.rglob("*") if p.is_file() and p.suffix in (".py", ".yaml", ".sh", ".md", ".jsonl")
        )
        found += [(target + file.relative_to(root).as_posix(), file) for file in files]
    return found


def _summary(file: Path) -> str:
    first = file.read_text(encoding="utf-8").lstrip("#! \n").split("\n")
    lines = [line.strip('# "\t') for line in first if line.strip('# "\t') and not line.startswith("/")]
    return lines[0] if lines else ""
