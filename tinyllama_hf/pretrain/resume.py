"""Where a launch starts: at the first step, at a checkpoint of its own run, or at a milestone of another run."""

import json
import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from .. import provenance
from ..devices import format_bytes
from ..errors import InputError
from .checkpoints import (
    BYTES_PER_PARAMETER,
    CHECKPOINTS_FOLDER,
    TRAINING_STATE_FOLDER,
    Settings,
    find_damage,
    list_checkpoints,
    newest_intact_checkpoint,
    read_checkpoint_record,
)
from .config import PretrainConfig
from .launch import device_name
from .milestones import CONFIG_FILE, MILESTONES_FOLDER
from .setup import PretrainRun


# The keys of the recipe that decide the numbers of a run. Paths are compared by the fingerprints of their contents.
_DECISIVE = {
    "model": ("preset", "overrides"),
    "data": ("mixture_changes", "sequence_length", "document_masking"),
    "schedule": ("name", "peak", "floor", "warmup_tokens", "decay_tokens"),
    "optimizer": ("betas", "eps", "weight_decay", "gradient_clip"),
    "training": ("total_tokens", "tokens_per_step", "batch_changes", "precision", "skip_spikes_sigma", "seed"),
    "validation": ("max_tokens",),  # changes no weight, but the losses before and after would not be comparable
}
_TOTAL = "training.total_tokens"
# A branch may change all settings but these.
_INHERITED = ("model", "tokenizer", "training.precision")


@dataclass(frozen=True)
class Start:
    """Where a launch starts.

    Attributes:
        step (`int`): the last finished step.
        checkpoint (`Path`): to load.
        branched_at (`int`): tokens seen at the milestone from which the run was branched.
        arithmetic (`dict`): numerical settings of the checkpoint.
        summary (`list[str]`): lines to print.
    """

    step: int = 0
    checkpoint: Path | None = None
    branched_at: int | None = None
    arithmetic: Settings | None = None
    summary: list[str] = field(default_factory=list)


def find_start(run: PretrainRun, accelerator: Accelerator, overwrite: bool) -> Start:
    """Decides where to start, on the main process for all; writes nothing.

    Raises:
        InputError: if the folder has contents from which this recipe cannot resume.
    """
    found: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            found = [_find(run, overwrite)]
        except InputError as error:
            found = [error]  # raised on every process below, so that none waits for the others
    broadcast_object_list(found)
    if isinstance(found[0], InputError):
        raise found[0]
    return found[0]


def _find(run: PretrainRun, overwrite: bool) -> Start:
    output, is_run = run.output, (run.output / CONFIG_FILE).is_file()
    _check_nothing_needed_is_removed(run, overwrite)
    # A launch that was killed early leaves only a lock and temporary files.
    is_empty = not output.exists() or all(path.name.startswith(".") for path in output.iterdir())
    if not is_empty and not is_run:
        raise InputError(f"output_dir {output}: is not empty, and is not a run folder. Choose another folder.")
    if is_empty or overwrite:
        return _first(run)
    if run.config.resume == "never":
        raise InputError(
            f"output_dir {output}: contains a run. Choose another folder, set resume: auto to resume it, or pass "
            "--overwrite to start over."
        )
    checkpoint, complaints = newest_intact_checkpoint(output)
    if checkpoint is None:
        _check_nothing_is_lost(run, complaints)
        return _first(run)
    record = read_checkpoint_record(checkpoint)
    recorded = record.identity
    if _may_be_longer(run.config, recorded, record.tokens):
        total = run.config.training.total_tokens
        complaints = [*complaints, f"longer      training.total_tokens {recorded[_TOTAL]:,} -> {total:,}"]
        recorded = {**recorded, _TOTAL: total}
    check_same_run(checkpoint, recorded, identity(run))
    state = "the run is finished" if record.step == run.config.steps.number else "resuming after it"
    summary = [*complaints, f"resume      {checkpoint}, step {record.step:,}: {state}"]
    return Start(record.step, checkpoint, record.branched_at, record.arithmetic, summary)


