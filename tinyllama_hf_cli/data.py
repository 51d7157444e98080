"""`tinyllama-hf prepare`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .loading import import_libraries


if TYPE_CHECKING:
    from tinyllama_hf.data.prepare import Preparation


def prepare_command(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="embedded:prose, embedded:code; files and folders of .jsonl[.gz|.zst], .parquet, .txt, .md, .rst, "
            ".py; hub:OWNER/NAME[@REVISION][/PATTERN]; or one recipe .yaml, with key=value overrides."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer folder, tokenizer.model, tokenizer.json or GGUF file.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write.")] = None,
    separator: Annotated[
        str | None,
        typer.Option(help="Separators around each document: both, bos (before) or eos (after); default: both."),
    ] = None,
    validation_fraction: Annotated[
        float | None, typer.Option(help="Share of the documents to hold out, selected by hash; default: 0.005.")
    ] = None,
    sample_fraction: Annotated[
        float | None, typer.Option(help="Share of the other documents to keep, selected by hash; default: 1.")
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(help="Column with the text, as a dotted path; default: text.")
    ] = None,
    where: Annotated[
        str | None, typer.Option(help='Rows to keep, for example: meta.redpajama_set_name != "RedPajamaGithub"')
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; default: one per core.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and print what would be read.")] = False,
    check: Annotated[
        Path | None,
        typer.Option(help="Finished data set: read all files and compare them with the checksums in dataset.json."),
    ] = None,
) -> None:
    """Tokenize documents into shards for pretraining.

    After an interruption, a bad file or a full disk, the same command resumes with the files that are not finished. A
    finished data set is left unchanged. Training compares the sizes of the shards; --check FOLDER compares all
    contents.

    Example: tinyllama-hf prepare corpus/*.jsonl.gz --tokenizer tokenizer.model --output data/corpus
    """
    options = {
        "tokenizer": tokenizer,
        "output": output,
        "separator": separator,
        "validation_fraction": validation_fraction,
        "sample_fraction": sample_fraction,
        "text_column": text_column,
        "where": where,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if check is not None:
        _check(check, sources, given)
        return
    request = _request(sources or [], given)
    _check_paths(request)
    import_libraries()
    from tinyllama_hf.data.prepare import plan_preparation, prepare

    if dry_run:
        _print_plan(plan_preparation(**request))
        return
    metadata, was_finished = prepare(**request, workers=workers)
    print(f"{request['output']}: is already finished" if was_finished else f"wrote {request['output']}")
    rows = metadata.get("rows")  # missing in data sets of version 0.1
    if rows and rows["kept"] < rows["read"]:
        print(f"  {rows['read']:,} rows, {rows['kept']:,} kept by {metadata['request']['where']!r}")
    if rows and rows.get("empty"):  # missing in older data sets
        print(f"  {rows['empty']:,} empty documents were skipped")
    for split, counts in metadata["splits"].items():
        documents, tokens, num_bytes = (counts[key] for key in ("documents", "tokens", "bytes"))
        print(f"  {split:<10} {documents:>9,} documents {tokens:>13,} tokens {num_bytes:>14,} bytes")
    if not metadata["splits"]["validation"]["documents"]:
        fraction = metadata["request"]["validation_fraction"]
        print(
            f"  no document was held out (--validation-fraction {fraction}), and pretraining needs some. Prepare the "
            "data into another folder with a larger share"
        )


def _check(folder: Path, sources: list[str] | None, given: dict[str, Any]) -> None:
    from tinyllama_hf.data.shards import check_contents
    from tinyllama_hf.errors import InputError

    if sources or given:
        named = sources[0] if sources else f"--{next(iter(given)).replace('_', '-')}"
        raise InputError(f"--check {folder} takes no other arguments. Leave out {named}")
    print(f"{folder}: {check_contents(folder)} shards match their checksums")


def _check_paths(request: dict[str, Any]) -> None:
    """Checks the tokenizer and the first source before torch is imported; `prepare` checks everything."""
    from tinyllama_hf.errors import InputError
    from tinyllama_hf.released import find_model

    find_model(str(request["tokenizer"]))
    for source in request["sources"]:
        if not source.startswith(("embedded:", "hub:")) and not Path(source).exists():
            raise InputError(f"source {source} does not exist")


def _request(sources: list[str], given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `prepare`: those of a recipe, if one is given, overridden by the options."""
    from tinyllama_hf.data.config import load_prepare_config
    from tinyllama_hf.errors import InputError

    if sources and sources[0].endswith((".yaml", ".yml")):
        return {**load_prepare_config(sources[0], sources[1:]).model_dump(), **given}
    if not sources:
        raise InputError(
            "No source was given. Give files, folders, hub:OWNER/NAME, embedded:prose, embedded:code, or a recipe"
        )
    if missing := [name for name in ("tokenizer", "output") if name not in given]:
        raise InputError(f"--{missing[0]} is required, unless a recipe has it")
    return {"sources": sources, **given}


def _print_plan(checked: "Preparation") -> None:
    """Prints what a preparation would do, with the beginning of the first document as the model will see it."""
    from tinyllama_hf.data.sources import read_documents
    from tinyllama_hf.tokenization_tinyllama import encode_text

    source, request = checked.source, checked.request
    print(f"{len(source.files)} {source.kind} source(s) in {source.num_tasks} task(s)")
    print("\n".join(f"  {file}" for file in source.files[:10]))
    print(
        f"tokenizer of {len(checked.tokenizer):,} ids, separator {request.separator}, "
        f"{request.validation_fraction:.2%} held out"
    )
    if source.where is not None:
        print(f"rows selected by {source.where}")
    first = next(read_documents(source), None)
    if first:
        ids = [*request.begin, *encode_text(checked.tokenizer, first.text)[:40]]
        print(f"first document, {first.name}: {checked.tokenizer.decode(ids)!r}")
    print(f"{checked.output}: already finished" if checked.is_finished else f"would write {checked.output}")
