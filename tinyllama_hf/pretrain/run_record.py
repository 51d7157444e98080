"""`run.json`: the facts of a run that other parts of the package need, independent of the recipe's schema."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from ..data.mixture import Mixture
from ..data.order import WeightChange
from ..errors import InputError, refuse_damage
from ..files import read_json, write_json
from .milestones import CONFIG_FILE, MILESTONES_FOLDER, milestone_names, milestone_steps
from .schedule import Steps


RUN_FILE = "run.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class SourceRecord:
    """A data set of a run. `fingerprint` is `None` for a run of an early version without milestones."""

    path: str
    weight: float
    fingerprint: str | None


@dataclass(frozen=True)
class MixtureChangeRecord:
    """New weights of the sources, reached linearly over `ramp_tokens` from `from_tokens` on."""

    from_tokens: int
    ramp_tokens: int
    weights: list[float]


@dataclass(frozen=True)
class MilestoneRecord:
    """A milestone that the run writes."""

    step: int
    tokens: int
    name: str


@dataclass(frozen=True)
class RunRecord:
    """The data of a run, its length and its milestones.

    Attributes:
        tokenizer (`str`): path, as in the recipe.
        sources (`list[SourceRecord]`): in the order of the recipe.
        mixture_changes (`list[MixtureChangeRecord]`): later weights of the sources.
        sequence_length (`int`): tokens of a block.
        seed (`int`): of the data order.
        num_steps (`int`): number of the last step.
        num_tokens (`int`): after the last step.
        milestones (`list[MilestoneRecord]`): in the order of their steps.
    """

    tokenizer: str
    sources: list[SourceRecord]
    mixture_changes: list[MixtureChangeRecord]
    sequence_length: int
    seed: int
    num_steps: int
    num_tokens: int
    milestones: list[MilestoneRecord]


def record_of_recipe(recipe: Mapping[str, Any], fingerprints: Mapping[str, str]) -> RunRecord:
    """Derives the record from a recipe. Reads the keys that it needs, and ignores all others.

    Args:
        recipe (`Mapping`): the sections of `training.yaml`.
        fingerprints (`Mapping`): of the data sets, by path.
    """
    data, training, milestones = recipe["data"], recipe["training"], recipe["milestones"]
    batches = [(change["from_tokens"], change["tokens_per_step"]) for change in training.get("batch_changes") or ()]
    steps = Steps(training["total_tokens"], training["tokens_per_step"], batches)
    numbers = milestone_steps(milestones.get("tokens", ()), milestones.get("steps", ()), steps)

    return RunRecord(
        tokenizer=data["tokenizer"],
        sources=[SourceRecord(s["path"], s["weight"], fingerprints.get(s["path"])) for s in data["sources"]],
        mixture_changes=[MixtureChangeRecord(**change) for change in data.get("mixture_changes") or ()],
        sequence_length=data["sequence_length"],
        seed=training["seed"],
        num_steps=steps.number,
        num_tokens=steps.tokens_after(steps.number),
        milestones=[
            MilestoneRecord(n, steps.tokens_after(n), name) for n, name in milestone_names(numbers, steps).items()
        ],
    )


def write_run_record(run: Path, record: RunRecord) -> None:
    """Writes `run.json` into the folder of a run."""
    write_json(run / RUN_FILE, {"format_version": FORMAT_VERSION, **asdict(record)})


def read_run_record(run: Path) -> RunRecord:
    """Reads the record of a run; if an early version wrote no `run.json`, from `training.yaml` and the milestones.

    The recipe is not validated, so a run of another version can be read although its recipe is no longer accepted.

    Raises:
        InputError: if the folder is not a run, or its record is damaged or of an unknown version.
    """
    file = run / RUN_FILE
    if not file.is_file():
        return _record_of_early_run(run)
    values = read_json(file)
    version = values.pop("format_version", None) if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{file}: format_version {version} is not supported; this version of tinyllama_hf reads {FORMAT_VERSION}. "
            "Update tinyllama_hf, or use the version that wrote the run."
        )
    kinds = {"sources": SourceRecord, "mixture_changes": MixtureChangeRecord, "milestones": MilestoneRecord}
    with refuse_damage(file):
        values |= {name: [kind(**value) for value in values[name]] for name, kind in kinds.items()}
        record = RunRecord(**values)
    return record


def _record_of_early_run(run: Path) -> RunRecord:
    file = run / CONFIG_FILE
    if not file.is_file():
        raise InputError(f"{run}: is not a run folder; it has neither {RUN_FILE} nor {CONFIG_FILE}")
    records = sorted((run / MILESTONES_FOLDER).glob("step-*/provenance.json"))
    with refuse_damage(file):
        fingerprints = read_json(records[0])["data"] if records else {}
        record = record_of_recipe(yaml.safe_load(file.read_text(encoding="utf-8")), fingerprints)
    return record


def open_mixture(record: RunRecord, tokenizer_fingerprint: str) -> Mixture:
    """The training stream of a run. Converts amounts in tokens to blocks.

    Raises:
        InputError: as [`Mixture`].
    """
    length = record.sequence_length
    return Mixture(
        [source.path for source in record.sources],
        [source.weight for source in record.sources],
        length,
        record.seed,
        tokenizer_fingerprint,
        [
            WeightChange(Fraction(change.from_tokens, length), Fraction(change.ramp_tokens, length), change.weights)
            for change in record.mixture_changes
        ],
    )
