"""SIGTERM and SIGINT: the step is finished, a checkpoint written, and the run ends.

A second one ends it at once; what arrives within 3 s of the first is the first, arriving again.
"""

import contextlib
import os
import signal
import socket
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
    is never waited for. A second request is heeded by a thread of its own: Python calls a handler only where the main
    thread comes back from C code, which may be never if it waits for another process there.
    """

    def __init__(self) -> None:
        self._asked = 0
        self._before: dict[int, object] = {}
        self._is_distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if self._is_distributed else None

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is not threading.main_thread():
            return self  # Python lets only the main thread listen
        # The C part of Python's handlers, which runs at once, writes the number of each signal here.
        self._numbers, self._written = socket.socketpair()
        self._written.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, name="stop requests", daemon=True)
        self._watcher.start()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._written.shutdown(socket.SHUT_RDWR)  # ends the watcher, even if a forked process holds a copy
        self._watcher.join()
        self._written.close()
        self._numbers.close()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._asked = self._asked or number

    def _watch(self) -> None:
        """Announces the first request, and ends the process at a later one."""
        first_at = None
        while received := self._numbers.recv(1):
            if (number := received[0]) not in (signal.SIGTERM, signal.SIGINT):
                continue
            if first_at is None:
                first_at = time.monotonic()
                self._announce(number)
            elif time.monotonic() - first_at > _ONE_REQUEST_SECONDS:
                os._exit(128 + number)  # as a shell names the death by a signal

    def _announce(self, number: int) -> None:
        if self._is_distributed and dist.get_rank() > 0:
            return
        line = (
            f"{signal.Signals(number).name}: finishing the step and writing a checkpoint; a second one ends at once\n"
        )
        with contextlib.suppress(OSError):  # nobody may be left who reads
            os.write(2, line.encode())

    def agreed(self) -> int:
        """The number of the signal that some process got, 0 for none; to be called after each step by all."""
        if not self._is_distributed:
            return self._asked
        asked = torch.tensor(self._asked)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self._group)
        return int(asked)
