"""Progress of long work, on a terminal and in a log; and libraries, whose bars are for terminals only."""

import contextlib
import logging as python_logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


SECONDS_BETWEEN_LINES = 10


@contextlib.contextmanager
def progress_bar(
    description: str,
    unit: str = "",
    total: float | None = None,
    show: bool = True,
    columns: tuple[ProgressColumn, ...] | None = None,
) -> Iterator[Callable[..., None]]:
    """Shows progress on standard error: a bar on a terminal, elsewhere a line every 10 seconds.

    The bar appears with the first update. Lines are printed from the start, also while nothing is counted yet.

    Args:
        description (`str`): name of the work.
        unit (`str`, *optional*): what is counted, in the plural.
        total (`float`, *optional*): number of units, if known.
        show (`bool`, *optional*, defaults to `True`): show anything.
        columns (`tuple`, *optional*): columns of the bar after the description; by default bar, count and time left.

    Yields:
        A function that takes `advance`, `completed`, `total` and `description`, as `rich.Progress.update` does.
    """
    console = Console(stderr=True)
    columns = columns or (BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    is_drawn, is_logged = show and console.is_terminal, show and not console.is_terminal
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        *columns,
        console=console,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # what is printed to a file meanwhile belongs there
        disable=not is_drawn,
    )
    task = bar.add_task(description, total=total)
    ended = threading.Event()
    thread = threading.Thread(target=_print_lines, args=(bar, unit, ended), daemon=True)

    def update(**fields: Any) -> None:
        bar.start()  # does nothing if it is drawn already
        bar.update(task, **fields)

    if is_logged:
        thread.start()
    try:
        yield update
    finally:
        bar.stop()
        ended.set()
        if is_logged:
            thread.join()


@contextlib.contextmanager
def show_busy(description: str) -> Iterator[None]:
    """Shows work without a count on standard error, as [`progress_bar`] does."""
    with progress_bar(description, columns=(SpinnerColumn(), TimeElapsedColumn())) as update:
        update()
        yield


def _print_lines(bar: Progress, unit: str, ended: threading.Event) -> None:
    """Prints the state of a task from a thread, since work may take longer than ten seconds between two updates."""
    while not ended.wait(SECONDS_BETWEEN_LINES):
        (task,) = bar.tasks
        of_total = f" of {task.total:,.0f}" if task.total else ""
        count = f": {task.completed:,.0f}{of_total} {unit}" if task.completed or of_total else ""
        bar.console.print(f"{task.description}{count}", highlight=False, markup=False, soft_wrap=True)


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


def quiet_torchao() -> None:
    """Silences warnings of the import of torchao (0.18), which transformers imports wherever it is installed.

    They are about kernels that do not fit the build of torch and are not used here, and about torch's own registry.
    """
    for name in ("torchao", "torch.utils._pytree"):
        python_logging.getLogger(name).setLevel(python_logging.ERROR)
