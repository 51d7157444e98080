"""Milestones: complete plain Llama folders that a run leaves behind and never removes."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from .. import provenance
from ..errors import InputError
from ..modeling_tinyllama import TinyLlamaForCausalLM


MILESTONES_FOLDER = "milestones"
CONFIG_FILE = "training.yaml"


def milestone_steps(tokens: Sequence[int], tokens_per_step: int, num_steps: int) -> list[int]:
    """The steps after which a milestone is written: the first to reach each count of tokens, and the last."""
    return sorted({-(-count // tokens_per_step) for count in tokens} | {num_steps})


def milestone_names(steps: Sequence[int], tokens_per_step: int) -> dict[int, str]:
    """Names like TinyLlama's, `step-480k-token-1007B`, one for each step.

    Steps are written in k from 10 000 on. Tokens are written in B from 1e9 on, else in M, all with as few decimals as
    keep them apart.
    """

    def tokens_name(step: int, decimals: int) -> str:
        tokens = step * tokens_per_step
        return f"{tokens / 1e9:.{decimals}f}B" if tokens >= 1e9 else f"{tokens / 1e6:.{decimals}f}M"

    def is_ambiguous(decimals: int) -> bool:
        names = {tokens_name(step, decimals) for step in steps}
        return len(names) < len(steps) or any(float(name[:-1]) == 0 for name in names)

    decimals = next(n for n in itertools.count() if not is_ambiguous(n))
    step_names = {step: f"{step / 1000:.0f}k" if step >= 10_000 else str(step) for step in steps}
    return {step: f"step-{step_names[step]}-token-{tokens_name(step, decimals)}" for step in steps}


def write_milestone(
    folder: Path,
    model: TinyLlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    training_yaml: str,
    record: dict[str, Any],
) -> None:
    """Writes a complete model folder under a temporary name and renames it.

    Args:
        folder (`Path`): where it is to lie; must not exist.
        model (`TinyLlamaForCausalLM`): unwrapped.
        tokenizer (`PreTrainedTokenizerFast`): saved beside it.
        training_yaml (`str`): the exact configuration of the run.
        record (`dict`): what `provenance.json` says besides code, libraries and machine.
    """
    with provenance.new_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        provenance.write_text(temporary / CONFIG_FILE, training_yaml)
        provenance.write_json(temporary / "provenance.json", provenance.collect(**record))


def list_milestones(run: Path) -> list[Path]:
    """The milestone folders of a run, in the order of their steps.

    Raises:
        InputError: if one has no record of its step.
    """
    folders = [path for path in (run / MILESTONES_FOLDER).glob("step-*") if path.is_dir()]
    steps = {path: read_record(path).get("step") for path in folders}
    if unknown := [path for path in folders if not isinstance(steps[path], int)]:
        raise InputError(f"{unknown[0] / 'provenance.json'}: names no step; copy the milestone again, or remove it")
    return sorted(folders, key=lambda path: steps[path])


def read_record(milestone: Path) -> dict[str, Any]:
    """The `provenance.json` of a milestone.

    Raises:
        InputError: if it is missing or damaged.
    """
    file = milestone / "provenance.json"
    if not file.is_file():
        raise InputError(f"milestone {milestone}: holds no provenance.json; copy the milestone again, or remove it")
    record = provenance.read_json(file)
    if not isinstance(record, dict):
        raise InputError(f"{file}: damaged, no JSON object; copy the milestone again, or remove it")
    return record
