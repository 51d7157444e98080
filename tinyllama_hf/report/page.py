"""The story of a run: one HTML page without outside parts, and its pictures."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from .. import provenance
from ..errors import InputError, require
from ..inference.generation import generate_text
from ..inference.load import load
from ..pretrain.metrics import METRICS_FILE
from ..pretrain.milestones import CONFIG_FILE, list_milestones, read_record
from . import sections
from .training import TrainingCurves


_SAMPLE_TOKENS = 64
_SAMPLING = {"temperature": 0.7, "top_p": 0.95, "seed": 1}
_STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
img { max-width: 100%; border: 1px solid #eee; border-radius: 6px }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } td, th { padding: .25rem .9rem .25rem 0; text-align: left }
th { border-bottom: 2px solid #ccc } td { border-bottom: 1px solid #eee } td.n, th.n { text-align: right }
table.wide { font-size: 12.5px } table.wide td { white-space: nowrap; padding-right: .6rem } table.words td { overflow-wrap: anywhere }
pre { background: #f6f8fa; padding: .7rem; border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px }
h3 code { white-space: pre } .given { color: #888 } footer { color: #777; font-size: 13px; margin-top: 3rem }
"""


def write_report(
    run: Path, output: Path, prompts: Sequence[str] = (), stages: Path | None = None, chat: Path | None = None
) -> Path:
    """Writes pictures and page of a finished run.

    Args:
        run (`Path`): folder of the run.
        output (`Path`): folder to write into; pictures and page of an earlier report are replaced.
        prompts (`Sequence[str]`, *optional*): continued by every milestone.
        stages (`Path`, *optional*): lines of `name<TAB>seconds`.
        chat (`Path`, *optional*): a model that was fine-tuned from the run and scored with `eval --task replies`.

    Returns:
        The page.

    Raises:
        InputError: if the folder is no run or one without a step, something named does not exist, or matplotlib is
            missing; before anything is written.
    """
    if not (run / METRICS_FILE).is_file():
        raise InputError(f"run {run}: holds no {METRICS_FILE}, so it is no pretraining run")
    curves = TrainingCurves(run)
    if not curves.last:
        raise InputError(f"run {run}: has logged no step yet; wait for the first")
    if stages and not stages.is_file():
        raise InputError(f"--stages {stages}: no such file")
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output}: is a file; name a folder")
    replied = sections.replies(chat) if chat else ""
    require("matplotlib", "report", "drawing pictures")
    from . import plots

    milestones = [(folder, read_record(folder)) for folder in list_milestones(run)]
    samples = _samples(milestones, prompts) if prompts and milestones else ""
    scores_file = run / "scores.json"
    scores = provenance.read_json(scores_file) if scores_file.is_file() else None
    commonsense_file = run / "commonsense.json"
    output.mkdir(parents=True, exist_ok=True)
    plots.loss_curve(curves, [record["tokens"] for _, record in milestones], output / "loss.png")
    plots.learning_rate_curve(curves, output / "learning_rate.png")
    if scores:
        plots.trajectory(scores, output / "trajectory.png")
    parts = [
        _headline(run, curves, milestones, scores),
        _scores(scores, output) if scores else "",
        f"<h2>The run</h2>{_picture(output / 'loss.png')}{_picture(output / 'learning_rate.png')}",
        samples,
        sections.commonsense(provenance.read_json(commonsense_file)) if commonsense_file.is_file() else "",
        replied,
        _stages(stages) if stages else "",
        _footer(run, milestones),
    ]
    body = "\n".join(part for part in parts if part)
    page = output / "index.html"
    title = html.escape(f"The story of {run}")
    provenance.write_text(
        page,
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>\n{body}</body></html>\n",
    )
    return page


def _headline(run: Path, curves: TrainingCurves, milestones: Sequence[tuple], scores: dict | None) -> str:
    config = yaml.safe_load((run / CONFIG_FILE).read_text(encoding="utf-8"))
    sources = ", ".join(f"{s['weight']:.0%} {html.escape(s['path'])}" for s in config["data"]["sources"])
    text = (
        f"<p>A <b>{html.escape(config['model']['preset'])}</b> Llama read {curves.last['tokens'] / 1e6:.2f} million tokens "
        f"({sources}) and left {len(milestones)} milestones, each a plain Llama folder that stock transformers loads. "
        f"Its training loss went from {curves.first['loss']:.2f} to {curves.last['loss']:.2f} nats a token.</p>"
    )
    if not scores:
        return text
    last = scores["models"][-1]
    text += f"<p>On unseen text the last milestone needs <b>{last['bits_per_byte']:.3f} bits per byte</b>"
    counted = {row["name"]: row for row in scores["baselines"] if row["tokens"] == last["tokens"]}
    if counted:
        text += ", " + " and ".join(f"a {name} model {row['bits_per_byte']:.3f}" for name, row in counted.items())
        text += " after reading the same text"
    return text + ".</p>"


