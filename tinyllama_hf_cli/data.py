"""`tinyllama-hf prepare`."""

from pathlib import Path
from typing import Annotated

import typer


def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="embedded:prose, embedded:code; or files and folders of .jsonl[.gz|.zst], .txt, .md, .rst, .py."
        ),
    ],
    tokenizer: Annotated[str, typer.Option(help="Tokenizer folder, tokenizer.model, tokenizer.json or GGUF file.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    separator: Annotated[str, typer.Option(help="Around each document: both, bos (before) or eos (after).")] = "both",
    validation_fraction: Annotated[
        float, typer.Option(help="Share of the documents held out, by their hash.")
    ] = 0.005,
    sample_fraction: Annotated[float, typer.Option(help="Share of the other documents kept, by their hash.")] = 1.0,
    text_column: Annotated[str, typer.Option(help="Column of JSON lines that holds the text.")] = "text",
    workers: Annotated[int | None, typer.Option(help="Processes; default: one per core.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and say what would be read.")] = False,
) -> None:
    """Tokenise documents into shards that pretraining reads. Interrupted, it goes on; finished, it does nothing.

    Example: tinyllama-hf prepare corpus/*.jsonl.gz --tokenizer tokenizer.model --output data/corpus
    """
    from tinyllama_hf.data.prepare import plan
    from tinyllama_hf.data.prepare import prepare as run

    if dry_run:
        checked = plan(sources, tokenizer, output, separator, validation_fraction, sample_fraction, text_column)
        print(f"{len(checked.source.files)} {checked.source.kind} source(s) in {checked.source.num_tasks} task(s)")
        print("\n".join(f"  {file}" for file in checked.source.files[:10]))
        print(
            f"tokenizer of {len(checked.tokenizer):,} ids, separator {separator}, {validation_fraction:.2%} held out"
        )
        print(f"{output}: finished already" if checked.is_finished else f"would write {output}")
        return
    metadata, was_finished = run(
        sources, tokenizer, output, separator, validation_fraction, sample_fraction, text_column, workers
    )
    print(f"{output}: was finished already" if was_finished else f"wrote {output}")
    for split, counts in metadata["splits"].items():
        print(
            f"  {split:<10} {counts['documents']:>9,} documents {counts['tokens']:>13,} tokens {counts['bytes']:>14,} bytes"
        )
