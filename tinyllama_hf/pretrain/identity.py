"""What makes two runs the same run: the settings and data that decide its numbers."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from .. import provenance
from ..errors import InputError
from .config import PretrainConfig
from .run_record import RunRecord


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


def identity(config: PretrainConfig, record: RunRecord, tokenizer: str) -> dict[str, Any]:
    """The decisive settings, flat, with the fingerprints of data and tokenizer."""
    values = config.model_dump(mode="json", by_alias=True)
    settings = {f"{section}.{key}": values[section][key] for section, keys in _DECISIVE.items() for key in keys}
    settings["data.sources"] = [
        {"fingerprint": source.fingerprint, "weight": source.weight} for source in record.sources
    ]
    return {
        **settings,
        "tokenizer": tokenizer,
        "model.init_from": values["model"]["init_from"],
        "branch": values["branch"],
    }


def arithmetic(config: PretrainConfig, accelerator: Accelerator) -> dict[str, Any]:
    """What moves results within rounding: with all of it equal, a run repeats bit for bit on a CPU."""
    training, machine = config.training, provenance.machine()
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else machine["cpu_capability"]
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
