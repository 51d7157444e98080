"""Pretrains a small Llama from a YAML recipe.

    accelerate launch --quiet recipes/pretrain.py RECIPE.yaml [section.key=value ...] [--overwrite] [--dry-run]

A run of about a minute on a CPU, in a folder that contains recipes/ (from `tinyllama-hf recipes copy recipes`):

    tinyllama-hf tokenizer train embedded:prose --vocab-size 1024 --output runs/micro/tokenizer
    tinyllama-hf prepare embedded:prose --tokenizer runs/micro/tokenizer --output runs/micro/data \\
        --validation-fraction 0.05
    accelerate launch --quiet recipes/pretrain.py recipes/pretrain/micro.yaml

The same command resumes a run that was stopped, killed or moved.

Exit status: 0 finished, 2 invalid input, 3 a loss that is not finite, 4 a failed write, 75 stopped by SIGTERM or
SIGINT after a checkpoint, 143 or 130 stopped at once by a second signal. After status 75, output_dir contains
stopped.json until the run resumes. Signals within 3 seconds of the first count as one request, since launchers forward
what a job has received already.

`accelerate launch` turns every failure into status 1; `--quiet` keeps it from printing its own traceback. With
one process it forwards no signals (1.15): send them to this script, or to all processes as Ctrl-C and Slurm do. With
several processes it forwards them and waits 30 seconds; set TORCH_ELASTIC_SHUTDOWN_TIMEOUT if a checkpoint takes
longer.
"""

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from shlex import quote

from tinyllama_hf_cli.loading import import_libraries
from tinyllama_hf_cli.openmp import let_threads_sleep
from tinyllama_hf_cli.optional_output import TrainingPicture, optional_output


def main() -> int:
    arguments = parse_arguments()
    let_threads_sleep()

    # Imported here, so that neither --help nor a mistake in the recipe has to wait for torch.
    from tinyllama_hf.errors import InputError
    from tinyllama_hf.pretrain.config import load_pretrain_config

    try:
        # Load the recipe.
        config = load_pretrain_config(arguments.recipe, arguments.overrides)
        scores_milestones = config.evaluate_at_milestones == "inline"
        if os.environ.get("RANK", "0") == "0":
            print("loading     libraries, data and model", flush=True)
        import_libraries()
        from tinyllama_hf.evaluation.series import check_can_score
        from tinyllama_hf.planning.run_plan import cost_lines, plan_run
        from tinyllama_hf.pretrain.checkpoints import FullDiskError
        from tinyllama_hf.pretrain.loop import Hooks, NonFiniteError, prepare_run, train_run
        from tinyllama_hf.pretrain.signals import Stopped
        from tinyllama_hf.progress import quiet_library_bars

        quiet_library_bars()
        # Check it against data and machine, and build the model; nothing is written yet.
        if scores_milestones and not arguments.overwrite:
            check_can_score(Path(config.output_dir), [source.path for source in config.data.sources])
        prepared = prepare_run(config, arguments.overwrite)
        prepared.print(*prepared.summary)
        # Print the plan, or train.
        if arguments.dry_run:
            processes, device = prepared.accelerator.num_processes, prepared.known_device()
            plan = plan_run(config, len(prepared.run.tokenizer), processes, device)
            prepared.print(*cost_lines(plan), *prepared.dry_run_lines())
            return 0
        picture = TrainingPicture() if find_spec("matplotlib") else None
        if not picture:
            prepared.print("pictures    none: matplotlib is not installed (pip install 'tinyllama_hf[report]')")
        hooks = Hooks(write_card, score_milestone if scores_milestones else None, picture)
        train_run(prepared, arguments.measure_peak, hooks)
        prepared.print(*next_commands(Path(config.output_dir)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        return 130
    except (NonFiniteError, FullDiskError, Stopped) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="YAML file; every key is explained in recipes/pretrain/micro.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the recipe")
    parser.add_argument(
        "--overwrite", action="store_true", help="remove the existing run in output_dir and start over"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, and exit")
    share = "measure the rate of matrix products at the start, and also log the share of it that training reaches"
    parser.add_argument("--measure-peak", action="store_true", help=share)
    return parser.parse_intermixed_args()


def next_commands(run: Path) -> list[str]:
    """What can be done with a finished run."""
    from tinyllama_hf.pretrain.milestones import list_milestones

    if not (milestones := list_milestones(run)):
        return []
    recipes = Path(sys.argv[0]).parent  # the folder that was launched, which may be a copy under another name
    paths = (milestones[-1], run, run / "report", recipes / "sft.py", recipes / "sft" / "full.yaml")
    last, name, page, script, recipe = (quote(str(path)) for path in paths)
    return [
        f"finished    {last}. Next, for example:",
        f"  tinyllama-hf generate {last} 'Once upon a time'",
        f"  tinyllama-hf eval text {name} --baselines",
        f"  tinyllama-hf report {name} --output {page}",
        f"  accelerate launch --quiet {script} {recipe} model.path={last}",
    ]


# Cards, scores and a picture are optional: `tinyllama-hf publish`, `eval` and `report` create them from a finished
# run. An error in one of them is printed, and training continues.


def write_card(folder: Path, name: str) -> None:
    """Adds the card to the folder of a milestone, which still has a temporary name."""
    from tinyllama_hf.files import write_text
    from tinyllama_hf.hub.card import milestone_card

    text = None
    with optional_output(f"{name}: no card", "`tinyllama-hf publish` writes one"):
        text = milestone_card(folder, name)
    if text is not None:
        write_text(folder / "README.md", text)  # outside of optional_output: a full disk ends the run


def score_milestone(run: Path, milestone: Path) -> None:
    """Scores a milestone in bits per byte."""
    from tinyllama_hf.evaluation.series import SCORES_FILE, score

    with optional_output(f"{milestone.name}: not scored", f"score it with `tinyllama-hf eval text {run}`"):
        scores = score([str(run)], output=run / SCORES_FILE, show_progress=False)
        row = next(row for row in scores.models if row.name == milestone.name)
        print(f"{row.bits_per_byte:.4f} bits per byte  {row.name}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
