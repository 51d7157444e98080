"""What libraries print: progress bars belong on terminals, and some warnings are for the libraries themselves."""

import logging as python_logging
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


def quiet_bitsandbytes() -> None:
    """Silences what bitsandbytes (0.50.2) warns of as a matter of course.

    At its import on a CPU with AVX512_BF16: that an optional package is missing. In int8, once a layer and pass: that it
    casts. Call it before the import.
    """
    python_logging.getLogger("bitsandbytes").setLevel(python_logging.ERROR)
