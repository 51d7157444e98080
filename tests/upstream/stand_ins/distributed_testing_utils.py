"""Processes that form one group on a CPU, under the names that the parallel testers import."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_distributed_backend() -> str:
    return "gloo"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    pass


def _start_rank_processes(function: Callable, args: tuple, nprocs: int) -> None:
    mp.spawn(function, args=args, nprocs=nprocs)


def run_distributed(world_size: int) -> Callable:
    """Runs each call of the decorated function in `world_size` processes, with the rank as first argument."""

    def decorate(function: Callable) -> Callable:
        def run(*args) -> None:
            with tempfile.TemporaryDirectory() as folder:
                rendezvous = (Path(folder) / "rendezvous").as_uri()
                _start_rank_processes(_run_in_group, (function, world_size, rendezvous, args), world_size)

        return run

    return decorate


def _run_in_group(rank: int, function: Callable, world_size: int, rendezvous: str, args: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    try:
        function(rank, *args)
    finally:
        dist.destroy_process_group()
