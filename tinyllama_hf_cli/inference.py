"""`tinyllama-hf list` and `tinyllama-hf generate`."""

from typing import Annotated

import typer


def list_released() -> None:
    """List the released checkpoints by the names that every command takes in place of a model folder.

    pythia-1b, of another family, is the peer of the published table and is not loaded.

    Example: tinyllama-hf list
    """
    from rich.console import Console
    from rich.table import Table

    from tinyllama_hf.released import released

    table = Table("name", "tokens", "Hub id", "revision", "average", box=None, pad_edge=False)
    for model in released():
        average = "" if model.average is None else f"{model.average:.2f}"
        tokens = f"{model.tokens / 1e9:,.0f}B" if model.kind != "chat" else "chat"
        table.add_row(model.name, tokens, model.hub, model.revision, average)
    # Wide enough for its contents where the output is no terminal, so that it can be searched line by line.
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)
    print("average: unweighted mean of the seven published commonsense scores, in percent")


def generate(
    model: Annotated[str, typer.Argument(help="Model folder, released name or Hub id.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue; empty begins a new one.")] = "",
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token each time.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Draw from the smallest set of tokens with this probability.")] = 0.95,
    max_new_tokens: Annotated[int | None, typer.Option(help="Default: 256, or what is left of the context.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the draws repeatable.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Continue a prompt, shown as it appears.

    Example: tinyllama-hf generate step-1431k-3T "The capital of France is" --temperature 0 --max-new-tokens 20
    """
    from tinyllama_hf.inference.generation import ExactTextStreamer, generate_text
    from tinyllama_hf.inference.load import load
    from tinyllama_hf.progress import quiet_library_bars

    quiet_library_bars()
    loaded, tokenizer = load(model, device=device)
    streamer = ExactTextStreamer(tokenizer)
    generate_text(loaded, tokenizer, prompt, max_new_tokens, temperature, top_p, seed, streamer)
    print()
