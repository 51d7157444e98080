"""Runs Python programs written by a model, each in a separate process with limits and without network access.

[`code_runner`] lists what a program cannot do. Not prevented: it can read the interpreter's own folders, and a program
written for the purpose could fake its success, since tests and program share a process, as in human-eval.
"""

import dataclasses
import json
import os
import secrets
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ...errors import InputError
from .code_runner import CPU_SECONDS, READY, WORK


# Longer than the limit on CPU time, since other processes may hold the CPU.
WALL_SECONDS = 10
_SHOWN_BYTES = 1000
_SYSTEM_PATHS = ("/usr", "/lib", "/lib64", "/bin")
_PROBE = """
import os, socket
for reach in (
    lambda: socket.create_connection(("127.0.0.1", {port}), timeout=1),
    lambda: os.fork(),
    lambda: open({file!r}, "a"),
    lambda: os.kill({process}, 0),
):
    try:
        reach()
    except OSError:
        continue
    raise RuntimeError("reached something outside")
"""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Whether a program ended without an exception, and if not, why."""

    passed: bool
    reason: str


def run_programs(programs: Sequence[str]) -> list[Outcome]:
    """Runs programs in parallel and returns their outcomes, in the same order.

    Raises:
        InputError: if the system does not provide the namespaces.
    """
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(run_program, programs))


def run_program(program: str) -> Outcome:
    """Runs one program: at most 3 seconds of CPU time, 10 seconds in total, 1 GiB of memory.

    Raises:
        InputError: if the system does not provide the namespaces.
    """
    nonce = secrets.token_hex()
    runner = Path(__file__).with_name("code_runner.py")
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as results:
        request = {"program": program, "nonce": nonce, "folder": folder, "paths": _interpreter_paths()}
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(runner)],
            stdin=subprocess.PIPE,
            stdout=results,
            stderr=subprocess.DEVNULL,
            env={"PATH": "/usr/bin:/bin", "HOME": WORK, "LANG": "C.UTF-8", "OPENBLAS_NUM_THREADS": "1"},
            cwd=folder,
            start_new_session=True,  # Ctrl-C goes to this process, which then kills the other one
        )
        is_late = False
        try:
            process.communicate(json.dumps(request).encode(), timeout=WALL_SECONDS)
        except subprocess.TimeoutExpired:
            is_late = True
        finally:
            process.kill()
            process.wait()
        results.seek(0)
        answer = results.read(len(READY) + _SHOWN_BYTES).decode(errors="replace")
    if not answer.startswith(READY):
        raise _refusal(answer.strip() or f"status {process.returncode}")
    answer = answer.removeprefix(READY)
    if answer == nonce:
        return Outcome(True, "passed")
    limits = f"ended early, or stopped after {WALL_SECONDS if is_late else CPU_SECONDS} seconds"
    return Outcome(False, " ".join(answer.split()) or limits)


def check_sandbox() -> None:
    """Tries to reach a network, a file and a process from a program.

    Raises:
        InputError: if the system does not provide the namespaces, or the program reaches one of these.
    """
    if sys.platform != "linux":
        raise _refusal(f"this is {sys.platform}")
    with socket.create_server(("127.0.0.1", 0)) as server, tempfile.NamedTemporaryFile() as file:
        values: dict[str, Any] = {"port": server.getsockname()[1], "file": file.name, "process": os.getpid()}
        outcome = run_program(_PROBE.format(**values))
        if not outcome.passed:
            raise _refusal(outcome.reason)


def _interpreter_paths() -> list[str]:
    """Returns the folders that the interpreter loads modules and libraries from, outer ones first."""
    own = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, sysconfig.get_path("stdlib")}
    paths = {*own, *map(os.path.realpath, own)} - {"/"}
    return [*_SYSTEM_PATHS, *sorted(paths, key=len)]


def _refusal(reason: str) -> InputError:
    return InputError(
        f"--run-code: this system cannot isolate the model's code ({reason}). That needs Linux 5.12 or newer with "
        "unprivileged user namespaces, which containers often forbid. Leave out the tasks that run code"
    )
