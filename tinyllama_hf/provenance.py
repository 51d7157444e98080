"""Where an artefact comes from: code, libraries, machine. Written beside everything that this package makes."""

import contextlib
import datetime
import fcntl
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from .errors import InputError


_LIBRARIES = ("torch", "transformers", "tokenizers", "accelerate", "datatrove", "trl", "peft", "bitsandbytes", "lm_eval",
              "evaluate", "huggingface_hub", "numpy")  # fmt: skip


def collect(**extra: Any) -> dict[str, Any]:
    """Returns a JSON-ready record of this process; `extra` is added as it is."""
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "code": code_version(),
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in _LIBRARIES if _version(name)},
        "machine": machine(),
        **extra,
    }


@functools.cache
def code_version() -> dict[str, Any]:
    """The package's version and, in a clone, its commit and whether files differ from it."""
    version: dict[str, Any] = {"tinyllama_hf": _version("tinyllama_hf")}
    root = Path(__file__).parents[1]
    if (root / ".git").exists():
        version["commit"] = _git(root, "rev-parse", "HEAD")
        changes = _git(root, "status", "--porcelain", "--untracked-files=no")
        version["modified"] = None if changes is None else bool(changes)
    return version


def _git(root: Path, *arguments: str) -> str | None:
    """What a git command prints, `None` where there is no git or it refuses the folder."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@functools.cache
def machine() -> dict[str, Any]:
    """Processor, cores, accelerator where torch is loaded and sees one."""
    record: dict[str, Any] = {"platform": platform.platform(), "processor": _processor(), "cores": os.cpu_count()}
    torch = sys.modules.get("torch")  # provenance of a data set must not pay for torch
    if torch is not None:
        record["threads"] = torch.get_num_threads()
        record["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
        record["accelerators"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return record


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON-ready value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Writes JSON as [`write_text`] writes text."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file that is never seen in parts, by a reader or after a power cut: the old text, or the new one.

    It is written under a temporary name, put on the disk, and renamed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        replace_file(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_file(new: Path, path: Path) -> None:
    """Gives a complete file its name, and returns once contents and name are on the disk."""
    synchronise(new)  # before the rename, or a power cut could leave the name with no contents
    os.replace(new, path)
    synchronise(path.parent)


@contextlib.contextmanager
def new_folder(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """Gives a folder under a temporary name to write into; it gets its own name once everything is on the disk.

    After an exception the new folder is removed and an old one is unchanged. Processes that write to one name do not
    touch each other's work. What a killed process left is removed, or restored, by the next call for the name.

    Args:
        folder (`Path`): the name.
        overwrite (`bool`, *optional*, defaults to `False`): replace a folder of that name; otherwise it must not exist or
            be empty.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(folder)
    unseen = folder.with_name(f".{uuid.uuid4().hex}")
    unseen.mkdir()
    try:
        with _held(unseen):  # before it has a name that other processes clear
            temporary = _beside(folder, "tmp")
            os.replace(unseen, temporary)
            try:
                yield temporary
                replace_folder(temporary, folder, overwrite)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    finally:
        shutil.rmtree(unseen, ignore_errors=True)


def replace_folder(new: Path, folder: Path, overwrite: bool = True) -> None:
    """Gives a complete folder its name, and returns once contents and name are on the disk.

    Args:
        new (`Path`): the complete folder, on the same file system.
        folder (`Path`): the name.
        overwrite (`bool`, *optional*, defaults to `True`): replace a folder of that name.
    """
    synchronise(*new.rglob("*"), new)
    old = _beside(folder, "replaced")
    with _held(folder) if overwrite and folder.exists() else contextlib.nullcontext():
        try:
            if overwrite and folder.exists():
                os.replace(folder, old)
            os.replace(new, folder)
        except BaseException:
            if old.exists() and not folder.exists():
                os.replace(old, folder)
            raise
        synchronise(folder.parent)
        if old.exists():
            shutil.rmtree(old)


def _beside(folder: Path, kind: str) -> Path:
    """An unused name for a folder next to another."""
    return folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.{kind}")


def _clear_abandoned(folder: Path) -> None:
    """Removes what killed processes left next to a folder; a folder that was only set aside gets its name back."""
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}\.(tmp|replaced)")
    for path in folder.parent.iterdir():
        if not pattern.fullmatch(path.name):
            continue
        with contextlib.suppress(FileNotFoundError), _held(path) as is_abandoned:
            if is_abandoned and path.suffix == ".replaced" and not folder.exists():
                os.replace(path, folder)
            elif is_abandoned:
                shutil.rmtree(path)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Keeps `_clear_abandoned` of other processes from a folder, until the end or the death of this one.

    Gives `False` where another process holds it, and on file systems without locks, on which nothing is cleared.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_held = True
        except OSError:
            is_held = False
        yield is_held
    finally:
        os.close(descriptor)


def synchronise(*paths: Path) -> None:
    """Waits until the contents of files, and the entries of folders, are on the disk and not only in its cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        InputError: if it is not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    # No JSON; not UTF-8; a number of more digits than Python converts; brackets deeper than its stack.
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged, not valid JSON ({error}); fetch or make it again") from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's contents."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
