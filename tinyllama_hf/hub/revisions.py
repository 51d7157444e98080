"""The revisions to publish from a run or a model folder, with the content of every file."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError, require
from ..evaluation.models import require_milestones
from ..evaluation.score_files import RunScores
from ..files import read_json
from ..portable import portable, portable_text
from ..pretrain.milestones import CONFIG_FILE, MILESTONES_FOLDER
from .card import model_card
from .card_file import CARD_FILE
from .model_folder import ADAPTER_CONFIG, PROVENANCE_FILE, ModelFolder, open_folder, open_trained_folder
from .scores import read_published_scores


MAIN = "main"
# Uploaded unchanged: their strings are tokens and rules that programs depend on.
_VERBATIM = {"tokenizer.json", "special_tokens_map.json", "added_tokens.json", "model.safetensors.index.json"}
# Suffixes of fields with tokens in other files, which are unchanged too: a token may look like a path ("/think").
_TOKEN_FIELDS = ("chat_template", "stop_strings", "tokens_decoder", "_token", "_tokens")


@dataclass(frozen=True)
class Revision:
    """The target state of a branch.

    Attributes:
        name (`str`): name of the branch.
        source (`str`): name of the folder that it is made from.
        card (`str`): the model card.
        other_files (`dict`): content by path, either a local file or bytes.
        computed (`tuple[str, ...]`): fields of the card's metadata that are computed from scores.
    """

    name: str
    source: str
    card: str
    other_files: dict[str, Path | bytes]
    computed: tuple[str, ...] = ()

    @property
    def files(self) -> dict[str, Path | bytes]:
        """Content by path of all files, including the card."""
        return {**self.other_files, CARD_FILE: self.card.encode()}


def content_bytes(content: Path | bytes) -> int:
    """The size of the content of a file."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def plan_revisions(run: Path, repo: str, license: str | None = None, base_model: str | None = None) -> list[Revision]:
    """Returns the revisions of a run or a model folder: each milestone, and the newest again on main, with pictures.

    Raises:
        InputError: if there is nothing to publish, or a file is missing or damaged.
    """
    if (run / MILESTONES_FOLDER).is_dir():
        if base_model:
            raise InputError(f"--base-model {base_model} applies to a model folder, and {run} is a run. Leave it out")
        milestones = [open_trained_folder(folder) for folder in require_milestones(run)]
        models = [(model.name, model) for model in milestones] + [(MAIN, milestones[-1])]
    else:
        milestones, models = [], [(MAIN, open_folder(run, base_model))]
    scores = read_published_scores(run)
    drawn = _draw_pictures(run, milestones, scores) if milestones else {}
    revisions = []
    for name, model in models:
        pictures = drawn if name == MAIN else {}
        card = model_card(repo, name, model, milestones, scores, license, list(pictures))
        computed = ("model-index",) if model.kind == "trained" else ()
        files = {**_contents(model), **pictures}
        revisions.append(Revision(name, portable_text(model.name), card, files, computed))
    return revisions


def _contents(model: ModelFolder) -> dict[str, Path | bytes]:
    """The files of a folder as uploaded. The configuration of an adapter names its base model by Hub id."""
    name, _, revision = (model.base or "").partition("@")
    base = {"base_model_name_or_path": name, "revision": revision or None}
    return {
        file.name: published_content(file, **(base if file.name == ADAPTER_CONFIG else {})) for file in model.files
    }


def _draw_pictures(run: Path, milestones: Sequence[ModelFolder], scores: RunScores) -> dict[str, bytes]:
    """The curves of a run as PNG files. Equal runs give equal bytes."""
    require("matplotlib", "report", "the card's pictures")
    from ..report import plots
    from ..report.training import TrainingCurves

    curves = TrainingCurves(run)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokens = [model.record["tokens"] for model in milestones]
        plots.loss_curve(curves, tokens, folder / "loss.png")
        if scores.text:
            plots.trajectory(scores.text, folder / "trajectory.png")
        return {picture.name: picture.read_bytes() for picture in sorted(folder.iterdir())}


def published_content(file: Path, **fields: Any) -> Path | bytes:
    """Returns the content to upload for a file: the file itself, or bytes without the paths and names of this machine.

    Args:
        file (`Path`): a file of a model folder.
        **fields: values to set in a JSON object.
    """
    if file.name == CONFIG_FILE:  # always rewritten: comments may contain paths
        settings = portable(yaml.safe_load(file.read_text(encoding="utf-8")))
        return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).encode()
    if file.suffix != ".json" or file.name in _VERBATIM:
        return file
    value = read_json(file)
    changed = portable(value) if file.name == PROVENANCE_FILE else _portable_fields(value)
    changed = {**changed, **fields} if fields else changed
    return file if changed == value else (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()


def _portable_fields(value: Any) -> Any:
    """The content of a file that libraries read: only absolute paths are shortened."""
    if not isinstance(value, dict):
        return portable(value, names=False)
    others = {key: entry for key, entry in value.items() if not key.endswith(_TOKEN_FIELDS)}
    return {**value, **portable(others, names=False)}
