"""How torch's threads wait for each other on a CPU; OpenMP reads it from the environment when torch is imported."""

import os


# The number of checks, a few nanoseconds each, before a waiting thread sleeps. The default of GNU OpenMP is 300,000.
WAITING = {"GOMP_SPINCOUNT": "1000"}
CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def let_threads_sleep() -> None:
    """Makes waiting threads sleep soon, unless the environment already sets how they wait.

    Call it before torch is imported; child processes inherit the setting. A thread that spins keeps a core from the
    thread it waits for when other processes use the machine. Measured by benchmarks/openmp_waiting.py.
    """
    if not any(name in os.environ for name in CHOICES):
        os.environ.update(WAITING)
