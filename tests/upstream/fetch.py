"""Fetches the tests of the installed release of transformers, and prints the folder they are in.

    python tests/upstream/fetch.py [--from CHECKOUT]

The release's source archive on the package index holds the testers of models, configurations, pipelines, training and
parallelism. It lacks those of generation and export, and `causal_lm_tester.py`: `--from` takes them from a checkout of
the release, or of a version next to it. If a file is in neither, a stand-in without tests replaces it.
"""

import argparse
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import yaml


STAND_INS = Path(__file__).parent / "stand_ins"
# Files that the testers import and the source archive does not contain.
NEEDED = sorted(path.relative_to(STAND_INS) for path in STAND_INS.rglob("*.py"))


def fetch(folder: Path, checkout: Path | None = None) -> None:
    """Writes `tests` and the files that they need into a folder, and replaces its contents.

    Args:
        folder (`Path`): folder to write; `origin.yaml` in it records the origin of the files.
        checkout (`Path`, *optional*): checkout of the release or of a version next to it.
    """
    version = importlib.metadata.version("transformers")
    of_checkout = None if checkout is None else _version_of(checkout)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "src").mkdir(parents=True)
    if checkout is not None:
        shutil.copytree(checkout / "tests", temporary / "tests", ignore=shutil.ignore_patterns("models"))
        shutil.copytree(checkout / "utils" / "test_module", temporary / "utils" / "test_module")
    if of_checkout != version:
        _unpack_archive(version, temporary)
    missing = [path for path in NEEDED if not (temporary / "tests" / path).exists()]
    for package in {path.parent for path in NEEDED}:
        (temporary / "tests" / package).mkdir(exist_ok=True)
        (temporary / "tests" / package / "__init__.py").touch()
    (temporary / "src" / "transformers").symlink_to(Path(importlib.util.find_spec("transformers").origin).parent)
    origin = {"version": version, "checkout": of_checkout, "missing": [path.as_posix() for path in missing]}
    (temporary / "origin.yaml").write_text(yaml.safe_dump(origin), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def add_stand_ins(folder: Path) -> None:
    """Adds the current stand-ins for files that a fetched folder lacks."""
    for path in yaml.safe_load((folder / "origin.yaml").read_text(encoding="utf-8"))["missing"]:
        shutil.copyfile(STAND_INS / path, folder / "tests" / path)


def _version_of(checkout: Path) -> str:
    source = checkout / "src" / "transformers" / "__init__.py"
    found = re.search(r'^__version__ = "(.+)"', source.read_text(encoding="utf-8"), re.M) if source.is_file() else None
    if found is None:
        sys.exit(
            f"--from {checkout}: is not a checkout of transformers; src/transformers/__init__.py names no version."
        )
    return found[1]


def _unpack_archive(version: str, folder: Path) -> None:
    """Downloads the source archive of a release and copies its tests over those of a folder."""
    with tempfile.TemporaryDirectory() as downloads:
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
            + ["--no-binary", "transformers", "--dest", downloads, f"transformers=={version}"],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"The source archive of transformers {version} is not available:\n{done.stderr.strip()[-2000:]}")
        with tarfile.open(next(Path(downloads).glob("*.tar.gz"))) as archive:
            archive.extractall(downloads, filter="data")
        shutil.copytree(Path(downloads) / f"transformers-{version}" / "tests", folder / "tests", dirs_exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="checkout", type=Path, help="a checkout of transformers; fetches again")
    checkout = parser.parse_args().checkout
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "tinyllama_hf" / f"transformers-{importlib.metadata.version('transformers')}-tests"
    if checkout is not None or not folder.is_dir():
        fetch(folder, checkout)
    add_stand_ins(folder)
    print(folder)


if __name__ == "__main__":
    main()
