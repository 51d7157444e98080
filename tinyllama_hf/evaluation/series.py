"""Scores a series of checkpoints in bits per byte, with n-gram models fitted on the same text as baselines."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from .. import provenance
from ..data.mixture import Mixture
from ..data.shards import read_metadata
from ..errors import InputError
from ..pretrain.milestones import find_run, list_milestones, read_record
from ..pretrain.run_record import RunRecord, open_mixture, read_run_record
from ..progress import progress_bar
from ..quantization.names import check_quantization_name
from ..quantization.quantized_model import check_quantization
from ..tokenization_tinyllama import load_tokenizer, tokenizer_fingerprint
from .bits_per_byte import HeldOut, document_tokens, held_out_documents, score_documents, summarize
from .models import describe_model, list_eval_models, load_eval_model
from .ngram import NGramModel
from .score_files import (
    BaselineRow,
    ScoredModel,
    TextRow,
    TextScoreFile,
    TextSource,
    read_scores,
    replace_rows,
    write_scores,
)


SCORES_FILE = "scores.json"
BASELINES = {"unigram": 1, "5-gram": 5}


class _Series(NamedTuple):
    """The text to score on, and the score file. `run` and `record` are set for the milestones of a run."""

    run: Path | None
    record: RunRecord | None
    held_out: list[HeldOut]
    output: Path | None
    file: TextScoreFile


def score(
    models: Sequence[str],
    data: Sequence[str] = (),
    baselines: bool = False,
    device: str = "auto",
    output: Path | None = None,
    rescore: bool = False,
    show_progress: bool = True,
    quantization: str = "none",
) -> TextScoreFile:
    """Scores models, or all milestones of a run, in bits per byte. Models in the output file are not scored again.

    Args:
        models (`Sequence[str]`): model folders or names; or one run, for all its milestones.
        data (`Sequence[str]`, *optional*): prepared data sets with held-out documents. For a run, defaults to its
            training data.
        baselines (`bool`, *optional*, defaults to `False`): for a run, also fit a unigram and a 5-gram model on the
            text that each milestone was trained on.
        device (`str`, *optional*, defaults to `"auto"`): the device to run on.
        output (`Path`, *optional*): JSON file, written after each model.
        rescore (`bool`, *optional*, defaults to `False`): score all models again.
        show_progress (`bool`, *optional*, defaults to `True`): show the progress of each model.
        quantization (`str`, *optional*, defaults to `"none"`): quantization to apply while loading. Folders that were
            saved quantized keep their own.

    Returns:
        `TextScoreFile`: contents of the score file.

    Raises:
        InputError: for missing input, or an output file with scores of another task or on other text, before the first
            model is scored.
    """
    series = _open_series(models, data, baselines, output, rescore)
    chosen = list_eval_models(models, quantization)
    opened = _open_mixture(series.record) if series.record and baselines else None
    file, before = series.file, list(series.file.models)
    file.models = [_score(model, series, device, show_progress) for model in chosen]
    write_scores(output, file)
    if opened:
        # Baselines belong to the training text of a milestone, so only those of unchanged milestones are reused.
        kept = {row.step for row in file.models if any(row is old for old in before)}
        known = [row for row in file.baselines if row.step in kept]
        for rows in _baselines(*opened, [model.folder for model in chosen], series.held_out, known):
            file.baselines = rows
            write_scores(output, file)
    return file


def watch(
    run: Path,
    device: str,
    output: Path,
    every_seconds: float,
    log: Callable[[str], None],
    rescore: bool = False,
    quantization: str = "none",
) -> None:
    """Scores the milestones of a run as they appear, and returns after the last one.

    Args:
        run (`Path`): a running or finished run.
        device (`str`): the device to run on.
        output (`Path`): JSON file, written after each milestone.
        every_seconds (`float`): time between two checks for new milestones.
        log (`Callable[[str], None]`): called with one line per milestone.
        rescore (`bool`, *optional*, defaults to `False`): score all milestones again.
        quantization (`str`, *optional*, defaults to `"none"`): quantization to apply while loading.

    Raises:
        InputError: as [`score`], before the first check; or if the folder is not a run.
    """
    last = read_run_record(run).num_steps
    check_quantization_name(quantization)
    check_quantization(quantization)
    series = _open_series([str(run)], output=output, rescore=rescore)
    logged = set()
    while True:
        for folder in list_milestones(run):
            row = _score(describe_model(folder, quantization), series, device)
            if (folder, row.created) not in logged:  # a resumed run may write a milestone again
                logged.add((folder, row.created))
                log(f"{row.bits_per_byte:.4f} bits per byte  {row.name}")
            if row.step == last:
                return
        time.sleep(every_seconds)


def check_can_score(run: Path, data: Sequence[str]) -> None:
    """Checks before a run starts that its milestones can be scored. Reads no documents.

    Raises:
        InputError: if the score file of the run is of another task or text.
    """
    if file := read_scores(run / SCORES_FILE, TextScoreFile):
        text = [(folder, read_metadata(Path(folder))["fingerprint"]) for folder in data]
        _check_text(file, text, run / SCORES_FILE)


def _open_series(
    models: Sequence[str],
    data: Sequence[str] = (),
    baselines: bool = False,
    output: Path | None = None,
    rescore: bool = False,
) -> _Series:
    """Checks models and data, and reads the held-out documents and an existing score file."""
    if len({Path(folder).resolve() for folder in data}) < len(data):
        raise InputError(f"--data {', '.join(data)} has the same data set twice. Name each one once")
    run = find_run(models)
    record = read_run_record(run) if run else None
    if record:
        if not data and (missing := [source.path for source in record.sources if not Path(source.path).is_dir()]):
            raise InputError(
                f"data folder {missing[0]} does not exist. Paths of a run are relative to the folder in which it was "
                "started: call from there, or pass the data with --data"
            )
        data = data or [source.path for source in record.sources]
    elif baselines:
        raise InputError(
            "--baselines needs one run (a folder with milestones), since they are fitted on its training text"
        )
    elif not data:
        raise InputError("--data is required to score model folders. Name prepared data sets")
    held_out = [held_out_documents(folder) for folder in data]
    sources = [
        TextSource(h.name, h.fingerprint, len(h.texts), sum(len(text.encode()) for text in h.texts)) for h in held_out
    ]
    file = TextScoreFile(data=sources, models=[])
    if before := read_scores(output, TextScoreFile, rescore):
        _check_text(before, [(source.path, source.fingerprint) for source in sources], output)
        file = dataclasses.replace(before, data=sources)
    return _Series(run, record, held_out, output, file)


def _check_text(file: TextScoreFile, text: Sequence[tuple[str, str]], path: Path | None) -> None:
    """Raises `InputError` if scores are on other text than these pairs of path and fingerprint."""
    there = [(source.path, source.fingerprint) for source in file.data]
    if there != list(text):
        lines = [
            f"  {name}: {', '.join(f'{folder} ({print_[:12]})' for folder, print_ in sources)}"
            for name, sources in (("file", there), ("now", text))
        ]
        raise InputError(
            f"{path} has scores on other text. A file has scores on one text: replace them with --rescore, or write "
            "to another file with --output\n" + "\n".join(lines)
        )


def _score(model: ScoredModel, series: _Series, device: str, show_progress: bool = True) -> TextRow:
    """Returns the score of a model: the one in the file if the folder was not written since, else a new one."""
    file, run = series.file, series.run
    # Milestones of a run are identified by name, so that a moved run is not scored again.
    own = [row for row in file.models if (row.name == model.name if run else row.path == model.path)]
    own = [row for row in own if row.quantization == model.quantization]
    known = own[0] if own else None
    is_ours = (model.folder / "provenance.json").is_file()  # written by this package
    created = read_record(model.folder).get("created") if is_ours else None
    if known and created is not None and known.created == created:
        return known
    row = _score_folder(model, series, device, created, show_progress)
    for other in file.models:
        old, new = other.protocol, row.protocol
        if old.context == new.context and old != new and other is not known:
            raise InputError(
                f"{series.output}: {other.name} was scored under {vars(old)}, {row.name} under {vars(new)}. A file "
                "has one protocol: score all models again with --rescore, or write to another file with --output"
            )
    replace_rows(file.models, own, row)
    write_scores(series.output, file)
    return row


def _score_folder(
    model: ScoredModel, series: _Series, device: str, created: str | None, show_progress: bool
) -> TextRow:
    """Scores a model with stock transformers classes, as users without this package load it."""
    began = time.perf_counter()
    with progress_bar(f"{model.name}: bits per byte", "tokens", show=show_progress) as update:
        loaded, tokenizer = load_eval_model(model, device)
        scores, protocol = score_documents(loaded, tokenizer, series.held_out, update=update)
    libraries = provenance.collect()["libraries"]
    return TextRow(
        **vars(model),
        created=created,
        **vars(scores),
        protocol=protocol,
        scored_with={name: libraries[name] for name in ("transformers", "torch")} | {"device": loaded.device.type},
        seconds=round(time.perf_counter() - began, 1),
    )


def _open_mixture(record: RunRecord) -> tuple[Mixture, PreTrainedTokenizerBase]:
    """Opens the training text of a run and its tokenizer."""
    tokenizer = load_tokenizer(record.tokenizer)
    return open_mixture(record, tokenizer_fingerprint(tokenizer)), tokenizer


def _baselines(
    mixture: Mixture,
    tokenizer: PreTrainedTokenizerBase,
    milestones: Sequence[Path],
    held_out: Sequence[HeldOut],
    known: Sequence[BaselineRow] = (),
) -> Iterator[list[BaselineRow]]:
    """Fits n-gram models on the text that each milestone was trained on, without repeated epochs.

    Yields the rows of all milestones so far. Rows in `known` are reused.
    """
    documents = [document_tokens(tokenizer, text) for h in held_out for text in h.texts]
    rows: list[BaselineRow] = []
    with progress_bar("Fitting n-gram models", "milestones", len(milestones)) as update:
        for folder in milestones:
            record = read_record(folder)
            fitted = [row for row in known if (row.step, row.tokens) == (record["step"], record["tokens"])]
            if [row.name for row in fitted] != list(BASELINES):
                blocks = sorted(set(mixture.blocks(0, record["tokens"] // mixture.block_size)))
                text = mixture.tokens(blocks)[:, :-1].reshape(-1)  # consecutive blocks are consecutive text
                fitted = []
                for name, order in BASELINES.items():
                    model = NGramModel(text, len(tokenizer), order)
                    nats = [-float(model.log_probabilities(tokens).sum()) for tokens in documents]
                    about = {"step": record["step"], "tokens": record["tokens"], "distinct_tokens": len(text)}
                    fitted.append(BaselineRow(name=name, **about, **vars(summarize(nats, held_out))))
            rows += fitted
            yield rows
            update(advance=1)
