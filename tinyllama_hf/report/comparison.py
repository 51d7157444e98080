"""The comparison of several runs: one self-contained HTML page, and its picture as a PNG file."""

import base64
import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..conversion.reading.containers import open_safetensors
from ..errors import InputError, refuse_damage, require
from ..evaluation.score_files import TextRow, TextSource, read_run_scores
from ..files import write_text
from ..pretrain.checkpoint_reader import CheckpointReader
from ..pretrain.checkpoints import list_checkpoints, read_checkpoint_record
from ..pretrain.metrics import METRICS_FILE, duration, flat
from ..pretrain.milestones import CONFIG_FILE, list_milestones
from ..pretrain.run_record import RunRecord, read_run_record
from .jinja import render_template
from .run_names import name_runs
from .training import TrainingCurves


@dataclass(frozen=True)
class _Run:
    """A run, as the page shows it.

    Attributes:
        folder (`Path`): as given.
        record (`RunRecord`): its data and length.
        recipe (`dict`): texts of its values, by `section.key`.
        curves (`TrainingCurves`): its metrics.
        parameters (`int`): of the model, `None` before the first checkpoint.
        text (`list[TextSource]`): held-out text of its scores; empty without scores.
        score (`TextRow`): of its last scored milestone.
    """

    folder: Path
    record: RunRecord
    recipe: dict[str, str]
    curves: TrainingCurves
    parameters: int | None
    text: list[TextSource]
    score: TextRow | None

    @property
    def read_text(self) -> dict[str, Any]:
        """What decides the text behind its losses. The fingerprint of a data set includes that of its tokenizer."""
        return {
            "data": [(source.fingerprint or source.path, source.weight) for source in self.record.sources],
            "data.mixture_changes": self.record.mixture_changes,
            "data.sequence_length": self.record.sequence_length,
            "validation.max_tokens": self.recipe.get("validation.max_tokens"),
        }

    @property
    def scored_text(self) -> tuple[tuple[str, int], ...]:
        """Identifies the held-out text of its scores: the data sets, and the size of the sample of each."""
        return tuple(sorted((source.fingerprint, source.bytes) for source in self.text))


def write_comparison(runs: Sequence[Path], output: Path, log: Callable[[str], None]) -> Path:
    """Writes the comparison of several runs. They may still be training.

    Args:
        runs (`Sequence[Path]`): folders of the runs.
        output (`Path`): folder for the page and the picture; those of an earlier report are replaced.
        log (`Callable[[str], None]`): called with one line per run.

    Returns:
        `Path`: the page.

    Raises:
        InputError: as [`name_runs`]; if a folder is not a run or has no logged step, or matplotlib is not installed.
            Raised before anything is written.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file. Choose a folder")
    require("matplotlib", "report", "drawing pictures")
    from . import plots

    found = {}
    for name, folder in name_runs(runs).items():
        log(f"reading {folder}")
        found[name] = _read_run(folder)
    output.mkdir(parents=True, exist_ok=True)
    picture, page = output / "losses.png", output / "index.html"
    plots.compare_losses({name: run.curves for name, run in found.items()}, picture)
    read = [run.read_text for run in found.values()]
    text = render_template(
        Path(__file__).with_name("comparison.html.jinja"),
        title=f"Comparison of {len(found)} runs",
        runs=found,
        picture=base64.b64encode(picture.read_bytes()).decode(),
        differences=_differences([run.recipe for run in found.values()]),
        other_text=[key for key in read[0] if any(settings[key] != read[0][key] for settings in read)],
        texts={run.scored_text: run.text for run in found.values() if run.score},
        duration=duration,
    )
    write_text(page, text)
    return page


def _read_run(folder: Path) -> _Run:
    record = read_run_record(folder)
    with refuse_damage(folder / CONFIG_FILE):
        recipe = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        values = flat(_texts(recipe))
    branched_at, parameters = _branch_and_size(folder)
    curves = TrainingCurves(folder, branched_at if recipe.get("branch") else 0)
    if not curves.last:
        raise InputError(f"run {folder}: no training step is logged yet in {METRICS_FILE}. Wait for the first one")
    if milestones := list_milestones(folder):
        files = milestones[-1].glob("*.safetensors")
        parameters = sum(math.prod(tensor.shape) for file in files for tensor in open_safetensors(file).values())
    scores = read_run_scores(folder).text
    score = max(scores.models, key=lambda row: row.tokens or 0, default=None) if scores else None
    return _Run(folder, record, values, curves, parameters, scores.data if scores and score else [], score)


def _branch_and_size(run: Path) -> tuple[int | None, int | None]:
    """Tokens at which a run was branched, and its number of parameters; `None` if no checkpoint has them."""
    for checkpoint in reversed(list_checkpoints(run)):
        with contextlib.suppress(InputError):  # damaged; an earlier one has the same facts
            tensors = CheckpointReader(checkpoint).read_metadata().state_dict_metadata
            # A moment of the optimizer per parameter; the model has tied weights twice.
            moments = [tensor for name, tensor in tensors.items() if name.endswith(".exp_avg")]
            sizes = [math.prod(tensor.size) for tensor in moments if isinstance(tensor, TensorStorageMetadata)]
            return read_checkpoint_record(checkpoint).branched_at, sum(sizes)
    return None, None


def _texts(value: Any) -> Any:
    """The values of a recipe as a recipe would write them, each in one line."""
    if isinstance(value, dict):
        return {key: _texts(entry) for key, entry in value.items()}
    if isinstance(value, str):
        return value
    if type(value) is int and value >= 10_000:
        return f"{value:_}"
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()


def _differences(recipes: Sequence[dict[str, str]]) -> dict[str, list[str | None]]:
    """The values of the keys whose values differ, one per recipe, `None` for a recipe without the key."""
    keys = dict.fromkeys(key for recipe in recipes for key in recipe if key != "output_dir")
    sections = list(dict.fromkeys(key.partition(".")[0] for key in keys))
    ordered = sorted(keys, key=lambda key: sections.index(key.partition(".")[0]))
    rows = {key: [recipe.get(key) for recipe in recipes] for key in ordered}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}
