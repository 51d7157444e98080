"""Prepares a data recipe on a Slurm cluster: an array job of one task per file, and a job that finishes the data set.

    python recipes/slurm/prepare.py recipes/data/slimpajama.yaml [key=value ...] --partition cpu --time 08:00:00 \\
        [--jobs 200] [--max-array-size 1001] [--cpus-per-task 2] [--env ". .venv/bin/activate"] [--dry-run]

It runs the pipeline of `tinyllama-hf prepare` with datatrove's Slurm executor. Tasks that either of them has completed
are not repeated. Sources and output must be on a file system that every node can reach. If tasks fail, run the same
command again.
"""

import argparse
import shlex
import subprocess
import sys
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from tinyllama_hf.data.prepare import Preparation


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="YAML file of recipes/data")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replaces a value of the recipe")
    parser.add_argument("--partition", required=True)
    parser.add_argument("--time", required=True, help="time limit of a task, in Slurm's format")
    parser.add_argument("--jobs", type=int, default=-1, help="tasks that run at the same time; default: no limit")
    parser.add_argument(
        "--max-array-size", type=int, default=1001, help="MaxArraySize of the cluster, from `scontrol show config`"
    )
    parser.add_argument("--cpus-per-task", type=int, default=2)
    parser.add_argument("--env", default=":", help="shell command that makes `tinyllama-hf` available on a node")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print what would be submitted, and exit"
    )
    arguments = parser.parse_intermixed_args()

    from tinyllama_hf.data.config import load_prepare_config
    from tinyllama_hf.data.prepare import plan_preparation
    from tinyllama_hf.errors import InputError

    try:
        preparation = plan_preparation(**load_prepare_config(arguments.recipe, arguments.overrides).model_dump())
        if preparation.is_finished:
            print(f"{preparation.output}: is already finished")
            return 0
        print(
            f"{preparation.source.num_tasks} task(s) on partition {arguments.partition} -> {preparation.output}",
            flush=True,
        )
        if not arguments.dry_run:
            submit(preparation, arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def submit(preparation: "Preparation", arguments: argparse.Namespace) -> None:
    """Submits the tasks and, after all of them, the job that counts and writes `dataset.json`."""
    from datatrove.executor import SlurmPipelineExecutor

    from tinyllama_hf.data.pipeline import PrepareTask
    from tinyllama_hf.data.prepare import write_request
    from tinyllama_hf.data.tasks import logging_folder

    write_request(preparation)
    output = preparation.output.absolute()
    jobs: list[str] = []

    def job_number(printed: str) -> str:
        jobs.append(printed.split()[-1])
        return jobs[-1]

    executor = SlurmPipelineExecutor(
        pipeline=[PrepareTask(preparation.source, output, preparation.request)],
        tasks=preparation.source.num_tasks,
        time=arguments.time,
        partition=arguments.partition,
        cpus_per_task=arguments.cpus_per_task,
        workers=arguments.jobs,
        max_array_size=arguments.max_array_size,
        job_id_retriever=job_number,
        sbatch_args={"kill-on-invalid-dep": "yes"},  # otherwise jobs wait forever for a task that failed
        job_name="tinyllama-prepare",
        qos="",
        env_command=arguments.env,
        logging_dir=logging_folder(output),
    )
    executor.run()
    # After all tasks, the command only has to count. Every array starts even if the previous one failed, so this job
    # depends on each of them, but not on the last job of datatrove, which merges statistics that are not used.
    finish = shlex.join(["tinyllama-hf", "prepare", arguments.recipe, *arguments.overrides])
    after = [f"--dependency=afterok:{':'.join(jobs[:-1])}", "--kill-on-invalid-dep=yes"] if jobs else []
    command = [
        "sbatch",
        *after,
        f"--partition={arguments.partition}",
        f"--time={arguments.time}",
        "--job-name=tinyllama-finish",
        f"--wrap={arguments.env}; {finish}",
    ]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main())
