"""`tinyllama-hf prepare`."""

from pathlib import Path
from typing import Annotated, Any

import typer


def prepare(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="embedded:prose, embedded:code; files and folders of .jsonl[.gz|.zst], .parquet, .txt, .md, .rst, .py; "
            "hub:OWNER/NAME[@REVISION][/PATTERN]; or one recipe .yaml, with key=value to replace its values."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer folder, tokenizer.model, tokenizer.json or GGUF file.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write.")] = None,
    separator: Annotated[
        str | None, typer.Option(help="Around each document: both, bos (before) or eos (after); default: both.")
    ] = None,
    validation_fraction: Annotated[
        float | None, typer.Option(help="Share of the documents held out, by their hash; default: 0.005.")
    ] = None,
    sample_fraction: Annotated[
        float | None, typer.Option(help="Share of the other documents kept, by their hash; default: 1.")
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(help="Column that holds the text, as a dotted path; default: text.")
    ] = None,
    where: Annotated[
        str | None, typer.Option(help='Rows to keep, for example: meta.redpajama_set_name != "RedPajamaGithub"')
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; default: one per core.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and say what would be read.")] = False,
    check: Annotated[
        Path | None,
        typer.Option(help="Finished data set: read it all and compare it with the checksums in its dataset.json."),
    ] = None,
) -> None:
    """Tokenise documents into shards that pretraining reads.

    Interrupted, it goes on: after a bad file is mended, or room is made on the disk, with the files that are not done.
    Finished, it does nothing. Training compares the sizes of shards; --check FOLDER, alone, compares all contents.

    Example: tinyllama-hf prepare corpus/*.jsonl.gz --tokenizer tokenizer.model --output data/corpus
    """
    from tinyllama_hf.data.prepare import plan
    from tinyllama_hf.data.prepare import prepare as run

    given = {"tokenizer": tokenizer, "output": output, "separator": separator, "validation_fraction": validation_fraction,
             "sample_fraction": sample_fraction, "text_column": text_column, "where": where}  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    if check is not None:
        _check(check, sources, given)
        return
    request = _request(sources or [], given)
    if dry_run:
        _say(plan(**request))
        return
    metadata, was_finished = run(**request, workers=workers)
    print(f"{request['output']}: was finished already" if was_finished else f"wrote {request['output']}")
    rows = metadata.get("rows")  # data sets of version 0.1 did not count them
    if rows and rows["kept"] < rows["read"]:
        print(f"  {rows['read']:,} rows, {rows['kept']:,} kept by {metadata['request']['where']!r}")
    if rows and rows.get("empty"):  # older data sets did not count them
        print(f"  {rows['empty']:,} empty texts left out")
    for split, counts in metadata["splits"].items():
        print(
            f"  {split:<10} {counts['documents']:>9,} documents {counts['tokens']:>13,} tokens {counts['bytes']:>14,} bytes"
        )


def _check(folder: Path, sources: list[str] | None, given: dict[str, Any]) -> None:
    from tinyllama_hf.data.shards import check_contents
    from tinyllama_hf.errors import InputError

    if sources or given:
        named = sources[0] if sources else f"--{next(iter(given)).replace('_', '-')}"
        raise InputError(f"--check {folder}: reads a finished data set and nothing else; leave out {named}")
    print(f"{folder}: {check_contents(folder)} shards are as they were prepared")


def _request(sources: list[str], given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `prepare`: those of a recipe, where one is named, replaced by those given."""
    from tinyllama_hf.data.config import load_config
    from tinyllama_hf.errors import InputError

    if sources and sources[0].endswith((".yaml", ".yml")):
        return {**load_config(sources[0], sources[1:]).model_dump(), **given}
    if not sources:
        raise InputError(
            "no source given: name files, folders, hub:OWNER/NAME, embedded:prose, embedded:code, or a recipe"
        )
    if missing := [name for name in ("tokenizer", "output") if name not in given]:
        raise InputError(f"--{missing[0]}: is needed, unless a recipe names it")
    return {"sources": sources, **given}


def _say(checked: Any) -> None:
    """What a checked request would do, with the beginning of its first document as the model will see it."""
    from tinyllama_hf.data.sources import read_documents
    from tinyllama_hf.tokenization_tinyllama import encode_text

    source, record = checked.source, checked.record
    print(f"{len(source.files)} {source.kind} source(s) in {source.num_tasks} task(s)")
    print("\n".join(f"  {file}" for file in source.files[:10]))
    print(
        f"tokenizer of {len(checked.tokenizer):,} ids, separator {record['separator']}, "
        f"{record['validation_fraction']:.2%} held out"
    )
    if source.where is not None:
        print(f"rows where {source.where}")
    first = next(read_documents(source), None)
    if first:
        ids = [*record["begin"], *encode_text(checked.tokenizer, first.text)[:40]]
        print(f"first document kept, {first.name}: {checked.tokenizer.decode(ids)!r}")
    print(f"{checked.output}: finished already" if checked.is_finished else f"would write {checked.output}")
