"""`tinyllama-hf tokenizer`: train and verify."""

from pathlib import Path
from typing import Annotated

import typer


app = typer.Typer(help="Train a small tokenizer of Llama 2's kind, and prove that one is exact.", no_args_is_help=True)

EMBEDDED = ("embedded:prose", "embedded:code")
_SOURCES_HELP = "embedded:prose, embedded:code; or files and folders of JSON lines or text."


@app.command()
def train(
    sources: Annotated[list[str], typer.Argument(help=_SOURCES_HELP)],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    vocab_size: Annotated[int, typer.Option(help="Ids, the 256 bytes and three control tokens included.")] = 4096,
    text_column: Annotated[str, typer.Option(help="Column of JSON lines that holds the text.")] = "text",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the tokenizer that lies there.")] = False,
) -> None:
    """Train a SentencePiece BPE tokenizer with byte fallback and dummy prefix, as Llama 2's.

    Example: tinyllama-hf tokenizer train embedded:prose embedded:code --vocab-size 2048 --output my-tokenizer
    """
    import itertools

    from rich.console import Console

    from tinyllama_hf.data.sources import open_sources, read_texts
    from tinyllama_hf.data.train_tokenizer import train_tokenizer

    opened = [open_sources([source], text_column) for source in sources]
    texts = itertools.chain.from_iterable(map(read_texts, opened))
    with Console().status("Reading the texts and training"):
        trained = train_tokenizer(texts, vocab_size, output, overwrite)
    print(f"wrote {output}: {len(trained):,} ids")


@app.command()
def verify(
    folder: Annotated[str, typer.Argument(help="Tokenizer folder or file, or a released name.")],
    files: Annotated[list[str] | None, typer.Argument(help="More of what --text takes.")] = None,
    against: Annotated[Path | None, typer.Option(help="SentencePiece model; default: FOLDER/tokenizer.model.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="File or folder of text or JSON lines, repeatable; default: the embedded corpus."),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column of JSON lines that holds the text.")] = "text",
    stock: Annotated[bool, typer.Option("--stock", help="Test what stock AutoTokenizer makes of the folder.")] = False,
) -> None:
    """Compare a tokenizer with SentencePiece, token for token, and check that every text comes back.

    Exit status 1 at the first difference, which is printed.

    Example: tinyllama-hf tokenizer verify my-model --against tokenizer.model --text README.md CHANGELOG.md
    """
    import itertools

    from rich.console import Console
    from rich.progress import track

    from tinyllama_hf.data.sources import open_sources, read_texts
    from tinyllama_hf.data.train_tokenizer import verify_tokenizer
    from tinyllama_hf.errors import InputError
    from tinyllama_hf.released import TOKENIZER_FILES, local_folder
    from tinyllama_hf.tokenization_tinyllama import load_tokenizer

    sources = [open_sources([source], text_column) for source in [*(text or ()), *(files or ())] or EMBEDDED]
    path = local_folder(folder, TOKENIZER_FILES)
    reference = against or (path if path.suffix == ".model" else path / "tokenizer.model")
    if not reference.is_file():
        raise InputError(
            f"{reference}: no SentencePiece model to compare with; name one with --against tokenizer.model"
        )
    if stock:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    else:
        tokenizer = load_tokenizer(path)
    texts = itertools.chain.from_iterable(map(read_texts, sources))
    texts = track(texts, "Comparing", transient=True, disable=not Console().is_terminal)
    result = verify_tokenizer(tokenizer, reference, texts)
    if not result.characters:
        raise InputError("--text: holds no character to compare; name other files")
    counted = f"{result.texts:,} texts, {result.characters:,} characters, {result.tokens:,} tokens"
    if result.difference is None:
        print(f"equal: {counted}; every text came back from its tokens")
        return
    where = result.difference
    what = "tokens differ" if where.kind == "ids" else "the text does not come back"
    print(f"{what} in text {where.text_number} at character {where.character}: {where.context!r}")
    print(f"  here      {where.ours}\n  reference {where.reference}\nafter {counted}")
    raise typer.Exit(1)
