"""Trackers beside `metrics.jsonl`, through accelerate: tensorboard, wandb, trackio."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from .. import provenance
from ..errors import require
from .config import PretrainConfig


def check_trackers(config: PretrainConfig) -> None:
    """Refuses a tracker whose package is missing; accelerate would only warn.

    Raises:
        InputError: naming the package and the extra that has it.
    """
    for name in config.logging.trackers:
        require(name, "trackers", f"logging.trackers: {name}")


def start_trackers(accelerator: Accelerator, config: PretrainConfig, output: Path) -> None:
    """Opens the trackers that the recipe names; a run that goes on goes on in the same wandb run and tensorboard folder."""
    if not config.logging.trackers:
        return
    run_id = provenance.fingerprint(str(output.resolve()))[:16]
    resumed = {"wandb": {"id": run_id, "name": output.name, "resume": "allow"}}
    options = {name: values for name, values in resumed.items() if name in config.logging.trackers}
    accelerator.init_trackers("tinyllama_hf", flat(config.model_dump(mode="json", by_alias=True)), init_kwargs=options)


def row_values(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row of metrics under flat names, without its step."""
    return {name: value for name, value in flat(row).items() if isinstance(value, (int, float)) and name != "step"}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as `section.key`; what tensorboard cannot hold becomes text."""
    result: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = value if isinstance(value, (int, float, str)) else str(value)
    return result
