"""The `tinyllama-hf` command.

A package of its own, so that `--help` and completion run without torch: importing `tinyllama_hf` registers model
classes, which needs it. Every command imports what it needs when it runs.
"""

import sys

import typer

from . import conversion, data, evaluation, hub, inference, memory, plan, recipes, serving, tokenizer
from .openmp import let_threads_sleep


app = typer.Typer(
    name="tinyllama-hf",
    help="Everything one does with a small Llama: data, training, evaluation, conversion, generation, chat, publishing.\n\n"
    "Training itself is started with: accelerate launch recipes/pretrain.py RECIPE.yaml, fine-tuning with "
    "recipes/sft.py (see `recipes copy`).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command("list")(inference.list_released)
app.command("generate")(inference.generate)
app.command("chat")(inference.chat)
app.command("serve")(serving.serve)
app.command("memory")(memory.memory)
app.command("convert")(conversion.convert)
app.command("verify")(conversion.verify)
app.command("prepare")(data.prepare)
app.command("plan")(plan.plan)
app.command("report")(evaluation.report)
app.command("publish")(hub.publish)
app.add_typer(evaluation.app, name="eval")
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(recipes.app, name="recipes")


def main() -> None:
    """Runs the command; bad input ends with one message and exit status 2."""
    let_threads_sleep()
    try:
        app()
    except ValueError as error:
        # Only our own error stands for bad input; it cannot be imported at the top, see the module's docstring.
        errors = sys.modules.get("tinyllama_hf.errors")
        if errors is None or not isinstance(error, errors.InputError):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
