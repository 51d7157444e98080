"""`tinyllama-hf tokenizer`: train and verify."""

from pathlib import Path
from typing import Annotated

import typer

from .loading import import_libraries


app = typer.Typer(help="Train a small tokenizer like that of Llama 2, or verify a tokenizer.", no_args_is_help=True)

EMBEDDED = ("embedded:prose", "embedded:code")
_SOURCES_HELP = "embedded:prose, embedded:code; or files and folders of JSON lines or text."


@app.command("train")
def train_tokenizer_command(
    sources: Annotated[list[str], typer.Argument(help=_SOURCES_HELP)],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    vocab_size: Annotated[
        int, typer.Option(help="Number of ids, including 256 bytes and three control tokens.")
    ] = 4096,
    text_column: Annotated[str, typer.Option(help="Column of JSON lines with the text.")] = "text",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing tokenizer.")] = False,
) -> None:
    """Train a SentencePiece BPE tokenizer with byte fallback and dummy prefix, like that of Llama 2.

    Example: tinyllama-hf tokenizer train embedded:prose embedded:code --vocab-size 2048 --output my-tokenizer
    """
    import itertools

    from tinyllama_hf.data.sources import open_sources, read_texts

    opened = [open_sources([source], text_column) for source in sources]
    import_libraries()
    from tinyllama_hf.data.train_tokenizer import train_tokenizer
    from tinyllama_hf.progress import show_busy

    texts = itertools.chain.from_iterable(map(read_texts, opened))
    with show_busy("reading the texts and training"):
        trained = train_tokenizer(texts, vocab_size, output, overwrite)
    print(f"wrote {output}: {len(trained):,} ids")


@app.command("verify")
def verify_tokenizer_command(
    folder: Annotated[str, typer.Argument(help="Tokenizer folder or file, or the name of a released model.")],
    files: Annotated[list[str] | None, typer.Argument(help="More files or folders, as for --text.")] = None,
    against: Annotated[Path | None, typer.Option(help="SentencePiece model; default: FOLDER/tokenizer.model.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="File or folder of text or JSON lines, repeatable; default: the embedded corpus."),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column of JSON lines with the text.")] = "text",
    stock: Annotated[
        bool, typer.Option("--stock", help="Verify the tokenizer that stock AutoTokenizer loads.")
    ] = False,
) -> None:
    """Compare a tokenizer with SentencePiece, token for token, and check that decoding restores every text.

    The first difference is printed, with exit status 1.

    Example: tinyllama-hf tokenizer verify my-model --against tokenizer.model --text README.md CHANGELOG.md
    """
    import itertools

    from tinyllama_hf.data.sources import open_sources, read_texts
    from tinyllama_hf.errors import InputError
    from tinyllama_hf.released import TOKENIZER_FILES, local_folder

    sources = [open_sources([source], text_column) for source in [*(text or ()), *(files or ())] or EMBEDDED]
    path = local_folder(folder, TOKENIZER_FILES)
    reference = against or (path if path.suffix == ".model" else path / "tokenizer.model")
    if not reference.is_file():
        raise InputError(
            f"{reference}: the SentencePiece model to compare with is missing. Give one with --against tokenizer.model"
        )
    import_libraries()
    from tinyllama_hf.data.train_tokenizer import verify_tokenizer
    from tinyllama_hf.progress import progress_bar
    from tinyllama_hf.tokenization_tinyllama import load_tokenizer

    if stock:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    else:
        tokenizer = load_tokenizer(path)
    texts = itertools.chain.from_iterable(map(read_texts, sources))
    with progress_bar("comparing", "texts") as update:

        def count(text: str) -> str:
            update(advance=1)
            return text

        result = verify_tokenizer(tokenizer, reference, map(count, texts))
    if not result.characters:
        raise InputError("--text: the files contain no text. Give other files")
    counted = f"{result.texts:,} texts, {result.characters:,} characters, {result.tokens:,} tokens"
    if result.difference is None:
        print(f"equal: {counted}; decoding restored every text")
        return
    where = result.difference
    what = "tokens differ" if where.kind == "ids" else "decoding does not restore the text"
    print(f"{what} in text {where.text_number} at character {where.character}: {where.context!r}")
    print(f"  actual    {where.ours}\n  reference {where.reference}\nafter {counted}")
    raise typer.Exit(1)
