"""Where a launch begins: at the first step, at a checkpoint of its own, or at a milestone of another run."""

from pathlib import Path
from typing import Any, NamedTuple

import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..errors import InputError
from .checkpoints import (
    CHECKPOINTS_FOLDER,
    TRAINING_STATE_FOLDER,
    damage,
    newest_complete,
    read_record,
)
from .identity import check_branch, check_same_run
from .milestones import CONFIG_FILE, MILESTONES_FOLDER
from .setup import Run


class Start(NamedTuple):
    """Steps that are done, the state to load, what it was computed with, and the lines that say so."""

    step: int = 0
    checkpoint: Path | None = None
    branched_at: int | None = None
    arithmetic: dict[str, Any] | None = None
    is_finished: bool = False
    says: list[str] = []


def find_start(run: Run, accelerator: Accelerator, overwrite: bool) -> Start:
    """Decides where to begin, on the main process for all; writes nothing.

    Raises:
        InputError: if the folder holds something that this recipe cannot go on with.
    """
    found: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            found = [_find(run, overwrite)]
        except InputError as error:
            found = [error]  # raised on every process, so that none waits for the others
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
    if isinstance(found[0], InputError):
        raise found[0]
    return found[0]


def _find(run: Run, overwrite: bool) -> Start:
    output, is_run = run.output, (run.output / CONFIG_FILE).is_file()
    # A lock and files under temporary names are all that a launch leaves that was killed at once.
    is_empty = not output.exists() or all(path.name.startswith(".") for path in output.iterdir())
    if not is_empty and not is_run:
        raise InputError(f"output_dir {output}: is not empty, and it is no run; choose another folder")
    if is_empty or overwrite:
        return _first(run)
    if run.config.resume == "never":
        raise InputError(
            f"output_dir {output}: holds a run; choose another folder, go on with it by resume: auto, or pass --overwrite "
            "to start it anew"
        )
    checkpoint, complaints = newest_complete(output)
    if checkpoint is None:
        _check_nothing_is_lost(run, complaints)
        return _first(run)
    record = read_record(checkpoint)
    check_same_run(checkpoint, record["identity"], run.identity)
    is_finished = record["step"] >= run.config.steps.number
    words = "finished: nothing is left to do" if is_finished else "going on after it"
    return Start(
        record["step"],
        checkpoint,
        record["branched_at"],
        record["arithmetic"],
        is_finished,
        [*complaints, f"resume      {checkpoint}, step {record['step']:,}: {words}"],
    )


def _check_nothing_is_lost(run: Run, complaints: list[str]) -> None:
    """A run that was killed before its first checkpoint begins again; one whose checkpoints are gone does not."""
    milestones = list((run.output / MILESTONES_FOLDER).glob("step-*"))
    if complaints or len(milestones) > 1:
        reason = complaints[-1] if complaints else f"its {CHECKPOINTS_FOLDER} are gone"
        raise InputError(
            f"output_dir {run.output}: holds a run that cannot be gone on with ({reason}); choose another folder, or pass "
            "--overwrite to start it anew"
        )
    found = yaml.safe_load((run.output / CONFIG_FILE).read_text(encoding="utf-8"))
    if milestones and found != run.config.model_dump(mode="json", by_alias=True):
        raise InputError(
            f"output_dir {run.output}: holds {milestones[0].name} of another recipe (see its {CONFIG_FILE}) and no "
            "checkpoint; choose another folder, or pass --overwrite"
        )


def _first(run: Run) -> Start:
    branch = run.config.branch
    if branch is None:
        return Start()
    milestone = Path(branch.from_)
    state = milestone.parent.parent / TRAINING_STATE_FOLDER / milestone.name
    if not state.is_dir():
        hint = "train it with milestones.keep_training_state: true" if milestone.is_dir() else "no such folder"
        raise InputError(f"branch.from {milestone}: has no training state at {state}; {hint}")
    if problem := damage(state):
        raise InputError(f"branch.from {milestone}: its training state {state} is damaged ({problem})")
    record = read_record(state)
    check_branch(milestone, record["identity"], run.identity)
    steps, tokens = run.config.steps, record["tokens"]
    if steps.tokens_after(record["step"]) != tokens:
        raise InputError(
            f"branch.from {milestone}: {tokens:,} tokens after step {record['step']:,}, in this recipe "
            f"{steps.tokens_after(record['step']):,}; keep training.tokens_per_step and batch_changes of the run that is "
            "left, and change the batch later by batch_changes"
        )
    if tokens >= run.config.training.total_tokens:
        raise InputError(
            f"training.total_tokens: {run.config.training.total_tokens:,} is reached already at branch.from {milestone} "
            f"({tokens:,} tokens); raise it"
        )
    says = f"branch      {milestone}, step {record['step']:,}, {tokens:,} tokens, schedule {branch.schedule}"
    return Start(record["step"], state, tokens, record["arithmetic"], False, [says])
