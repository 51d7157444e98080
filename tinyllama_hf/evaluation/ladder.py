"""Scoring the milestones of a run beside counting models that read the same text."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, TextColumn, track
from transformers import PreTrainedTokenizerBase

from .. import provenance
from ..data.mixture import Mixture
from ..errors import InputError
from ..inference.load import load_stock, model_folder
from ..pretrain.config import PretrainConfig, load_config
from ..pretrain.milestones import CONFIG_FILE, MILESTONES_FOLDER, list_milestones, read_record
from ..pretrain.setup import open_mixture
from ..tokenization_tinyllama import encode_text, load_tokenizer, tokenizer_fingerprint
from .bits_per_byte import HeldOut, bits_per_byte, held_out_documents, summarise
from .metrics import load_metric
from .ngram import NGramModel


BASELINES = {"unigram": 1, "5-gram": 5}


def score(
    models: Sequence[str],
    data: Sequence[str] = (),
    baselines: bool = False,
    device: str = "auto",
    output: Path | None = None,
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

    Returns:
        `dict`: `models` and `baselines`, each a list of scores, and what decides them.

    Raises:
        InputError: for anything missing, before the first model is scored.
    """
    if len({Path(folder).resolve() for folder in data}) < len(data):
        raise InputError(f"--data: {', '.join(data)}: a data set is named twice; its documents count once")
    run = the_run(models)
    if run:
        config = load_config(run / CONFIG_FILE)
        data = data or [source.path for source in config.data.sources]
        if missing := [folder for folder in data if not Path(folder).is_dir()]:
            raise InputError(
                f"data folder {missing[0]} does not exist here; a recipe names its data from the folder in which the run "
                "was started: call from there, or name the data with --data"
            )
        folders = milestones_of(run)
    elif baselines:
        raise InputError("--baselines: needs one run (a folder with milestones), to know which text was read")
    elif not data:
        raise InputError("--data: needed to score model folders; name prepared data sets")
    else:
        folders = [model_folder(model) for model in models]
    held_out = [held_out_documents(folder) for folder in data]
    load_metric("bits_per_byte")  # a missing package is known before the first model is scored
    opened = _open_mixture(config) if run and baselines else None
    described = [{"path": h.name, "fingerprint": h.fingerprint, "documents": len(h.texts), "bytes": h.num_bytes}
                 for h in held_out]  # fmt: skip
    before = _scored_before(output, described)
    scores: dict[str, Any] = {
        "task": "bits_per_byte",
        "data": described,
        "models": [],
        "baselines": before["baselines"],
    }
    for folder in folders:
        known = next((row for row in before["models"] if _is_score_of(row, folder)), None)
        scores["models"].append(known or _score_folder(folder, held_out, device))
        # Of a killed call, what comes later in the old file stays; a milestone that is gone leaves it at the end.
        later = [row for row in before["models"] if row["path"] not in {r["path"] for r in scores["models"]}]
        _write(output, {**scores, "models": [*scores["models"], *later]})
    if opened:
        scores["baselines"] = _baselines(*opened, folders, held_out)
    scores["provenance"] = provenance.collect()
    _write(output, scores)
    return scores


def _write(output: Path | None, scores: dict[str, Any]) -> None:
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        provenance.write_json(output, {"provenance": provenance.collect(), **scores})


