"""Imports transformers' own `tests` in place of ours, from the folder that the environment names."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import xdist
import yaml


FOLDER = os.environ.get("TRANSFORMERS_TESTS")
collect_ignore = ["stand_ins"]

if FOLDER is not None:
    sys.path.insert(0, FOLDER)
    # The differences are listed for a CPU. Each test process has one thread, so that they do not compete.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def pytest_sessionstart(session: pytest.Session) -> None:
    """Writes the models of the pipeline tests, which are read at import."""
    if FOLDER is None or xdist.is_xdist_controller(session):
        return
    from tiny_models import write_tiny_models

    models = tempfile.mkdtemp()
    session.config.add_cleanup(lambda: shutil.rmtree(models))
    write_tiny_models(Path(models))
    os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = models


def pytest_report_header() -> list[str]:
    """Returns the versions of the tests and the missing files."""
    if FOLDER is None:
        return []
    origin = yaml.safe_load((Path(FOLDER) / "origin.yaml").read_text(encoding="utf-8"))
    checkout = "" if origin["checkout"] is None else f"; checkout of {origin['checkout']}"
    missing = ", ".join(origin["missing"]) or "nothing"
    return [
        f"tests of transformers {origin['version']}{checkout}; stand-ins, in neither archive nor checkout: {missing}"
    ]
