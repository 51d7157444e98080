"""Where a launch begins: at the first step, at a checkpoint of its own, or at a milestone of another run."""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from .. import provenance
from ..errors import InputError
from .checkpoints import (
    BYTES_PER_PARAMETER,
    CHECKPOINTS_FOLDER,
    TRAINING_STATE_FOLDER,
    damage,
    list_checkpoints,
    newest_complete,
    read_record,
    size_in_words,
)
from .config import PretrainConfig
from .launch import device_name
from .milestones import CONFIG_FILE, MILESTONES_FOLDER
from .setup import Run


# Sections and keys of the recipe that decide which numbers a run computes and reports; paths count by what lies there.
_DECISIVE = {
    "model": ("preset", "overrides"),
    "data": ("mixture_changes", "sequence_length", "document_masking"),
    "schedule": ("name", "peak", "floor", "warmup_tokens", "decay_tokens"),
    "optimizer": ("betas", "eps", "weight_decay", "gradient_clip"),
    "training": ("total_tokens", "tokens_per_step", "batch_changes", "precision", "skip_spikes_sigma", "seed"),
    "validation": ("max_tokens",),  # moves no weight, but the losses before and after would not compare
}
# A branch may change the rest; it continues these.
_INHERITED = ("model", "tokenizer", "training.precision")


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
    _check_nothing_needed_is_removed(run, overwrite)
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
    check_same_run(checkpoint, record["identity"], identity(run))
    is_finished = record["step"] >= run.config.steps.number
    words = "finished: nothing is left to do" if is_finished else "going on after it"
    return Start(
        record["step"],
        checkpoint,
        record.get("branched_at"),
        record["arithmetic"],
        is_finished,
        [*complaints, f"resume      {checkpoint}, step {record['step']:,}: {words}"],
    )


def _check_nothing_needed_is_removed(run: Run, overwrite: bool) -> None:
    """A branch never lies in the folder of the run that it leaves, and `--overwrite` removes nothing that the run reads."""
    config, output = run.config, run.output.resolve()
    if config.branch and Path(config.branch.from_).resolve().is_relative_to(output):
        raise InputError(
            f"branch.from {config.branch.from_}: lies in output_dir {run.output}; a branch is a run of its own, and "
            "--overwrite would remove what it begins with: choose another output_dir"
        )
    reads = {"model.init_from": config.model.init_from, "data.tokenizer": config.data.tokenizer}
    reads |= {f"data.sources.{place}.path": source.path for place, source in enumerate(config.data.sources)}
    for key, path in reads.items():
        if overwrite and path and Path(path).exists() and Path(path).resolve().is_relative_to(output):
            raise InputError(
                f"{key} {path}: lies in output_dir {run.output}, which --overwrite would remove; move it, or choose another "
                "output_dir"
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
    check_branch(milestone, record["identity"], identity(run))
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


def check_space(run: Run, start: Start, num_parameters: int, overwrite: bool) -> None:
    """Refuses a run if what it is still to write cannot lie on its disk.

    Args:
        run (`Run`): whose checkpoints and milestones are counted.
        start (`Start`): what is done already.
        num_parameters (`int`): of the model.
        overwrite (`bool`): whether what lies in the folder goes first.

    Raises:
        InputError: naming what is needed and what is free.
    """
    if start.is_finished:
        return
    config = run.config
    state = BYTES_PER_PARAMETER * num_parameters
    milestone = 4 * num_parameters + (state if config.milestones.keep_training_state else 0)
    lying = [] if overwrite else list_checkpoints(run.output)
    # A new checkpoint lies there before an old one goes. Its room also serves a milestone that is written again.
    checkpoints = max(config.checkpoints.keep + 1 - len(lying), 0)
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
            f"output_dir {run.output}: {checkpoints} checkpoints and {len(milestones)} milestones that are still to be "
            f"written take {size_in_words(needed)}, {size_in_words(free)} are free; make room, lower checkpoints.keep, or "
            "choose another disk"
        )


def identity(run: Run) -> dict[str, Any]:
    """The decisive settings, flat, with the fingerprints of data and tokenizer."""
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


def arithmetic(config: PretrainConfig, accelerator: Accelerator) -> dict[str, Any]:
    """What moves results within rounding: with all of it equal, a run repeats bit for bit on a CPU."""
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


def check_same_run(checkpoint: Path, recorded: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuses to go on with a run under other settings.

    Raises:
        InputError: naming each setting with its value then and now.
    """
    lines = _differences(recorded, current)
    if lines:
        raise InputError(
            f"{checkpoint}: was trained with other settings or data, so going on would be no run of this recipe; restore "
            "them, choose another output_dir, start anew with --overwrite, or fork the run with `branch`\n"
            + "\n".join(lines)
        )


def check_branch(milestone: Path, recorded: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuses a branch whose model or tokenizer is not that of the run it leaves.

    Raises:
        InputError: naming each setting with its value there and here.
    """
    names = [name for name in current if name.startswith(_INHERITED) and name != "model.init_from"]
    lines = _differences({name: recorded.get(name) for name in names}, {name: current[name] for name in names})
    if lines:
        raise InputError(
            f"branch.from {milestone}: a branch continues model, tokenizer and precision of the run it leaves\n"
            + "\n".join(lines)
        )


def _differences(recorded: dict[str, Any], current: dict[str, Any]) -> list[str]:
    return [
        f"  {name}: was {recorded.get(name)}, is {current.get(name)}"
        for name in sorted(recorded.keys() | current.keys())
        if recorded.get(name) != current.get(name)
    ]


def changed_arithmetic(recorded: dict[str, Any], current: dict[str, Any]) -> str | None:
    """One sentence on what moves the results within rounding since the checkpoint, `None` if nothing does."""
    lines = [line.strip() for line in _differences(recorded, current)]
    if not lines:
        return None
    return f"warning: from here on equal to the uninterrupted run within rounding only ({'; '.join(lines)})"
