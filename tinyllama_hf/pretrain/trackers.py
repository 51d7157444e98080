"""Trackers of accelerate: tensorboard, wandb, trackio."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from .config import PretrainConfig


def start_trackers(accelerator: Accelerator, config: PretrainConfig, output: Path) -> None:
    """Opens the trackers that the recipe names."""
    if config.logging.trackers:
        accelerator.init_trackers(output.name)


def row_values(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row of metrics, flat."""
    return {name: value for name, value in row.items() if isinstance(value, (int, float)) and name != "step"}
