"""Pretraining speed on a CPU by how OpenMP's threads wait at barriers, alone and with one busy process on the machine.

    python benchmarks/openmp_waiting.py [--rounds 7] [--seconds 3] [--shapes nano 37M]

The variants are the default of OpenMP, `GOMP_SPINCOUNT` of 1,000 and 10,000, and `OMP_WAIT_POLICY=PASSIVE`. Each runs
the package's training step in a separate process, since OpenMP reads these variables once. The processes take turns,
and those that wait for theirs sleep. Run it on a machine that is otherwise idle.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


VARIANTS: dict[str, dict[str, str]] = {
    "default": {},
    "spin 1,000": {"GOMP_SPINCOUNT": "1000"},
    "spin 10,000": {"GOMP_SPINCOUNT": "10000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}
CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
BASELINE = "default"
PLACES = ("alone", "one busy process")


class Trainer:
    """A process that trains for some seconds whenever it is asked to."""

    def __init__(self, shape: str, environment: dict[str, str]):
        clean = {name: value for name, value in os.environ.items() if name not in CHOICES}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--train", shape],
            env=clean | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tokens_per_second(self, seconds: float) -> float:
        """Trains for at least that long."""
        assert self._process.stdin and self._process.stdout
        print(seconds, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the training process ended with status {self._process.wait()}")
        return float(answer)

    def end(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def train(shape: str) -> None:
    """Reads seconds from each line of standard input, trains for that long, and prints tokens per second."""
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "gpu")]
    from pretrain_step import LENGTH, MICRO, Ours, Text, step_settings

    step = Ours(shape, step_settings(shape) | {"accumulation": 1}, Text())
    for line in sys.stdin:
        steps, began = 0, time.perf_counter()
        while (passed := time.perf_counter() - began) < float(line):
            step.step()
            steps += 1
        print(steps * LENGTH * MICRO / passed, flush=True)


@contextlib.contextmanager
def busy_process() -> Iterator[None]:
    """Another process that uses one core all the time."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def measure(shape: str, rounds: int, seconds: float) -> dict[str, Any]:
    """Medians over the rounds, and their ratios to the default."""
    trainers = {name: Trainer(shape, environment) for name, environment in VARIANTS.items()}
    speeds: dict[str, dict[str, list[float]]] = {place: {name: [] for name in VARIANTS} for place in PLACES}
    try:
        for trainer in trainers.values():
            trainer.tokens_per_second(0.1)
        for _ in range(rounds):
            for place in PLACES:
                with busy_process() if place == PLACES[1] else contextlib.nullcontext():
                    for name, trainer in trainers.items():
                        speeds[place][name].append(trainer.tokens_per_second(seconds))
    finally:
        for trainer in trainers.values():
            trainer.end()
    found: dict[str, Any] = {}
    for place, by_variant in speeds.items():
        baseline = by_variant[BASELINE]
        found[place] = {
            name: {
                "tokens_per_second": round(statistics.median(values)),
                "ratio_to_default": round(statistics.median(v / b for v, b in zip(values, baseline, strict=True)), 3),
                "rounds": [round(value) for value in values],
            }
            for name, values in by_variant.items()
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a turn, at least")
    parser.add_argument("--shapes", nargs="+", choices=("nano", "37M"), default=["nano", "37M"])
    parser.add_argument("--train", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments.train)
        return
    figures = {}
    for shape in arguments.shapes:
        figures[shape] = measure(shape, arguments.rounds, arguments.seconds)
        for place, variants in figures[shape].items():
            for name, row in variants.items():
                speed, ratio = row["tokens_per_second"], row["ratio_to_default"]
                print(f"{shape:<5} {place:<16} {name:<11} {speed:>7,} tokens/s  {ratio:.2f} of the default")
    from common import save

    print(f"wrote {os.path.relpath(save('openmp_waiting', figures))}")


if __name__ == "__main__":
    main()