def _scored_before(output: Path | None, data: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a score file holds already, nothing of one on other text: figures on two texts are never joined."""
    nothing: dict[str, Any] = {"models": [], "baselines": []}
    if output is None or not output.is_file():
        return nothing
    before = provenance.read_json(output)
    return before if before.get("data") == list(data) else nothing


def _is_score_of(row: dict[str, Any], folder: Path) -> bool:
    """Whether a row is of this very folder: one that was written again has another time of making."""
    return row["path"] == str(folder) and row.get("created") is not None and row["created"] == _created(folder)


def _created(folder: Path) -> str | None:
    is_ours = (folder / "provenance.json").is_file()
    return read_record(folder).get("created") if is_ours else None


def watch(run: Path, device: str, output: Path, every_seconds: float, say: Callable[[str], None]) -> None:
    """Scores milestones of a run as they appear, until the one that ends it.

    Args:
        run (`Path`): a run under way or finished.
        device (`str`): where the models run.
        output (`Path`): JSON file, written after each milestone.
        every_seconds (`float`): between two looks.
        say (`Callable[[str], None]`): given a line for each milestone.

    Raises:
        InputError: if the folder is no run.
    """
    if not (run / CONFIG_FILE).is_file():
        raise InputError(f"{run}: is no run (no {CONFIG_FILE}); name the output_dir of recipes/pretrain.py")
    last, said = load_config(run / CONFIG_FILE).steps.number, set()
    while True:
        if list_milestones(run):
            for row in score([str(run)], device=device, output=output)["models"]:
                if row["name"] not in said:
                    said.add(row["name"])
                    say(f"{row['bits_per_byte']:.4f} bits per byte  {row['name']}")
                if row["step"] == last:
                    return
        time.sleep(every_seconds)


def the_run(models: Sequence[str]) -> Path | None:
    """The run that is meant, if one folder with milestones is named."""
    return Path(models[0]) if len(models) == 1 and (Path(models[0]) / MILESTONES_FOLDER).is_dir() else None


def milestones_of(run: Path) -> list[Path]:
    """The milestones of a run, in the order of their steps.

    Raises:
        InputError: if there is none yet.
    """
    folders = list_milestones(run)
    if not folders:
        raise InputError(f"run {run}: has no milestone yet; wait for the first, or train it")
    return folders


def place_in_run(folder: Path) -> dict[str, int]:
    """`step` and `tokens` of a milestone; nothing of another folder."""
    is_milestone = (folder / "provenance.json").is_file() and (folder / CONFIG_FILE).is_file()
    record = read_record(folder) if is_milestone else {}
    return {key: record[key] for key in ("step", "tokens") if key in record}


def _score_folder(folder: Path, held_out: Sequence[HeldOut], device: str) -> dict[str, Any]:
    """Scores a folder with stock transformers: model and tokenizer as somebody without this package loads them."""
    began = time.perf_counter()
    model, tokenizer = load_stock(folder, device)
    total = sum(h.num_bytes for h in held_out)
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, transient=True, disable=not Console().is_terminal) as bar:
        estimate = total // 3  # tokens; the bar is for the eye
        task = bar.add_task(f"Scoring {folder.name}", total=estimate, note="")
        result = bits_per_byte(model, tokenizer, held_out, advance=lambda n: bar.advance(task, n))
    return {
        "name": folder.name,
        "path": str(folder),
        **place_in_run(folder),
        "created": _created(folder),
        **result,
        "seconds": round(time.perf_counter() - began, 1),
    }


def _open_mixture(config: PretrainConfig) -> tuple[Mixture, PreTrainedTokenizerBase]:
    """The training text of a run, and the tokenizer that it is in."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    return open_mixture(config, tokenizer_fingerprint(tokenizer)), tokenizer


def _baselines(
    mixture: Mixture, tokenizer: PreTrainedTokenizerBase, milestones: Sequence[Path], held_out: Sequence[HeldOut]
) -> list[dict[str, Any]]:
    """Counting models fitted on what each milestone had read, each block once however often it was read."""
    documents = [_tokens(tokenizer, text) for h in held_out for text in h.texts]
    scores = []
    for folder in track(milestones, "Fitting counting models", transient=True, disable=not Console().is_terminal):
        record = read_record(folder)
        blocks = sorted(set(mixture.blocks(0, record["tokens"] // mixture.block_size)))
        text = mixture.tokens(blocks)[:, :-1].reshape(-1)  # neighbouring blocks join without a seam
        for name, order in BASELINES.items():
            model = NGramModel(text, len(tokenizer), order)
            nats = [-float(model.log_probabilities(tokens).sum()) for tokens in documents]
            known = {"name": name, "step": record["step"], "tokens": record["tokens"], "distinct_tokens": len(text)}
            scores.append({**known, **summarise(nats, held_out)})
    return scores


def _tokens(tokenizer: Any, text: str) -> np.ndarray:
    return np.array([tokenizer.bos_token_id, *encode_text(tokenizer, text)])
