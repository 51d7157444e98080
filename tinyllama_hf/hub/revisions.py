"""What is to be published: the revisions of a repository, each with the contents of its files."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..errors import InputError, require
from ..evaluation.models import require_milestones
from ..files import read_json
from ..portable import portable, portable_text
from ..pretrain.metrics import METRICS_FILE
from ..pretrain.milestones import CONFIG_FILE, MILESTONES_FOLDER
from .card import model_card
from .card_file import CARD_FILE
from .model_folder import ADAPTER_CONFIG, PROVENANCE_FILE, ModelFolder, open_folder, open_trained_folder
from .scores import Scores, read_scores


MAIN = "main"
# Their strings are tokens and rules, which programs obey.
_VERBATIM = {"tokenizer.json", "special_tokens_map.json", "added_tokens.json", "model.safetensors.index.json"}
# The same inside other files: a token may look like a path ("/think").
_TOKEN_FIELDS = ("chat_template", "stop_strings", "tokens_decoder", "_token", "_tokens")  # what their names end in


class Revision(NamedTuple):
    """What a branch is to hold.

    Attributes:
        name (`str`): of the branch.
        source (`str`): name of the folder that it comes from.
        files (`dict`): contents by path, either a file here or the bytes themselves.
        computed (`tuple[str, ...]`): fields of the card's metadata that are made from scores, and go when these go.
    """

    name: str
    source: str
    files: dict[str, Path | bytes]
    computed: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Of all files together."""
        return sum(map(content_bytes, self.files.values()))


def content_bytes(content: Path | bytes) -> int:
    """The size of a file, here or in memory."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def plan_revisions(run: Path, repo: str, license: str | None = None, base_model: str | None = None) -> list[Revision]:
    """What is to be published: the milestones in their order, and the newest again on main, with pictures.

    Raises:
        InputError: if the folder holds nothing to publish, or a part of it is damaged.
    """
    if (run / MILESTONES_FOLDER).is_dir():
        if base_model:
            raise InputError(f"--base-model {base_model}: is for a model folder, and {run} is a run; leave it out")
        ladder = [open_trained_folder(folder) for folder in require_milestones(run)]
        models = [(model.name, model) for model in ladder] + [(MAIN, ladder[-1])]
    else:
        ladder, models = [], [(MAIN, open_folder(run, base_model))]
    scores = read_scores(run)
    drawn = _pictures(run, ladder, scores) if ladder else {}
    revisions = []
    for name, model in models:
        pictures = drawn if name == MAIN else {}
        card = model_card(repo, name, model, ladder, scores, license, list(pictures))
        files = {**_contents(model), **pictures, CARD_FILE: card.encode()}
        computed = ("model-index",) if model.kind == "trained" else ()
        revisions.append(Revision(name, portable_text(model.name), files, computed))
    return revisions


def _contents(model: ModelFolder) -> dict[str, Path | bytes]:
    """The files of a folder as they are uploaded; an adapter names its base by the id that others find it by."""
    name, _, revision = (model.base or "").partition("@")
    base = {"base_model_name_or_path": name, "revision": revision or None}
    return {
        file.name: published_content(file, **(base if file.name == ADAPTER_CONFIG else {})) for file in model.files
    }


def _pictures(run: Path, ladder: Sequence[ModelFolder], scores: Scores) -> dict[str, bytes]:
    """The curves of a run as PNG files; equal runs give equal bytes."""
    require("matplotlib", "report", "the card's pictures")
    from ..report import plots
    from ..report.training import TrainingCurves

    if not (run / METRICS_FILE).is_file():
        raise InputError(
            f"run {run}: holds no {METRICS_FILE}, from which the loss curve is drawn; publish the whole run"
        )
    curves = TrainingCurves(run)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokens = [model.record["tokens"] for model in ladder]
        plots.loss_curve(curves, tokens, folder / "loss.png")
        if scores.bits_per_byte:
            plots.trajectory(scores.bits_per_byte, folder / "trajectory.png")
        return {picture.name: picture.read_bytes() for picture in sorted(folder.iterdir())}


def published_content(file: Path, **fields: Any) -> Path | bytes:
    """Returns what is uploaded of a file: the file itself where nothing in it has to change, or the bytes to upload.

    Args:
        file (`Path`): of a model folder.
        **fields: replace those of the same name in a JSON object.
    """
    if file.name == CONFIG_FILE:  # always written again: comments may name anything
        settings = portable(yaml.safe_load(file.read_text(encoding="utf-8")))
        return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).encode()
    if file.suffix != ".json" or file.name in _VERBATIM:
        return file
    value = read_json(file)
    changed = portable(value) if file.name == PROVENANCE_FILE else _portable_fields(value)
    changed = {**changed, **fields} if fields else changed
    return file if changed == value else (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()


def _portable_fields(value: Any) -> Any:
    """A file that a library reads: paths are cut, and nothing else is touched."""
    if not isinstance(value, dict):
        return portable(value, names=False)
    others = {key: entry for key, entry in value.items() if not key.endswith(_TOKEN_FIELDS)}
    return {**value, **portable(others, names=False)}
