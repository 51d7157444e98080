"""What `recipes/pretrain.py` does beside training: cards, scores and pictures, which lie in higher layers than the loop.

None of it is essential: all of it can be made again from what the run leaves (`tinyllama-hf eval`, `report`, `publish`). What
goes wrong here is said in one line, and training goes on.
"""

from pathlib import Path
from typing import Any


def hooks_of(config: Any, overwrite: bool = False) -> Any:
    """The hooks that a pretraining recipe asks for.

    Raises:
        InputError: if milestones are to be scored and could not be.
    """
    from tinyllama_hf.pretrain.hooks import Hooks

    functions: dict[str, Any] = {}
    if config.evaluate_at_milestones == "inline":
        _check_can_score(config, overwrite)
        functions["after_milestone"] = _score
    if _can_draw():
        functions["after_checkpoint"] = _Drawing()
    return Hooks(before_training=_announce(config), complete_milestone=_write_card, **functions)


def _check_can_score(config: Any, overwrite: bool) -> None:
    from tinyllama_hf.evaluation.series import check_can_score

    run = Path(config.output_dir)
    check_can_score(None if overwrite else run, [source.path for source in config.data.sources])


def _can_draw() -> bool:
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def _announce(config: Any) -> list[str]:
    """Lines for the start of a run."""
    lines = []
    if not _can_draw():
        lines.append("pictures    none: matplotlib is not installed (pip install 'tinyllama_hf[report]')")
    if config.evaluate_at_milestones == "watch":
        lines.append(f"scores      in another process: tinyllama-hf eval {config.output_dir} --watch")
    return lines


def _write_card(milestone: Path) -> None:
    """The card of a milestone that is being written; a disk that is full is full for the milestone too, and ends the run."""
    from tinyllama_hf import provenance
    from tinyllama_hf.hub.card import milestone_card

    name = provenance.read_json(milestone / "provenance.json")["name"]  # the folder has a temporary one yet
    try:
        text = milestone_card(milestone, name)
    except Exception as error:
        _go_on(f"{name}: no card", error, "`tinyllama-hf publish` writes one of its own")
        return
    provenance.write_text(milestone / "README.md", text)


def _score(run: Path, milestone: Path) -> None:
    """Bits per byte of the new milestone, by stock transformers on its folder."""
    from tinyllama_hf.evaluation.series import SCORES_FILE, score

    try:
        scores = score([str(run)], output=run / SCORES_FILE, show_progress=False)
        row = next(row for row in scores["models"] if row["name"] == milestone.name)
    except Exception as error:
        _go_on(f"{milestone.name}: not scored", error, f"score it: tinyllama-hf eval {run}")
        return
    print(f"{row['bits_per_byte']:.4f} bits per byte  {row['name']}", flush=True)


def _go_on(what: str, error: Exception, instead: str) -> None:
    from tinyllama_hf.errors import one_line

    print(f"{what} ({one_line(error)}); training goes on; {instead}", flush=True)


class _Drawing:
    """`training.png` in the run's folder; what it has read of the metrics it does not read again."""

    def __init__(self) -> None:
        self._curves: Any = None

    def __call__(self, run: Path) -> None:
        try:
            from tinyllama_hf.pretrain.milestones import list_milestones, read_record
            from tinyllama_hf.report.plots import training_panels
            from tinyllama_hf.report.training import TrainingCurves

            if self._curves is None:
                self._curves = TrainingCurves(run)
            self._curves.refresh()
            tokens = [read_record(folder)["tokens"] for folder in list_milestones(run)]
            training_panels(self._curves, tokens, run.name, run / "training.png")
        except Exception as error:
            self._curves = None  # what was read of the metrics may be half of a row
            _go_on("training.png: not drawn", error, "the next checkpoint draws it again")
