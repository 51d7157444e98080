"""The one exception that stands for bad input."""

import difflib
import importlib
from collections.abc import Iterable


class InputError(ValueError):
    """What the user gave cannot be used.

    The message names the thing, its value, the rule and the fix. Commands print it without a traceback and exit with
    status 2; library callers may catch it as a `ValueError`.
    """


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Returns `"; did you mean X?"` for the valid name nearest to `name`, else the list of valid names."""
    valid = sorted(valid)
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; valid: {', '.join(valid)}"


def require(package: str, extra: str, what: str) -> None:
    """Refuses to go on without an optional package.

    Raises:
        InputError: if it is not installed, naming the extra of `setup.cfg` that has it.
    """
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"{what} needs the package {package}: pip install 'tinyllama_hf[{extra}]'") from error
