"""Shared by the scripts for other programs. Standard library only, since each runs in its own environment."""

import datetime
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any


def provenance(*libraries: str) -> dict[str, Any]:
    """Returns the command, the machine and the versions of the installed libraries."""
    versions = {}
    for name in libraries:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "libraries": versions,
        "machine": {"platform": platform.platform(), "processor": processor(), "cores": os.cpu_count()},
    }


def processor() -> str:
    """Returns the name of the processor and its relevant vector extensions."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return platform.processor()
    lines = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
    lines = {key.strip(): value.strip() for key, value in lines.items()}
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile")
    flags = [flag for flag in wanted if flag in lines.get("flags", "").split()]
    return " ".join([lines.get("model name", "unknown"), *(["(" + ", ".join(flags) + ")"] if flags else [])])


def save(path: Path, figures: Any, *libraries: str) -> None:
    """Writes figures with their provenance and prints them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"figures": figures, "provenance": provenance(*libraries)}, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    print(text)


def megabytes(path: Path) -> float:
    """Size of a file or of all files in a folder, in units of 10^6 bytes."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return round(sum(file.stat().st_size for file in files) / 1e6, 2)
