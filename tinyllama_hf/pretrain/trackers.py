"""Trackers beside `metrics.jsonl`, through accelerate: tensorboard, wandb, trackio."""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from .. import provenance
from ..errors import InputError, one_line, require
from ..portable import portable
from .config import PretrainConfig


RUN_ID_FILE = "trackers.json"


def check_trackers(config: PretrainConfig) -> None:
    """Refuses a tracker whose package is missing; accelerate would only warn.

    Raises:
        InputError: naming the package and the extra that has it.
    """
    for name in config.logging.trackers:
        require(name, "trackers", f"logging.trackers: {name}")


def start_trackers(accelerator: Accelerator, config: PretrainConfig, output: Path, step: int | None = None) -> None:
    """Opens the trackers that the recipe names; a run that goes on goes on in the same wandb and trackio run and
    tensorboard folder.

    Args:
        accelerator (`Accelerator`): made with these trackers, and the run's folder as its project.
        config (`PretrainConfig`): shown by the trackers as the run's settings, without absolute paths and the names of
            user and host, as some of them send it elsewhere. (wandb records user and host itself.)
        output (`Path`): folder of the run, which exists.
        step (`int`, *optional*): after which the run goes on. What tensorboard has of later steps, which a killed
            process logged and which come again, is then no longer shown. wandb keeps the first rows of such steps,
            trackio both.

    Raises:
        InputError: if a tracker refuses to start, as wandb does without a login.
    """
    if not config.logging.trackers:
        return
    options: dict[str, dict[str, Any]] = {name: {} for name in config.logging.trackers}
    if accelerator.is_main_process:
        run_id = _run_id(output)
        started = {
            "wandb": {"id": run_id, "name": output.name, "resume": "allow", "dir": str(output)},
            "trackio": {"name": f"{output.name}-{run_id}", "resume": "allow"},
            "tensorboard": {} if step is None else {"purge_step": step + 1},
        }
        options = {name: started[name] for name in options}
    settings = flat(portable(config.model_dump(mode="json", by_alias=True)))
    try:
        accelerator.init_trackers("tinyllama_hf", settings, init_kwargs=options)
    except Exception as error:  # each tracker has errors of its own
        raise InputError(
            f"logging.trackers: {', '.join(options)}: cannot be started ({one_line(error)}); wandb wants "
            "`wandb login` or WANDB_MODE=offline; or leave the tracker out"
        ) from error


def _run_id(output: Path) -> str:
    """What wandb and trackio know the run by: drawn once and kept in its folder.

    So it survives a folder that is moved, and `--overwrite` begins another; an id made from the path would do neither,
    and two machines with equal paths would log into one run.
    """
    file = output / RUN_ID_FILE
    if not file.is_file():
        provenance.write_json(file, {"id": uuid.uuid4().hex[:16]})
    return provenance.read_json(file)["id"]


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
