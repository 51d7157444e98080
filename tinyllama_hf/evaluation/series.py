"""Scoring the milestones of a run beside counting models that read the same text."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress, TextColumn, track
from transformers import PreTrainedTokenizerBase

from .. import provenance
from ..data.mixture import Mixture
from ..data.shards import read_metadata
from ..errors import InputError
from ..pretrain.milestones import list_milestones, read_record
from ..pretrain.run_record import RunRecord, open_mixture, read_run_record
from ..quantization.bitsandbytes import check_name, check_quantization
from ..tokenization_tinyllama import load_tokenizer, tokenizer_fingerprint
from .bits_per_byte import HeldOut, bits_per_byte, document_tokens, held_out_documents, summarise
from .models import Evaluated, evaluated, load_evaluated, models_to_score, the_run
from .ngram import NGramModel
from .score_files import CountingRow, ScoreFile, TextRow, TextSource, read_records, read_score_file


TASK = "bits_per_byte"
SCORES_FILE = "scores.json"
BASELINES = {"unigram": 1, "5-gram": 5}


class _Text(NamedTuple):
    """What is scored on: a run if one is meant, its record, and the held-out documents."""

    run: Path | None
    record: RunRecord | None
    held_out: list[HeldOut]


def score(
    models: Sequence[str],
    data: Sequence[str] = (),
    baselines: bool = False,
    device: str = "auto",
    output: Path | None = None,
    rescore: bool = False,
    show_progress: bool = True,
    quantization: str = "none",
) -> dict[str, Any]:
    """Bits per byte of models, or of every milestone of a run; what the output file has already is not scored again.

    Args:
        models (`Sequence[str]`): model folders or names; or one run.
        data (`Sequence[str]`, *optional*): prepared data sets whose held-out documents are scored; of a run, by default
            those that it trained on.
        baselines (`bool`, *optional*, defaults to `False`): for a run, also fit a unigram and a 5-gram model on the text
            that each milestone had read.
        device (`str`, *optional*, defaults to `"auto"`): where the models run.
        output (`Path`, *optional*): JSON file, written after each model.
        rescore (`bool`, *optional*, defaults to `False`): forget what the output file has.
        show_progress (`bool`, *optional*, defaults to `True`): bars on a terminal.
        quantization (`str`, *optional*, defaults to `"none"`): to quantise the models to while they are loaded; folders
            that were saved quantised have their own.

    Returns:
        `dict`: `models` and `baselines`, each a list of scores, and what decides them.

    Raises:
        InputError: for anything missing, and an output file with scores of another task or on other text, before the
            first model is scored.
    """
    text = _open_text(models, data, baselines)
    chosen = models_to_score(models, quantization)
    file = _open_file(output, text, rescore)
    opened = _open_mixture(text.record) if text.record and baselines else None
    before = list(file.rows)
    rows = [_score(model, file, text, device, show_progress) for model in chosen]
    file.keep(rows)
    if opened:
        kept = {row.step for row in rows if any(row is old for old in before)}
        known = read_records(file.extra["baselines"], CountingRow, f"{output}: baselines")
        known = [row for row in known if row.step in kept]
        for fitted in _baselines(*opened, [model.folder for model in chosen], text.held_out, known):
            file.extra["baselines"] = [dataclasses.asdict(row) for row in fitted]
            file.write()
    return file.contents()


def watch(
    run: Path,
    device: str,
    output: Path,
    every_seconds: float,
    say: Callable[[str], None],
    rescore: bool = False,
    quantization: str = "none",
) -> None:
    """Scores milestones of a run as they appear, until the one that ends it.

    Args:
        run (`Path`): a run under way or finished.
        device (`str`): where the models run.
        output (`Path`): JSON file, written after each milestone.
        every_seconds (`float`): between two looks.
        say (`Callable[[str], None]`): given a line for each milestone.
        rescore (`bool`, *optional*, defaults to `False`): forget what the output file has.
        quantization (`str`, *optional*, defaults to `"none"`): to quantise them to while they are loaded.

    Raises:
        InputError: as [`score`], before the first look; or if the folder is no run.
    """
    last = read_run_record(run).num_steps
    check_name(quantization)
    check_quantization(quantization)
    text = _open_text([str(run)])
    file = _open_file(output, text, rescore)
    said = set()
    while True:
        for folder in list_milestones(run):
            row = _score(evaluated(folder, quantization), file, text, device)
            if (folder, row.created) not in said:  # a resumed run may write one again
                said.add((folder, row.created))
                say(f"{row.bits_per_byte:.4f} bits per byte  {row.name}")
            if row.step == last:
                return
        time.sleep(every_seconds)


def check_can_score(run: Path | None, data: Sequence[str]) -> None:
    """Refuses to begin a run whose milestones are to be scored and could not be; reads no document.

    Raises:
        InputError: if the run's score file is of another task or text.
    """
    scores = read_score_file(run and run / SCORES_FILE, TASK)
    if scores:
        _check_text(
            scores, [(folder, read_metadata(Path(folder))["fingerprint"]) for folder in data], run / SCORES_FILE
        )


def _open_text(models: Sequence[str], data: Sequence[str] = (), baselines: bool = False) -> _Text:
    """Checks what is named, and reads the held-out documents."""
    if len({Path(folder).resolve() for folder in data}) < len(data):
        raise InputError(f"--data: {', '.join(data)}: a data set is named twice; its documents count once")
    run = the_run(models)
    record = read_run_record(run) if run else None
    if record:
        data = data or [source.path for source in record.sources]
        if missing := [folder for folder in data if not Path(folder).is_dir()]:
            raise InputError(
                f"data folder {missing[0]} does not exist here; a recipe names its data from the folder in which the run "
                "was started: call from there, or name the data with --data"
            )
    elif baselines:
        raise InputError("--baselines: needs one run (a folder with milestones), to know which text was read")
    elif not data:
        raise InputError("--data: needed to score model folders; name prepared data sets")
    held_out = [held_out_documents(folder) for folder in data]
    return _Text(run, record, held_out)


def _open_file(output: Path | None, text: _Text, rescore: bool) -> ScoreFile[TextRow]:
    """The score file. The names of a run's milestones tell them apart, wherever the run is called from."""
    data = [TextSource(h.name, h.fingerprint, len(h.texts), h.num_bytes) for h in text.held_out]
    return ScoreFile(
        output,
        TASK,
        {"data": [dataclasses.asdict(source) for source in data]},
        TextRow,
        lambda row: {(row.name if text.run else row.path, row.quantization)},
        lambda before: _check_text(before, [(source.path, source.fingerprint) for source in data], output),
        extra=["baselines"],
        rescore=rescore,
    )


