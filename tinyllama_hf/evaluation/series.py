"""Scoring the milestones of a run beside counting models that read the same text."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress, TextColumn, track
from transformers import PreTrainedTokenizerBase

from .. import provenance
from ..data.mixture import Mixture
from ..data.shards import read_metadata
from ..errors import InputError
from ..inference.load import model_folder
from ..pretrain.milestones import list_milestones, read_record
from ..pretrain.run_record import RunRecord, open_mixture, read_run_record
from ..quantization.bitsandbytes import check_name, check_quantization
from ..tokenization_tinyllama import encode_text, load_tokenizer, tokenizer_fingerprint
from .bits_per_byte import HeldOut, bits_per_byte, held_out_documents, summarise
from .models import Evaluated, evaluated, load_evaluated, milestones_of, place_in_run, quantization_in, the_run
from .ngram import NGramModel
from .score_metrics import load_metric


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
    folders = milestones_of(text.run) if text.run else [model_folder(model, quantized=True) for model in models]
    ladder = [evaluated(folder, quantization) for folder in folders]
    file = _ScoreFile(output, text, rescore)
    opened = _open_mixture(text.record) if text.record and baselines else None
    file.scores["models"] = [file.row(model, device, show_progress) for model in ladder]
    if opened:
        file.scores["baselines"] = _baselines(*opened, folders, text.held_out, file)
    file.write()
    return file.scores


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
    file = _ScoreFile(output, _open_text([str(run)]), rescore)
    said = set()
    while True:
        for folder in list_milestones(run):
            row = file.row(evaluated(folder, quantization), device)
            if (folder, row["created"]) not in said:  # a resumed run may write one again
                said.add((folder, row["created"]))
                say(f"{row['bits_per_byte']:.4f} bits per byte  {row['name']}")
            if row["step"] == last:
                return
        time.sleep(every_seconds)


def check_can_score(run: Path | None, data: Sequence[str]) -> None:
    """Refuses to begin a run whose milestones are to be scored and could not be; reads no document.

    Raises:
        InputError: if a package is missing, or the run's score file is of another task or text.
    """
    load_metric("bits_per_byte")
    _read_scores(run and run / SCORES_FILE, [(folder, read_metadata(Path(folder))["fingerprint"]) for folder in data])


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
    load_metric("bits_per_byte")  # a missing package is known before the first model is scored
    return _Text(run, record, held_out)


class _ScoreFile:
    """The scores of this call and of those before it, on the disk after each model.

    Scores are joined only if they are of one task, one text and one protocol.
    """

    def __init__(self, output: Path | None, text: _Text, rescore: bool):
        self.output, self.text = output, text
        self.data = [{"path": h.name, "fingerprint": h.fingerprint, "documents": len(h.texts), "bytes": h.num_bytes}
                     for h in text.held_out]  # fmt: skip
        known = None if rescore else _read_scores(output, [(h.name, h.fingerprint) for h in text.held_out])
        self.known: list[dict[str, Any]] = known["models"] if known else []
        self.reused: set[str] = set()
        self.scores: dict[str, Any] = {
            "task": TASK,
            "data": self.data,
            "models": [],
            "baselines": known["baselines"] if known else [],
        }

    def row(self, model: Evaluated, device: str, show_progress: bool = True) -> dict[str, Any]:
        """The score of a model: that of an earlier call if the folder is still the same one."""
        created = _created(model.folder)
        own = self._key(model.record())
        known = next((row for row in self.known if self._key(row) == own), None)
        if known and created is not None and known.get("created") == created:
            self.reused.add(model.folder.name)
            return known
        row = _score_folder(model, self.text.held_out, device, created, show_progress)
        self._check_protocol(row)
        self.known = [*(r for r in self.known if self._key(r) != own), row]
        # Of a killed call, what comes later in the old file stays; a milestone that is gone leaves it at the end.
        self.write(models=sorted(self.known, key=lambda r: r.get("step", 0)))
        return row

    def write(self, **parts: list[dict[str, Any]]) -> None:
        """Replaces the file, with these parts in place of those that are not complete yet."""
        self.scores["provenance"] = provenance.collect()
        if self.output:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            provenance.write_json(self.output, {**self.scores, **parts})

    def _key(self, row: dict[str, Any]) -> tuple[str, str]:
        """What a row is of. The names of a run's milestones tell them apart, wherever the run is called from."""
        return row["name"] if self.text.run else row["path"], quantization_in(row)

    def _check_protocol(self, row: dict[str, Any]) -> None:
        for before in self.known:
            old, new = before["protocol"], row["protocol"]
            if old["context"] == new["context"] and old != new and self._key(before) != self._key(row):
                raise InputError(
                    f"{self.output}: {before['name']} was scored under {old}, {row['name']} under {new}; figures of two "
                    "protocols are not joined: score all again with --rescore, or write elsewhere with --output"
                )