def _scores(scores: dict[str, Any], output: Path) -> str:
    sources = list(scores["models"][0]["by_source"])
    names = list(dict.fromkeys(row["name"] for row in scores["baselines"]))
    counted = {(row["name"], row["tokens"]): row["bits_per_byte"] for row in scores["baselines"]}
    heads = ["tokens", *names, "model", *(f"model, {html.escape(Path(source).name)}" for source in sources)]
    head = "".join(f'<th class="n">{name}</th>' for name in heads)
    lines = []
    for row in scores["models"]:
        before = [f"{row['tokens']:,}", *(_figure(counted.get((name, row["tokens"]))) for name in names)]
        after = [_figure(row["by_source"][source]) for source in sources]
        cells = "".join(
            f'<td class="n">{text}</td>' for text in [*before, f"<b>{_figure(row['bits_per_byte'])}</b>", *after]
        )
        lines.append(f"<tr><td>{html.escape(row['name'])}</td>{cells}</tr>")
    documents = ", ".join(f"{d['documents']} documents of {html.escape(d['path'])}" for d in scores["data"])
    return (
        f"<h2>Bits per byte on unseen text</h2>{_picture(output / 'trajectory.png')}"
        "<p>Lower is better; a byte that cannot be foreseen at all costs 8. The counting models (5-gram: interpolated "
        "modified Kneser-Ney over the same tokens) were fitted on the text that the milestone had read. Scored by stock "
        f"transformers on {documents} that no training block came from; the sum over all counts bytes, whatever the mixture.</p>"
        f"<table><tr><th>milestone</th>{head}</tr>{''.join(lines)}</table>"
    )


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _samples(milestones: Sequence[tuple[Path, dict]], prompts: Sequence[str]) -> str:
    how = ", ".join(f"{name} {value}" for name, value in _SAMPLING.items())
    parts = [
        f"<h2>The same beginnings, continued</h2><p>Drawn with {how.replace('_', '-')}; the beginning is grey.</p>"
    ]
    written: dict[str, list[tuple[str, str]]] = {prompt: [] for prompt in prompts}
    for folder, _ in milestones:
        model, tokenizer = load(folder)
        for prompt in prompts:
            room = model.config.max_position_embeddings - len(tokenizer(prompt)["input_ids"])
            text = generate_text(model, tokenizer, prompt, max(min(_SAMPLE_TOKENS, room), 1), **_SAMPLING)
            written[prompt].append((folder.name, text))
    for prompt, texts in written.items():
        parts.append(f"<h3><code>{html.escape(prompt)}</code></h3>")
        for name, text in texts:
            given, new = html.escape(text[: len(prompt)]), html.escape(text[len(prompt) :])
            parts.append(f'<h4>{html.escape(name)}</h4><pre><span class="given">{given}</span>{new}</pre>')
    return "\n".join(parts)


def _stages(file: Path) -> str:
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines() if line]
    cells = "".join(f'<tr><td>{html.escape(name)}</td><td class="n">{seconds}</td></tr>' for name, seconds in rows)
    return f'<h2>Where the time went</h2><table><tr><th>stage</th><th class="n">seconds</th></tr>{cells}</table>'


def _footer(run: Path, milestones: Sequence[tuple[Path, dict]]) -> str:
    if not milestones:
        return ""
    folder, record = milestones[-1]
    machine, code = record["machine"], record["code"]
    libraries = ", ".join(f"{name} {version}" for name, version in record["libraries"].items())
    return (
        f"<footer>{html.escape(folder.name)} was made on {record['created']} by tinyllama_hf {code['tinyllama_hf']}"
        f"{', commit ' + code['commit'][:12] if code.get('commit') else ''} with Python {record['python']}, {libraries}, on "
        f"{html.escape(machine['processor'])} ({machine['cores']} cores). Recipe: {html.escape(str(run / CONFIG_FILE))}."
        "</footer>"
    )


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{path.stem.replace("_", " ")}" src="data:image/png;base64,{data}"></p>'
