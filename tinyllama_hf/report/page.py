"""The report of a run: a self-contained HTML page, its pictures as PNG files, and a page of wrong items per model."""

import base64
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError, require
from ..evaluation.protocol import caveat
from ..evaluation.score_files import ReplyRow, TextScoreFile, read_run_scores
from ..files import read_json, write_text
from ..inference.generation import generate_text
from ..inference.load import load
from ..pretrain.metrics import METRICS_FILE
from ..pretrain.milestones import CONFIG_FILE, list_milestones, read_record
from .item_pages import read_item_pages, read_task_files, write_item_pages
from .jinja import render_template
from .series_section import draw_series, series_section
from .training import TrainingCurves


_SAMPLE_TOKENS = 64
_TEMPERATURE, _TOP_P, _SEED = 0.7, 0.95, 1
_SHOWN_REPLIES = 8


def write_report(
    run: Path,
    output: Path,
    prompts: Sequence[str] = (),
    stages: Path | None = None,
    chat: Path | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> Path:
    """Writes the report of a run.

    Args:
        run (`Path`): folder of the run.
        output (`Path`): folder for the page and the pictures; those of an earlier report are replaced.
        prompts (`Sequence[str]`, *optional*): prompts that every milestone continues.
        stages (`Path`, *optional*): file with lines of `name<TAB>seconds`.
        chat (`Path`, *optional*): model that was fine-tuned from the run and scored with `eval replies`.
        log (`Callable[[str], None]`, *optional*): called with one line per milestone that continues the prompts.

    Returns:
        `Path`: the page.

    Raises:
        InputError: if the folder is not a run or has no logged step, a file is missing, or matplotlib is not
            installed. Raised before anything is written.
    """
    curves = _checked_curves(run, output, stages)
    replies, chat_record = _chat(chat) if chat else (None, None)
    require("matplotlib", "report", "drawing pictures")
    milestones = [(folder, read_record(folder)) for folder in list_milestones(run)]
    found = read_run_scores(run)
    scores, commonsense = found.text, found.commonsense
    config = yaml.safe_load((run / CONFIG_FILE).read_text(encoding="utf-8"))
    tokens = [record["tokens"] for _, record in milestones]
    task_files = read_task_files(run)
    series = series_section(config, curves, tokens, scores, next(iter(task_files.values()), None))
    item_pages = read_item_pages(task_files)
    samples = _samples([folder for folder, _ in milestones], prompts, log)
    output.mkdir(parents=True, exist_ok=True)
    pictures = [*_draw(curves, tokens, scores, output), *draw_series(series, output)]
    write_item_pages(item_pages, output)
    page = output / "index.html"
    text = render_template(
        Path(__file__).with_name("page.html.jinja"),
        title=f"Run report: {run}",
        config=config,
        first=curves.first,
        last=curves.last,
        milestones=milestones,
        pictures={name: base64.b64encode((output / f"{name}.png").read_bytes()).decode() for name in pictures},
        scores=scores,
        counted_bits={(row.name, row.tokens): row.bits_per_byte for row in scores.baselines} if scores else {},
        series=series,
        item_pages=item_pages,
        samples=samples,
        sampling=f"temperature {_TEMPERATURE}, top-p {_TOP_P}, seed {_SEED}",
        commonsense=commonsense,
        caveat=commonsense and caveat(commonsense),
        replies=replies,
        shown_replies=_SHOWN_REPLIES,
        chat=chat_record,
        stages=[line.split("\t") for line in stages.read_text("utf-8").splitlines() if line] if stages else [],
        recipe=run / CONFIG_FILE,
    )
    write_text(page, text)
    return page


def _checked_curves(run: Path, output: Path, stages: Path | None) -> TrainingCurves:
    """Returns the metrics of a run.

    Raises:
        InputError: as [`write_report`].
    """
    curves = TrainingCurves(run)
    if not curves.last:
        raise InputError(f"run {run}: no training step is logged yet in {METRICS_FILE}. Wait for the first one")
    if stages and not stages.is_file():
        raise InputError(f"--stages {stages}: the file does not exist")
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file. Choose a folder")
    return curves


def _draw(
    curves: TrainingCurves, milestones: Sequence[int], scores: TextScoreFile | None, output: Path
) -> Iterator[str]:
    """Draws the pictures of the training, and yields their names without `.png`."""
    from . import plots

    plots.loss_curve(curves, milestones, output / "loss.png")
    yield "loss"
    plots.learning_rate_curve(curves, output / "learning_rate.png")
    yield "learning_rate"
    if scores:
        plots.trajectory(scores, output / "trajectory.png")
        yield "trajectory"


def _chat(folder: Path) -> tuple[ReplyRow, dict[str, Any]]:
    """The scores of a fine-tuned model's replies, and its `provenance.json`.

    Raises:
        InputError: if it was not scored.
    """
    record, name = folder / "provenance.json", folder.resolve().name
    replies = read_run_scores(folder).of_model(name).replies
    if replies is None:
        raise InputError(
            f"--chat {folder}: no scores of the replies of {name}. Run `tinyllama-hf eval replies {folder}`"
        )
    if not record.is_file():
        raise InputError(f"--chat {folder}: {record.name} is missing. recipes/sft.py writes it")
    return replies.models[0], read_json(record)


def _samples(
    milestones: Sequence[Path], prompts: Sequence[str], log: Callable[[str], None]
) -> dict[str, list[tuple[str, str]]]:
    """For each prompt, the name of every milestone and the text that it generates, including the prompt."""
    written: dict[str, list[tuple[str, str]]] = {prompt: [] for prompt in prompts} if milestones else {}
    for folder in milestones if prompts else ():
        log(f"continuing the prompts with {folder.name}")
        model, tokenizer = load(folder)
        for prompt in prompts:
            room = model.config.max_position_embeddings - len(tokenizer(prompt)["input_ids"])
            num_tokens = max(min(_SAMPLE_TOKENS, room), 1)
            text = generate_text(
                model, tokenizer, prompt, num_tokens, temperature=_TEMPERATURE, top_p=_TOP_P, seed=_SEED
            )
            written[prompt].append((folder.name, text))
    return written
