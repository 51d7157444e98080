"""The exception for invalid input, and checks that all parts of the package share."""

import contextlib
import difflib
import importlib
from collections.abc import Iterable, Iterator
from types import ModuleType


_LARGEST_SEED = 2**64 - 1
_SEED_RULE = f"must be an integer from 0 to {_LARGEST_SEED} (2**64 - 1)"


class InputError(ValueError):
    """Invalid input.

    The message names the argument or file, its value, the rule and the fix. Commands print it without a traceback and
    exit with status 2. Callers of the library can catch it as a `ValueError`.
    """


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Returns `"; did you mean X?"` for the valid name closest to `name`, or else the list of valid names."""
    valid = sorted(valid)
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.8)
    return f"; did you mean {near[0]!r}?" if near else f"; valid: {', '.join(valid)}"


def one_line(error: BaseException) -> str:
    """Returns the type and the message of a library's exception in one line of at most 300 characters.

    An `InputError` is written without its type, since its message is complete.
    """
    text = " ".join(str(error).split()) or "no message"
    if not isinstance(error, InputError):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= 300 else f"{text[:297]}..."


def check_seed(seed: int, name: str = "--seed") -> int:
    """Returns the seed if torch's generators and numpy's `SeedSequence` accept it.

    torch also accepts a negative seed, as the same number plus 2**64. numpy does not.

    Args:
        seed (`int`): the seed to check.
        name (`str`, *optional*, defaults to `"--seed"`): option or key that starts the message, before the value. If
            empty, the message is only the rule, for a validator that adds both.

    Raises:
        InputError: if the seed is negative or has more than 64 bits.
    """
    if not 0 <= seed <= _LARGEST_SEED:
        raise InputError(f"{name} {seed}: {_SEED_RULE}" if name else _SEED_RULE)
    return seed


def require(package: str, extra: str, what: str) -> ModuleType:
    """Imports an optional package and returns it.

    Raises:
        InputError: if it is not installed; names the extra of `setup.cfg` that installs it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InputError(f"{what} needs the package {package}: pip install 'tinyllama_hf[{extra}]'") from error


def damaged(where: object, reason: object) -> InputError:
    """Returns the error for a damaged or incomplete file."""
    return InputError(f"{where}: damaged or incomplete ({reason}). Download it again or recreate it.")


@contextlib.contextmanager
def refuse_damage(where: object) -> Iterator[None]:
    """Turns the exceptions of a parser or constructor into the `InputError` of [`damaged`].

    Libraries raise almost any exception on damaged input, so the block should contain nothing but the reading. Those
    that only a faulty program raises are not translated.
    """
    try:
        yield
    except (InputError, MemoryError, NameError, ImportError):
        raise
    except Exception as error:
        raise damaged(where, one_line(error)) from error
