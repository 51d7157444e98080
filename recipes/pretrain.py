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

import sys
from collections.abc import Sequence

from tinyllama_hf_cli.scripts import training_script


def run(recipe: str, overrides: Sequence[str], overwrite: bool, dry_run: bool, measure_peak: bool) -> int:
    from tinyllama_hf.pretrain.config import load_config
    from tinyllama_hf.pretrain.disk import FullDiskError
    from tinyllama_hf.pretrain.loop import NonFiniteError, pretrain
    from tinyllama_hf.pretrain.signals import EXIT_STATUS, Stopped
    from tinyllama_hf_cli.hooks import hooks_of

    statuses = {NonFiniteError: 3, FullDiskError: 4, Stopped: EXIT_STATUS}
    try:
        config = load_config(recipe, overrides)
        pretrain(config, overwrite, dry_run, measure_peak, hooks_of(config, overwrite))
    except tuple(statuses) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return statuses[type(error)]
    return 0


def main() -> int:
    overwrites = "remove the run that lies in output_dir"
    interrupted = "what was written is whole, the same command goes on after the last checkpoint"
    flags = {
        "--measure-peak": "also log the share of the matrix rate that is measured at the start, in the recipe's precision"
    }
    return training_script("pretrain.py", __doc__, overwrites, interrupted, run, flags)


if __name__ == "__main__":
    sys.exit(main())
