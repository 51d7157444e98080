"""Our summaries as `evaluate.Metric` modules, found where this package carries them."""

import functools
import tempfile
from pathlib import Path
from typing import Any

from ..errors import InputError, did_you_mean, require


def eval_folder() -> Path:
    """The folder of metrics, tasks and sample: inside the installed package, beside it in a clone."""
    package = Path(__file__).parents[1]
    return next(path for path in (package / "eval", package.parent / "eval") if path.is_dir())


@functools.cache
def load_metric(name: str) -> Any:
    """Loads one of our metrics without a Hub.

    Args:
        name (`str`): `"commonsense_average"`, `"bits_per_byte"` or `"stop_rate"`.

    Returns:
        `evaluate.Metric`: it computes in memory; what it takes and returns is in its `inputs_description`.

    Raises:
        InputError: if there is no such metric, or the package `evaluate` is not installed.
    """
    known = sorted(path.name for path in (eval_folder() / "metrics").iterdir() if path.is_dir())
    if name not in known:
        raise InputError(f"metric {name!r}: there is none of this name{did_you_mean(name, known)}")
    require("evaluate", "eval", f"the metric {name}")
    import evaluate

    # A metric makes a folder for intermediate files, which it never uses when it computes in memory.
    with tempfile.TemporaryDirectory() as unused:
        return evaluate.load(str(eval_folder() / "metrics" / name), keep_in_memory=True, cache_dir=unused)
