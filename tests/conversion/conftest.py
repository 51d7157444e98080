"""Fetches other programs that read and write the same formats from the package index."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from filelock import FileLock


@pytest.fixture(scope="session")
def peer(request) -> Callable[..., Path]:
    """Installs packages into a separate folder, never into this environment.

    `peer("name==version", ...)` returns the folder for the `PYTHONPATH` of a subprocess. It is kept in pytest's cache.
    Dependencies are not installed. The test is skipped if a package is not available.
    """

    def install(*requirements: str) -> Path:
        name = hashlib.sha256(" ".join(requirements).encode()).hexdigest()[:12]
        folder = request.config.cache.mkdir("peers") / name
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _install(folder, requirements)
        return folder

    return install


def _install(folder: Path, requirements: Sequence[str]) -> None:
    temporary = folder.with_suffix(".tmp")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", temporary, "--upgrade"]
    done = subprocess.run([*command, *requirements], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the package index does not serve {', '.join(requirements)}: {done.stderr.strip()[-200:]}")
    temporary.rename(folder)


@pytest.fixture(scope="session")
def llama_cpp(peer, tmp_path_factory):
    """Runs llama.cpp on a file: ids of texts, ids of `"a"` with special tokens, continuations, and prompts.

    `lora` is the file of an adapter; `options` are fields of a completion.
    """
    folder = peer("xllamacpp==2026.10.11549")

    def run(model: Path, texts=(), prompts=(), conversations=(), lora: Path | None = None, **options):
        answer = tmp_path_factory.mktemp("answer") / "answer.json"
        request = {"model": str(model), "texts": list(texts), "prompts": list(prompts), "answer": str(answer)}
        request |= {"conversations": list(conversations), "lora": lora and str(lora), "options": options}
        done = subprocess.run(
            [sys.executable, Path(__file__).with_name("llama_cpp.py")],
            input=json.dumps(request), text=True, capture_output=True, timeout=600,
            env=os.environ | {"PYTHONPATH": str(folder)},
        )  # fmt: skip
        assert answer.is_file(), done.stderr[-2000:]
        return json.loads(answer.read_text())

    return run
