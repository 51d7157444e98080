"""Progress bars belong on terminals: in a log file they are noise."""

from collections.abc import Callable
from typing import Any

from transformers.utils import logging


def quiet_library_bars() -> None:
    """Lets transformers' bars ("Loading weights") appear on terminals only, and vanish when they are done.

    For commands: it changes the library for the whole process. Downloads keep their own bars.
    """
    logging.set_tqdm_hook(_on_terminals)


def _on_terminals(bar: Callable[..., Any], arguments: tuple, options: dict[str, Any]) -> Any:
    return bar(*arguments, **{"disable": None, "leave": False, **options})
