"""Output of a training run that can be created later: an error in it is printed, and training continues."""

import contextlib
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tinyllama_hf.report.training import TrainingCurves


@contextlib.contextmanager
def optional_output(failure: str, instead: str) -> "Iterator[None]":
    """Prints an error with what failed, and what creates the output instead."""
    try:
        yield
    except Exception as error:
        from tinyllama_hf.errors import one_line

        print(f"{failure} ({one_line(error)}); training continues; {instead}", flush=True)


class TrainingPicture:
    """Draws `training.png` at each checkpoint. Keeps the metrics that it has read, so that each row is read once."""

    curves: "TrainingCurves | None" = None

    def __call__(self, run: "Path") -> None:
        with optional_output("training.png: not drawn", "the next checkpoint draws it again"):
            from tinyllama_hf.pretrain.milestones import list_milestones, read_record
            from tinyllama_hf.report.plots import training_panels
            from tinyllama_hf.report.training import TrainingCurves

            # Dropped after an error, since the last row may have been read in part.
            curves, self.curves = self.curves or TrainingCurves(run), None
            curves.refresh()
            tokens = [read_record(folder)["tokens"] for folder in list_milestones(run)]
            training_panels(curves, tokens, run.name, run / "training.png")
            self.curves = curves
