"""Output of libraries: progress bars are shown on terminals only, and some warnings are silenced."""

import logging as python_logging


def quiet_library_bars() -> None:
    """Shows progress bars of transformers ("Loading weights") on terminals only, and removes them at the end.

    For commands only, since it changes transformers for the whole process. Download bars are not affected.
    """
    from transformers.utils import logging

    on_terminals = {"disable": None, "leave": False}
    logging.set_tqdm_hook(lambda bar, arguments, options: bar(*arguments, **on_terminals | options))


def quiet_bitsandbytes() -> None:
    """Silences warnings that bitsandbytes (0.50.2) always prints. Call it before importing bitsandbytes.

    On a CPU with AVX512_BF16, the import warns that an optional package is missing. In int8, each layer warns in each
    forward pass that it casts its input.
    """
    python_logging.getLogger("bitsandbytes").setLevel(python_logging.ERROR)