def _may_be_longer(config: PretrainConfig, recorded: Settings, tokens: int) -> bool:
    """Whether a run that had this many tokens would be the same, up to there, with the larger total of the recipe."""
    total, schedule = recorded[_TOTAL], config.schedule
    if config.training.total_tokens <= total or config.branch or config.data.mixture_changes:
        return False  # the weights of the validation losses depend on the total where the mixture changes
    return schedule.name == "constant" or (schedule.name == "wsd" and tokens <= total - (schedule.decay_tokens or 0))


def _check_nothing_needed_is_removed(run: PretrainRun, overwrite: bool) -> None:
    """A branch must not be in the folder of its base run, and `--overwrite` must not remove what the run reads."""
    config, output = run.config, run.output.resolve()
    if config.branch and Path(config.branch.from_).resolve().is_relative_to(output):
        raise InputError(
            f"branch.from {config.branch.from_}: is in output_dir {run.output}. A branch is a new run, and "
            "--overwrite would remove the state that it starts from. Choose another output_dir."
        )
    reads = {"model.init_from": config.model.init_from, "data.tokenizer": config.data.tokenizer}
    reads |= {f"data.sources.{place}.path": source.path for place, source in enumerate(config.data.sources)}
    for key, path in reads.items():
        if overwrite and path and Path(path).exists() and Path(path).resolve().is_relative_to(output):
            raise InputError(
                f"{key} {path}: is in output_dir {run.output}, which --overwrite would remove. Move it, or choose "
                "another output_dir."
            )


def _check_nothing_is_lost(run: PretrainRun, complaints: list[str]) -> None:
    """Only a run that was killed before its first checkpoint may start over; not one that has lost its checkpoints."""
    milestones = list((run.output / MILESTONES_FOLDER).glob("step-*"))
    if complaints or len(milestones) > 1:
        reason = complaints[-1] if complaints else f"its {CHECKPOINTS_FOLDER} are missing"
        raise InputError(
            f"output_dir {run.output}: contains a run that cannot be resumed ({reason}). Choose another folder, or "
            "pass --overwrite to start over."
        )
    found = yaml.safe_load((run.output / CONFIG_FILE).read_text(encoding="utf-8"))
    if milestones and found != run.config.model_dump(mode="json", by_alias=True):
        raise InputError(
            f"output_dir {run.output}: contains {milestones[0].name} of another recipe (see its {CONFIG_FILE}) and no "
            "checkpoint. Choose another folder, or pass --overwrite."
        )


def _first(run: PretrainRun) -> Start:
    branch = run.config.branch
    if branch is None:
        return Start()
    milestone = Path(branch.from_)
    state = milestone.parent.parent / TRAINING_STATE_FOLDER / milestone.name
    if not state.is_dir():
        reason = "No such folder."
        if milestone.is_dir():
            reason = "Train the base run with milestones.keep_training_state: true."
        raise InputError(f"branch.from {milestone}: has no training state at {state}. {reason}")
    if problem := find_damage(state):
        raise InputError(f"branch.from {milestone}: its training state {state} is damaged ({problem})")
    record = read_checkpoint_record(state)
    changes = [change for change in list_changes(record.identity, identity(run)) if change.startswith(_INHERITED)]
    if changes := [change for change in changes if not change.startswith("model.init_from:")]:
        raise InputError(
            f"branch.from {milestone}: a branch must keep model, tokenizer and precision of its base run\n  "
            + "\n  ".join(changes)
        )
    steps, tokens = run.config.steps, record.tokens
    if steps.tokens_after(record.step) != tokens:
        raise InputError(
            f"branch.from {milestone}: {tokens:,} tokens after step {record.step:,}, but "
            f"{steps.tokens_after(record.step):,} in this recipe. Keep training.tokens_per_step and batch_changes "
            "of the base run, and change the batch size later by batch_changes."
        )
    if tokens >= run.config.training.total_tokens:
        raise InputError(
            f"training.total_tokens: {run.config.training.total_tokens:,} must be above the {tokens:,} tokens of "
            f"branch.from {milestone}. Raise it."
        )
    line = f"branch      {milestone}, step {record.step:,}, {tokens:,} tokens, schedule {branch.schedule}"
    return Start(record.step, state, tokens, record.arithmetic, [line])


