"""Pretrains a small Llama from a YAML recipe.

    accelerate launch recipes/pretrain.py RECIPE.yaml [section.key=value ...] [--overwrite] [--dry-run]

In about a minute on a CPU, from a folder that holds recipes/ (`tinyllama-hf recipes copy recipes` writes it):

    tinyllama-hf tokenizer train embedded:prose --vocab-size 1024 --output runs/micro/tokenizer
    tinyllama-hf prepare embedded:prose --tokenizer runs/micro/tokenizer --output runs/micro/data --validation-fraction 0.05
    accelerate launch recipes/pretrain.py recipes/pretrain/micro.yaml

The same command goes on with a run that was stopped, killed or moved. Exit status: 0 finished, 2 bad input, 3 a loss that
is not finite, 4 a file that could not be written, 75 stopped by SIGTERM or SIGINT after saving, which also leaves a
stopped.json in output_dir until the run goes on. What arrives within 3 seconds of such a signal is the same request, since
launchers pass on what a job was sent already; a second one after that stops at once (143 or 130).
`accelerate launch` turns any of them into 1; `--quiet` keeps it from adding a traceback of its own. It passes no signal on
to a single process (1.15): send it to this script, or to all processes as Ctrl-C and Slurm do. To several processes it does,
and gives them 30 seconds, or TORCH_ELASTIC_SHUTDOWN_TIMEOUT: set it to more where a checkpoint takes longer.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path


def main() -> int:
    arguments = parse_arguments()

    # Imported here, so that --help needs no torch.
    from tinyllama_hf.errors import InputError
    from tinyllama_hf.evaluation.series import check_can_score
    from tinyllama_hf.planning.run_plan import costs, plan
    from tinyllama_hf.pretrain.checkpoints import FullDiskError
    from tinyllama_hf.pretrain.config import load_config
    from tinyllama_hf.pretrain.loop import Hooks, NonFiniteError, prepare_run, train_run
    from tinyllama_hf.pretrain.signals import EXIT_STATUS, Stopped
    from tinyllama_hf.progress import quiet_library_bars

    quiet_library_bars()
    stops = {NonFiniteError: 3, FullDiskError: 4, Stopped: EXIT_STATUS}
    try:
        # Load the recipe, check it against data and machine, and build the model; nothing is written yet.
        config = load_config(arguments.recipe, arguments.overrides)
        scores_milestones = config.evaluate_at_milestones == "inline"
        if scores_milestones:
            run_folder = None if arguments.overwrite else Path(config.output_dir)
            check_can_score(run_folder, [source.path for source in config.data.sources])
        prepared = prepare_run(config, arguments.overwrite)
        prepared.print(*prepared.summary)
        # Say what it would take and stop, or train.
        if arguments.dry_run:
            planned = plan(
                config, len(prepared.run.tokenizer), prepared.accelerator.num_processes, prepared.known_device()
            )
            prepared.print(*costs(planned), *prepared.dry_run_lines())
            return 0
        can_draw = find_spec("matplotlib") is not None
        if not can_draw:
            prepared.print("pictures    none: matplotlib is not installed (pip install 'tinyllama_hf[report]')")
        hooks = Hooks(
            write_card, score_milestone if scores_milestones else None, TrainingPicture() if can_draw else None
        )
        train_run(prepared, arguments.measure_peak, hooks)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except tuple(stops) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return stops[type(error)]
    except KeyboardInterrupt:
        after = "what was written is whole, the same command goes on after the last checkpoint"
        print(f"interrupted; {after}", file=sys.stderr)
        return 130
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="YAML file; every key is explained in recipes/pretrain/micro.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the recipe")
    parser.add_argument("--overwrite", action="store_true", help="remove the run that lies in output_dir")
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what would happen, and stop")
    share = "also log the share of the matrix rate that is measured at the start, in the recipe's precision"
    parser.add_argument("--measure-peak", action="store_true", help=share)
    return parser.parse_intermixed_args()


# Cards, scores and a picture are not essential: `tinyllama-hf publish`, `eval` and `report` make all of it from what the run
# leaves. An error in one of them is printed, and training goes on.


@contextlib.contextmanager
def not_essential(failure: str, instead: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        from tinyllama_hf.errors import one_line

        print(f"{failure} ({one_line(error)}); training continues; {instead}", flush=True)


def write_card(milestone: Path) -> None:
    """Adds the card to a milestone that is being written, under a temporary name."""
    from tinyllama_hf.files import read_json, write_text
    from tinyllama_hf.hub.card import milestone_card

    name, text = read_json(milestone / "provenance.json")["name"], None
    with not_essential(f"{name}: no card", "`tinyllama-hf publish` writes one of its own"):
        text = milestone_card(milestone, name)
    if text is not None:
        write_text(milestone / "README.md", text)  # without room for it, the milestone has none either


def score_milestone(run: Path, milestone: Path) -> None:
    """Scores a milestone in bits per byte, by stock transformers on its folder."""
    from tinyllama_hf.evaluation.series import SCORES_FILE, score

    with not_essential(f"{milestone.name}: not scored", f"score it: tinyllama-hf eval {run}"):
        scores = score([str(run)], output=run / SCORES_FILE, show_progress=False)
        row = next(row for row in scores["models"] if row["name"] == milestone.name)
        print(f"{row['bits_per_byte']:.4f} bits per byte  {row['name']}", flush=True)


class TrainingPicture:
    """Draws `training.png` at each checkpoint; what it has read of the metrics it does not read again."""

    def __init__(self) -> None:
        self.curves = None

    def __call__(self, run: Path) -> None:
        with not_essential("training.png: not drawn", "the next checkpoint draws it again"):
            from tinyllama_hf.pretrain.milestones import list_milestones, read_record
            from tinyllama_hf.report.plots import training_panels
            from tinyllama_hf.report.training import TrainingCurves

            # Kept only once it is drawn: after an error, what was read may be half of a row.
            curves, self.curves = self.curves or TrainingCurves(run), None
            curves.refresh()
            tokens = [read_record(folder)["tokens"] for folder in list_milestones(run)]
            training_panels(curves, tokens, run.name, run / "training.png")
            self.curves = curves


if __name__ == "__main__":
    sys.exit(main())
