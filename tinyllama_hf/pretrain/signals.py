"""Stops a run on SIGTERM or SIGINT: it finishes the step, writes a checkpoint and exits.

A second signal ends it at once. Signals within 3 s of the first count as the same request.
"""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeAlias

import torch
import torch.distributed as dist


# One request may arrive several times: Slurm and Ctrl-C signal every process of a job, and torch's launcher, which is
# one of them, forwards the signal to the others.
_ONE_REQUEST_SECONDS = 3.0


_Handler: TypeAlias = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None


class Stopped(RuntimeError):
    """The run was stopped by a signal after writing a checkpoint; the same command resumes it."""

    exit_status = 75  # EX_TEMPFAIL of sysexits.h: "the user is invited to try again later"


class StopRequests:
    """Records requests to stop. A context manager, which restores the previous signal handlers at its end.

    All processes agree after the same step, through a process group on the CPU, so that the queue of the accelerator
    is not waited for. A thread handles the second request, since Python calls a signal handler only when the main
    thread returns from C code, which may never happen if it waits for another process there.
    """

    def __init__(self) -> None:
        self._asked = 0
        self._before: dict[int, _Handler] = {}
        self._is_distributed = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if self._is_distributed else None

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is not threading.main_thread():
            return self  # Python allows signal handlers in the main thread only
        # Python's C-level handler runs at once, and writes the number of each signal here.
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
        # Ends the watcher, even if a forked process holds a copy of the socket.
        self._written.shutdown(socket.SHUT_RDWR)
        self._watcher.join()
        self._written.close()
        self._numbers.close()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._asked = self._asked or number

    def _watch(self) -> None:
        """Prints a message at the first request, and ends the process at a later one."""
        first_at = None
        while received := self._numbers.recv(1):
            if (number := received[0]) not in (signal.SIGTERM, signal.SIGINT):
                continue
            if first_at is None:
                first_at = time.monotonic()
                self._announce(number)
            elif time.monotonic() - first_at > _ONE_REQUEST_SECONDS:
                os._exit(128 + number)  # the exit status of a process ended by a signal

    def _announce(self, number: int) -> None:
        if self._is_distributed and dist.get_rank() > 0:
            return
        name = signal.Signals(number).name
        line = f"{name}: finishing the step and writing a checkpoint. A second signal ends the run at once.\n"
        with contextlib.suppress(OSError):  # the reader may be gone
            os.write(2, line.encode())

    def requested_signal(self) -> int:
        """The number of the signal that any process received, 0 for none; a collective call after each step."""
        if not self._is_distributed:
            return self._asked
        asked = torch.tensor(self._asked)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self._group)
        return int(asked)
