"""What a run lets its caller do on the main process, beside training: cards, scores and pictures lie in higher layers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


def _nothing(*_: Path) -> None:
    pass


@dataclass(frozen=True)
class Hooks:
    """Functions are called on the main process only, while the others wait.

    Args:
        before_training (`Sequence[str]`): lines that are printed with the facts of the run.
        complete_milestone (`Callable[[Path], None]`): given the folder of a milestone before it gets its name; adds files.
        after_milestone (`Callable[[Path, Path], None]`): given the run and the milestone.
        after_checkpoint (`Callable[[Path], None]`): given the run.
    """

    before_training: Sequence[str] = ()
    complete_milestone: Callable[[Path], None] = _nothing
    after_milestone: Callable[[Path, Path], None] = _nothing
    after_checkpoint: Callable[[Path], None] = _nothing