def check_space(run: PretrainRun, start: Start, num_parameters: int, overwrite: bool) -> None:
    """Checks that the remaining checkpoints and milestones fit on the disk.

    Args:
        run (`PretrainRun`): the run.
        start (`Start`): where it starts.
        num_parameters (`int`): of the model.
        overwrite (`bool`): whether the contents of the folder are removed first.

    Raises:
        InputError: with the space that is needed and the space that is free.
    """
    config = run.config
    if start.step == config.steps.number:
        return
    state = BYTES_PER_PARAMETER * num_parameters
    milestone = 4 * num_parameters + (state if config.milestones.keep_training_state else 0)
    existing_checkpoints = [] if overwrite else list_checkpoints(run.output)
    # A new checkpoint is written before an old one is removed. Its space also serves a milestone that is written
    # again.
    checkpoints = max(config.checkpoints.keep + 1 - len(existing_checkpoints), 0)
    milestones = [name for step, name in run.milestones.items() if step > start.step]
    if not overwrite:
        milestones = [name for name in milestones if not (run.output / MILESTONES_FOLDER / name).is_dir()]
    needed = checkpoints * state + len(milestones) * milestone
    existing = next(path for path in (run.output, *run.output.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if overwrite and existing == run.output:
        free += sum(path.stat().st_size for path in run.output.rglob("*") if path.is_file() and not path.is_symlink())
    if needed > free:
        raise InputError(
            f"output_dir {run.output}: the remaining {checkpoints} checkpoints and {len(milestones)} milestones need "
            f"{format_bytes(needed)}, and {format_bytes(free)} are free. Free space, lower checkpoints.keep, or "
            "choose another disk."
        )


def identity(run: PretrainRun) -> Settings:
    """The settings that decide the numbers of a run, flat, with the fingerprints of data and tokenizer."""
    values = run.config.model_dump(mode="json", by_alias=True)
    settings = {f"{section}.{key}": values[section][key] for section, keys in _DECISIVE.items() for key in keys}
    settings["data.sources"] = [
        {"fingerprint": source.fingerprint, "weight": source.weight} for source in run.record.sources
    ]
    return {
        **settings,
        "tokenizer": run.tokenizer_fingerprint,
        "model.init_from": values["model"]["init_from"],
        "branch": values["branch"],
    }


def arithmetic(config: PretrainConfig, accelerator: Accelerator) -> Settings:
    """The settings that change results by rounding only. If all are equal, a run on a CPU repeats bit for bit."""
    training, machine = config.training, provenance.machine()
    device = device_name(accelerator.device) or machine["cpu_capability"]
    libraries = provenance.collect()["libraries"]
    return {
        "processes": accelerator.num_processes,
        "sharding": str(accelerator.distributed_type),
        "threads": torch.get_num_threads(),
        "device": device,
        "micro_batch_size": training.micro_batch_size,
        "compile": training.compile,
        "attention": training.attention,
        "kernels": training.kernels,
        "activation_checkpointing": training.activation_checkpointing,
        "deterministic": training.deterministic,
        **{name: libraries.get(name) for name in ("torch", "transformers", "accelerate")},
    }


def check_same_run(checkpoint: Path, recorded: Settings, current: Settings) -> None:
    """Checks that a checkpoint has the settings and data of this recipe.

    Raises:
        InputError: listing each setting that differs, with both values.
    """
    if changes := list_changes(recorded, current):
        raise InputError(
            f"{checkpoint}: was trained with other settings or data, so the run cannot be resumed with this recipe. "
            "Restore them, choose another output_dir, start over with --overwrite, or use `branch`.\n  "
            + "\n  ".join(changes)
            + _restoring_overrides(recorded, current)
        )


def _restoring_overrides(recorded: Settings, current: Settings) -> str:
    """A line with the overrides that restore the settings; empty if data, tokenizer or branch differ."""
    changed = [name for name in recorded if recorded[name] != current.get(name)]
    if not {"data.sources", "tokenizer", "branch"}.isdisjoint(changed):
        return ""
    return "\n  to restore them: " + shlex.join(f"{name}={json.dumps(recorded[name])}" for name in changed)


def list_changes(recorded: Settings, current: Settings) -> list[str]:
    """Lists the settings that differ, with both values."""
    return [
        f"{name}: was {recorded.get(name)}, is {current.get(name)}"
        for name in sorted(recorded.keys() | current.keys())
        if recorded.get(name) != current.get(name)
    ]
