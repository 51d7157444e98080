"""The one exception that stands for bad input."""

import difflib
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
