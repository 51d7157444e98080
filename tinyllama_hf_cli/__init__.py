"""The `tinyllama-hf` command.

It is a separate package, so that `--help` and completion import nothing else. Each command imports what it needs when
it runs.
"""

import sys
from typing import Annotated

import typer

from . import (
    compare,
    conversion,
    data,
    evaluation,
    hub,
    inference,
    memory,
    plan,
    recipes,
    selection,
    serving,
    tokenizer,
)
from .openmp import let_threads_sleep


app = typer.Typer(
    name="tinyllama-hf",
    help="Prepare data, evaluate, convert, generate, chat, serve and publish with a small Llama.\n\n"
    "To train, run: accelerate launch --quiet recipes/pretrain.py RECIPE.yaml. To fine-tune, use recipes/sft.py "
    "instead. `recipes copy` copies both.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"tinyllama-hf {version('tinyllama_hf')}")
        raise typer.Exit


@app.callback()
def _accept_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Declares the options of the command itself; each acts in its callback."""


app.command("list")(inference.list_command)
app.command("generate")(inference.generate_command)
app.command("chat")(inference.chat_command)
app.command("serve")(serving.serve_command)
app.command("memory")(memory.memory_command)
app.command("convert")(conversion.convert_command)
app.command("merge")(conversion.merge_command)
app.command("verify")(conversion.verify_command)
app.command("prepare")(data.prepare_command)
app.command("plan")(plan.plan_command)
app.command("compare")(compare.compare_command)
app.command("report")(evaluation.report_command)
app.command("select")(selection.select_command)
app.command("publish")(hub.publish_command)
_PASSES_ON = {"ignore_unknown_options": True}  # of the scripts, such as --dry-run
app.command("train", context_settings=_PASSES_ON)(recipes.train_command)
app.command("sft", context_settings=_PASSES_ON)(recipes.sft_command)
app.command("dpo", context_settings=_PASSES_ON)(recipes.dpo_command)
app.add_typer(evaluation.app, name="eval")
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(recipes.app, name="recipes")


def main() -> None:
    """Runs the command; bad input, or an error of the system, ends with one message and exit status 2."""
    let_threads_sleep()
    try:
        app()
    except (ValueError, OSError) as error:
        message = _message(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def _message(error: ValueError | OSError) -> str | None:
    """Returns the message of an expected exception; `None` for one that needs a traceback.

    An error of the system has a number. Libraries also raise `OSError` without one, for all that goes wrong in them.
    """
    from tinyllama_hf.errors import InputError, one_line

    if isinstance(error, InputError):
        return str(error)
    if not isinstance(error, OSError) or error.errno is None:
        return None
    if error.filename is None:
        return one_line(error)
    return f"{error.filename}: {error.strerror}. Check the name, the permissions and the free space"
