"""Milestones: complete plain Llama folders that a run writes and never removes."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import provenance
from ..errors import InputError
from ..files import new_folder, read_json, write_json, write_text
from .schedule import Steps


if TYPE_CHECKING:  # commands look for milestones before they import torch
    import torch
    from transformers import PreTrainedTokenizerFast

    from ..modeling_tinyllama import TinyLlamaForCausalLM

MILESTONES_FOLDER = "milestones"
CONFIG_FILE = "training.yaml"


def milestone_steps(tokens: Sequence[int], numbers: Sequence[int], steps: Steps) -> list[int]:
    """The steps that write a milestone: the first to reach each count of tokens, the given ones, and the last step."""
    return sorted({steps.reaching(count) for count in tokens} | set(numbers) | {steps.number})


def milestone_names(numbers: Sequence[int], steps: Steps) -> dict[int, str]:
    """Names in the style of TinyLlama, `step-480k-token-1007B`, by step.

    Steps are in k from 10 000 on. Tokens are in B from 1e9 on, otherwise in M, with the fewest decimals that keep all
    names distinct.
    """

    reached = [steps.tokens_after(step) for step in numbers]
    for decimals in itertools.count():
        tokens = [f"{n / 1e9:.{decimals}f}B" if n >= 1e9 else f"{n / 1e6:.{decimals}f}M" for n in reached]
        if len(set(tokens)) == len(numbers) and all(float(name[:-1]) for name in tokens):
            break
    named = [f"{step / 1000:.0f}k" if step >= 10_000 else str(step) for step in numbers]
    return {step: f"step-{s}-token-{t}" for step, s, t in zip(numbers, named, tokens, strict=True)}


def write_milestone(
    folder: Path,
    model: "TinyLlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    training_yaml: str,
    record: dict[str, Any],
    state_dict: "dict[str, torch.Tensor] | None" = None,
    complete: Callable[[Path, str], None] | None = None,
) -> None:
    """Writes a complete model folder under a temporary name and renames it; an existing folder is replaced.

    Args:
        folder (`Path`): of the milestone.
        model (`TinyLlamaForCausalLM`): unwrapped.
        tokenizer (`PreTrainedTokenizerFast`): saved in the same folder.
        training_yaml (`str`): the exact configuration of the run.
        record (`dict`): added to `provenance.json`, next to code, libraries and machine.
        state_dict (`dict`, *optional*): the full weights, if the model is sharded.
        complete (`Callable[[Path, str], None]`, *optional*): called with the temporary folder and the name of the
            milestone, to add files.
    """
    with new_folder(folder, overwrite=True) as temporary:
        model.save_pretrained(temporary, state_dict=state_dict)
        tokenizer.save_pretrained(temporary)
        write_text(temporary / CONFIG_FILE, training_yaml)
        write_json(temporary / "provenance.json", provenance.collect(name=folder.name, **record))
        if complete:
            complete(temporary, folder.name)


def export_weights(model: "torch.nn.Module") -> "dict[str, torch.Tensor]":
    """The full weights of a wrapped, sharded or compiled model, on the main process; empty on the others.

    A collective call of all processes.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)  # type: ignore[return-value]  # torch's type is that of optimizers


def find_run(models: Sequence[str]) -> Path | None:
    """The run if `models` is a single folder with milestones, else `None`."""
    return Path(models[0]) if len(models) == 1 and (Path(models[0]) / MILESTONES_FOLDER).is_dir() else None


def list_milestones(run: Path) -> list[Path]:
    """The milestone folders of a run, in the order of their steps.

    Raises:
        InputError: as [`read_record`]; if the record of one has no step.
    """
    steps: dict[Path, int] = {}
    for folder in (run / MILESTONES_FOLDER).glob("step-*"):
        if folder.is_dir():
            step = read_record(folder).get("step")
            if not isinstance(step, int):
                raise InputError(f"{folder / 'provenance.json'}: has no step. Copy the milestone again, or remove it.")
            steps[folder] = step
    return sorted(steps, key=steps.__getitem__)


def read_record(milestone: Path) -> dict[str, Any]:
    """The `provenance.json` of a milestone, or of a fine-tuned model, which has no step.

    Raises:
        InputError: if it is missing or damaged.
    """
    file = milestone / "provenance.json"
    if not file.is_file():
        raise InputError(f"milestone {milestone}: provenance.json is missing. Copy the milestone again, or remove it.")
    record = read_json(file)
    if not isinstance(record, dict):
        raise InputError(f"{file}: damaged, not a JSON object. Copy the milestone again, or remove it.")
    return record
