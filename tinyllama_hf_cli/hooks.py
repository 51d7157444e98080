"""What `recipes/pretrain.py` does beside training: cards, scores and pictures, which lie in higher layers than the loop."""

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
    from tinyllama_hf.evaluation.ladder import check_can_score

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
    from tinyllama_hf import provenance
    from tinyllama_hf.hub.card import milestone_card

    name = provenance.read_json(milestone / "provenance.json")["name"]
    provenance.write_text(milestone / "README.md", milestone_card(milestone, name))


def _score(run: Path, milestone: Path) -> None:
    """Bits per byte of the new milestone, by stock transformers on its folder. Training goes on whatever becomes of it."""
    import torch

    from tinyllama_hf.errors import InputError
    from tinyllama_hf.evaluation.ladder import SCORES_FILE, score

    try:
        scores = score([str(run)], output=run / SCORES_FILE, show_progress=False)
    except (InputError, OSError, torch.OutOfMemoryError) as error:
        print(
            f"{milestone.name}: not scored ({error}); training goes on; score it: tinyllama-hf eval {run}", flush=True
        )
        return
    row = next(row for row in scores["models"] if row["name"] == milestone.name)
    print(f"{row['bits_per_byte']:.4f} bits per byte  {row['name']}", flush=True)


class _Drawing:
    """`training.png` in the run's folder; what it has read of the metrics it does not read again."""

    def __init__(self) -> None:
        self._curves: Any = None

    def __call__(self, run: Path) -> None:
        from tinyllama_hf.pretrain.milestones import list_milestones, read_record
        from tinyllama_hf.report.plots import training_panels
        from tinyllama_hf.report.training import TrainingCurves

        try:
            if self._curves is None:
                self._curves = TrainingCurves(run)
            self._curves.refresh()
            tokens = [read_record(folder)["tokens"] for folder in list_milestones(run)]
            training_panels(self._curves, tokens, run.name, run / "training.png")
        except OSError as error:
            print(f"training.png: not drawn ({error}); training goes on", flush=True)
