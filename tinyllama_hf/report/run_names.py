"""The runs of a comparison. Imports little, so that a command checks them without torch."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError


MAX_RUNS = 10  # colors that can be told apart


def name_runs(runs: Sequence[Path]) -> dict[str, Path]:
    """Names runs by their folders, with as many parent folders as make all names different.

    Raises:
        InputError: if a folder does not exist or is given twice, or there are too many.
    """
    if missing := [run for run in runs if not run.is_dir()]:
        raise InputError(f"run {missing[0]}: no such folder")
    folders = [run.resolve() for run in runs]
    if repeated := [run for run, folder in zip(runs, folders, strict=True) if folders.count(folder) > 1]:
        raise InputError(f"run {repeated[-1]}: is given twice. Name each run once")
    if len(runs) > MAX_RUNS:
        raise InputError(f"{len(runs)} runs: a comparison has at most {MAX_RUNS}. Name fewer")
    for depth in itertools.count(1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, runs, strict=True))