def _check_text(scores: dict[str, Any], text: Sequence[tuple[str, str]], file: Path | None) -> None:
    """Refuses scores on other text than these pairs of path and fingerprint."""
    sources = read_records(scores.get("data"), TextSource, f"{file}: data")
    there = [(source.path, source.fingerprint) for source in sources]
    if there != list(text):
        lines = [
            f"  {name}: {', '.join(f'{path} ({print_[:12]})' for path, print_ in sources)}"
            for name, sources in (("there", there), ("here", text))
        ]
        raise InputError(
            f"{file}: has scores on other text, and figures on two texts are not joined; replace them with --rescore, or "
            "write elsewhere with --output\n" + "\n".join(lines)
        )


def _score(
    model: Evaluated, file: ScoreFile[TextRow], text: _Text, device: str, show_progress: bool = True
) -> TextRow:
    """The score of a model: that of the file if the folder is still the same one, else a new one, which is added."""
    created = _created(model.folder)
    known = file.find((model.name if text.run else str(model.folder), model.quantization))
    if known and created is not None and known.created == created:
        return known
    row = _score_folder(model, text.held_out, device, created, show_progress)
    for other in file.rows:
        old, new = other.protocol, row.protocol
        if old["context"] == new["context"] and old != new and other is not known:
            raise InputError(
                f"{file.path}: {other.name} was scored under {old}, {row.name} under {new}; figures of two protocols are "
                "not joined: score all again with --rescore, or write elsewhere with --output"
            )
    file.add(row)
    return row


def _created(folder: Path) -> str | None:
    """When a folder of this package was made; one that is written again has another time."""
    is_ours = (folder / "provenance.json").is_file()
    return read_record(folder).get("created") if is_ours else None


def _score_folder(
    model: Evaluated, held_out: Sequence[HeldOut], device: str, created: str | None, show_progress: bool
) -> TextRow:
    """Scores a folder with stock transformers: model and tokenizer as somebody without this package loads them."""
    began = time.perf_counter()
    loaded, tokenizer = load_evaluated(model, device)
    total = sum(h.num_bytes for h in held_out)
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, transient=True, disable=not (show_progress and Console().is_terminal)) as bar:
        estimate = total // 3  # tokens; the bar is for the eye
        task = bar.add_task(f"Scoring {model.name}", total=estimate, note="")
        result = bits_per_byte(loaded, tokenizer, held_out, advance=lambda n: bar.advance(task, n))
    libraries = provenance.collect()["libraries"]
    return TextRow(
        **model.record(),
        created=created,
        **result,
        scored_with={name: libraries[name] for name in ("transformers", "torch")} | {"device": loaded.device.type},
        seconds=round(time.perf_counter() - began, 1),
    )


def _open_mixture(record: RunRecord) -> tuple[Mixture, PreTrainedTokenizerBase]:
    """The training text of a run, and the tokenizer that it is in."""
    tokenizer = load_tokenizer(record.tokenizer)
    return open_mixture(record, tokenizer_fingerprint(tokenizer)), tokenizer


def _baselines(
    mixture: Mixture,
    tokenizer: PreTrainedTokenizerBase,
    milestones: Sequence[Path],
    held_out: Sequence[HeldOut],
    known: Sequence[CountingRow] = (),
) -> Iterator[list[CountingRow]]:
    """Fits counting models on what each milestone had read, each block once however often it was read.

    Yields the rows of all milestones so far; those that are known are not fitted again.
    """
    documents = [document_tokens(tokenizer, text) for h in held_out for text in h.texts]
    rows: list[CountingRow] = []
    for folder in track(milestones, "Fitting counting models", transient=True, disable=not Console().is_terminal):
        record = read_record(folder)
        fitted = [row for row in known if (row.step, row.tokens) == (record["step"], record["tokens"])]
        if [row.name for row in fitted] != list(BASELINES):
            blocks = sorted(set(mixture.blocks(0, record["tokens"] // mixture.block_size)))
            text = mixture.tokens(blocks)[:, :-1].reshape(-1)  # neighbouring blocks join without a seam
            fitted = []
            for name, order in BASELINES.items():
                model = NGramModel(text, len(tokenizer), order)
                nats = [-float(model.log_probabilities(tokens).sum()) for tokens in documents]
                found = summarise(nats, held_out)
                fitted.append(CountingRow(name, record["step"], record["tokens"], len(text), **found))
        rows += fitted
        yield rows
