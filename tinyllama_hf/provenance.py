"""Where an artefact comes from: code, libraries, machine. Written beside everything that this package makes."""

import contextlib
import datetime
import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
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
    """Writes JSON under a temporary name and renames it, so that a reader never sees half a file."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file under a temporary name and renames it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """Gives a folder under a temporary name to write into, and renames it once everything lies there.

    After an exception nothing is left of the new folder, and what lay under the name lies there still.

    Args:
        folder (`Path`): where it is to lie.
        overwrite (`bool`, *optional*, defaults to `False`): replace what lies there; otherwise the folder must not exist
            or be empty.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if overwrite and folder.exists():
            replaced = folder.with_name(f".{folder.name}.replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(folder, replaced)
            os.replace(temporary, folder)
            shutil.rmtree(replaced)
        else:
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def synchronise(*paths: Path) -> None:
    """Waits until files, and the entries of folders, are on the disk and not only in its cache."""
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