def _read_scores(output: Path | None, text: Sequence[tuple[str, str]]) -> dict[str, Any] | None:
    """What a score file holds, `None` if there is none.

    Raises:
        InputError: if it is of another task or on other text, given as path and fingerprint of each data set.
    """
    if output is None or not output.is_file():
        return None
    scores = provenance.read_json(output)
    if not isinstance(scores, dict) or scores.get("task") != TASK:
        raise InputError(f"{output}: is no file of {TASK} scores; write elsewhere with --output")
    there = [(data["path"], data["fingerprint"]) for data in scores["data"]]
    if there != list(text):
        lines = [f"  {name}: {', '.join(f'{path} ({print_[:12]})' for path, print_ in sources)}"
                 for name, sources in (("there", there), ("here", text))]  # fmt: skip
        raise InputError(
            f"{output}: has scores on other text, and figures on two texts are not joined; replace them with --rescore, or "
            "write elsewhere with --output\n" + "\n".join(lines)
        )
    return scores


def _created(folder: Path) -> str | None:
    """When a folder of this package was made; one that is written again has another time."""
    is_ours = (folder / "provenance.json").is_file()
    return read_record(folder).get("created") if is_ours else None


def _score_folder(
    model: Evaluated, held_out: Sequence[HeldOut], device: str, created: str | None, show_progress: bool
) -> dict[str, Any]:
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
    return {
        **model.record(),
        **place_in_run(model.folder),
        "created": created,
        **result,
        "scored_with": {name: libraries[name] for name in ("transformers", "torch")} | {"device": loaded.device.type},
        "seconds": round(time.perf_counter() - began, 1),
    }


def _open_mixture(record: RunRecord) -> tuple[Mixture, PreTrainedTokenizerBase]:
    """The training text of a run, and the tokenizer that it is in."""
    tokenizer = load_tokenizer(record.tokenizer)
    return open_mixture(record, tokenizer_fingerprint(tokenizer)), tokenizer


def _baselines(
    mixture: Mixture,
    tokenizer: PreTrainedTokenizerBase,
    milestones: Sequence[Path],
    held_out: Sequence[HeldOut],
    file: _ScoreFile,
) -> list[dict[str, Any]]:
    """Counting models fitted on what each milestone had read, each block once however often it was read."""
    documents = [_tokens(tokenizer, text) for h in held_out for text in h.texts]
    before, scores = file.scores["baselines"], []
    for folder in track(milestones, "Fitting counting models", transient=True, disable=not Console().is_terminal):
        record = read_record(folder)
        known = [row for row in before if (row["step"], row["tokens"]) == (record["step"], record["tokens"])]
        if folder.name in file.reused and [row["name"] for row in known] == list(BASELINES):
            scores += known
            continue
        blocks = sorted(set(mixture.blocks(0, record["tokens"] // mixture.block_size)))
        text = mixture.tokens(blocks)[:, :-1].reshape(-1)  # neighbouring blocks join without a seam
        for name, order in BASELINES.items():
            model = NGramModel(text, len(tokenizer), order)
            nats = [-float(model.log_probabilities(tokens).sum()) for tokens in documents]
            about = {"name": name, "step": record["step"], "tokens": record["tokens"], "distinct_tokens": len(text)}
            scores.append({**about, **summarise(nats, held_out)})
        file.write(baselines=scores)
    return scores


def _tokens(tokenizer: Any, text: str) -> np.ndarray:
    return np.array([tokenizer.bos_token_id, *encode_text(tokenizer, text)])
