"""Provenance of everything that this package writes: code, libraries and machine."""

import datetime
import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any


_LIBRARIES = (
    *("torch", "transformers", "tokenizers", "accelerate", "datatrove", "trl", "peft", "bitsandbytes", "lm_eval"),
    *("evaluate", "huggingface_hub", "numpy", "compressed-tensors"),
)


def collect(**extra: Any) -> dict[str, Any]:
    """Returns a record of this process that can be written as JSON, with `extra` added."""
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "code": code_version(),
        "python": platform.python_version(),
        "libraries": {name: version for name in _LIBRARIES if (version := _version(name))},
        "machine": machine(),
        **extra,
    }


@functools.cache
def code_version() -> dict[str, str | bool | None]:
    """Returns the package's version and, in a clone, its commit and whether files were modified."""
    version: dict[str, str | bool | None] = {"tinyllama_hf": _version("tinyllama_hf")}
    root = Path(__file__).parents[1]
    if (root / ".git").exists():
        version["commit"] = _git(root, "rev-parse", "HEAD")
        changes = _git(root, "status", "--porcelain", "--untracked-files=no")
        version["modified"] = None if changes is None else bool(changes)
    return version


def _git(root: Path, *arguments: str) -> str | None:
    """Returns the output of a git command, or `None` if git is missing or fails."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@functools.cache
def machine() -> dict[str, Any]:
    """Returns processor, cores and, if torch is already imported, threads and accelerators."""
    record: dict[str, Any] = {"platform": platform.platform(), "processor": processor_name(), "cores": os.cpu_count()}
    torch = sys.modules.get("torch")  # the provenance of a dataset should not import torch
    if torch is not None:
        record["threads"] = torch.get_num_threads()
        record["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
        record["accelerators"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return record


def fingerprint(value: Any) -> str:
    """Returns the SHA-256 of a value as JSON, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's contents."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weight_hashes(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of the weight files in a folder, by name."""
    files = sorted(path for kind in ("safetensors", "bin") for path in folder.glob(f"*.{kind}"))
    return {file.name: file_sha256(file) for file in files}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def processor_name() -> str:
    """Returns the name of the machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
