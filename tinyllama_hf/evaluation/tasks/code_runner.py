"""Runs one untrusted Python program. [`code_sandbox`] starts this file, which imports only the standard library.

It reads a JSON object from standard input: `program`, the `nonce` to write to standard output if the program ends
without an exception, the empty `folder` for a new root, and `paths`, which the interpreter needs. Before the program
it writes `READY`, so that a system without namespaces is not mistaken for a failing program.

What the program cannot do: reach a network or a process outside, read or write files other than those of the
interpreter and of its own folder in memory, start a process or a thread, use more than 1 GiB of memory or 3 seconds of
CPU time.
"""

import ctypes
import json
import os
import sys
from typing import Any


READY = "ready\n"
CPU_SECONDS = 3
MEMORY_BYTES = 1 << 30
FILE_BYTES = 16 << 20
WORK = "/program-folder"
UNPRIVILEGED = 65534

# From linux/sched.h, sys/mount.h, linux/mount.h, sys/prctl.h and linux/capability.h.
_NEW_USER, _NEW_PID, _NEW_NET, _NEW_IPC, _NEW_UTS, _NEW_MOUNTS = (
    *(0x10000000, 0x20000000, 0x40000000),
    *(0x08000000, 0x04000000, 0x00020000),
)
_NOSUID, _NODEV, _BIND, _RECURSIVE, _PRIVATE = 2, 4, 4096, 16384, 1 << 18
_SYS_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000
_READ_ONLY_NOSUID_NODEV = 1 | 2 | 4
_SET_PARENT_DEATH_SIGNAL, _SET_NO_NEW_PRIVILEGES = 1, 38
_CAPABILITY_VERSION = 0x20080522


def run_request(request: dict[str, Any]) -> None:
    """Enters the namespaces, runs the program in a grandchild process, and exits after it."""
    results = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    try:
        _isolate(request["folder"], request["paths"])
    except OSError as error:
        os.write(results, f"{error.filename or 'namespaces'}: {error.strerror}\n".encode())
        os._exit(1)
    # The first process of a PID namespace ignores signals, so the program is the second. If the first ends, the kernel
    # kills all others.
    _wait_for(lambda: _wait_for(lambda: _execute(request["program"], request["nonce"], results)))
    os._exit(0)


def _wait_for(work: Any) -> None:
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    _call("prctl", _SET_PARENT_DEATH_SIGNAL, 9, 0, 0, 0)
    try:
        work()
    finally:
        os._exit(0)


def _isolate(folder: str, paths: list[str]) -> None:
    """Enters new namespaces, in which the root is a file system in memory with read-only views of `paths`."""
    user, group, is_root = os.getuid(), os.getgid(), os.geteuid() == 0
    # Root needs no user namespace to create the others, and must not have one: the limit on processes exempts root.
    _call("unshare", _NEW_PID | _NEW_NET | _NEW_IPC | _NEW_UTS | _NEW_MOUNTS | (0 if is_root else _NEW_USER))
    if not is_root:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _mount(None, "/", None, _RECURSIVE | _PRIVATE)
    _mount("tmpfs", folder, "tmpfs", _NOSUID | _NODEV, "size=32m,mode=0755")
    for path in paths:
        inside = folder + path
        if os.path.islink(path) and not os.path.lexists(inside):
            os.makedirs(os.path.dirname(inside), exist_ok=True)
            os.symlink(os.readlink(path), inside)
        elif os.path.isdir(path) and not os.path.exists(inside):
            os.makedirs(inside)
            _mount(path, inside, None, _BIND | _RECURSIVE)
            attributes = (ctypes.c_uint64 * 4)(_READ_ONLY_NOSUID_NODEV, 0, 0, 0)
            size = ctypes.sizeof(attributes)
            where = inside.encode()
            _call("syscall", _SYS_MOUNT_SETATTR, _AT_FDCWD, where, _AT_RECURSIVE, ctypes.byref(attributes), size)
    os.mkdir(folder + WORK)
    os.chmod(folder + WORK, 0o777)
    os.chroot(folder)
    os.chdir(WORK)
    if is_root:
        os.setgroups([])
        os.setresgid(UNPRIVILEGED, UNPRIVILEGED, UNPRIVILEGED)
        os.setresuid(UNPRIVILEGED, UNPRIVILEGED, UNPRIVILEGED)
    _call("capset", (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)())
    _call("prctl", _SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)


def _execute(program: str, nonce: str, results: int) -> None:
    import resource

    limits = {
        resource.RLIMIT_CPU: CPU_SECONDS,
        resource.RLIMIT_AS: MEMORY_BYTES,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,  # no process or thread can be started
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    os.write(results, READY.encode())
    try:
        exec(compile(program, "<program>", "exec"), {})  # with the same globals as in human-eval
    except BaseException as error:  # also SystemExit: a program that exits did not reach the end of its tests
        os.write(results, f"{type(error).__name__}: {error}"[:500].encode(errors="replace"))
    else:
        os.write(results, nonce.encode())


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    texts = [text.encode() if text else None for text in (source, target, kind, options)]
    _call("mount", *texts[:3], ctypes.c_ulong(flags), texts[3], name=target)


def _call(function: str, *arguments: Any, name: str = "") -> None:
    """Calls a function of the C library.

    Raises:
        OSError: if it fails.
    """
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"{function} {name}".strip())


if __name__ == "__main__":
    run_request(json.load(sys.stdin))
