"""SIGTERM and SIGINT: the step is finished, a checkpoint written, and the run ends. A second signal ends it at once."""

import os
import signal
import threading
import time
from types import FrameType

import torch
import torch.distributed as dist


EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: "the user is invited to try again later"
# One request may arrive several times: Slurm and Ctrl-C reach every process of a job, and torch's launcher, which is one of
# them, passes what it got on to the others.
_ONE_REQUEST_SECONDS = 3.0


class Stopped(RuntimeError):
    """The run was asked to stop and has saved; the same command goes on with it."""


class StopRequests:
    """Whether any process of the run was asked to stop. A context manager: outside, signals mean what they meant before.

    Every process learns of it after the same step, through a process group of the CPUs, so that the accelerator's queue
    is never waited for.
    """

    def __init__(self) -> None:
        self._asked, self._asked_at = 0, 0.0
        self._before: dict[int, object] = {}
        self._is_distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if self._is_distributed else None

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is not threading.main_thread():
            return self  # Python lets only the main thread listen
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if not self._asked:
            self._asked, self._asked_at = number, time.monotonic()
        elif time.monotonic() - self._asked_at > _ONE_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def agreed(self) -> int:
        """The number of the signal that some process got, 0 for none; to be called after each step by all."""
        if not self._is_distributed:
            return self._asked
        asked = torch.tensor(self._asked)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self._group)
        return int(asked)
