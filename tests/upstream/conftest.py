"""Puts transformers' own `tests` in front of ours, where the environment names the folder they were fetched to."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import yaml


FOLDER = os.environ.get("TRANSFORMERS_TESTS")
collect_ignore = ["stand_ins"]

if FOLDER is not None:
    sys.path.insert(0, FOLDER)
    # The differences are listed for a CPU; each test process has one thread, or they would wait for each other.
    os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def pytest_configure(config: pytest.Config) -> None:
    if FOLDER is None:
        return
    from tiny_models import write_tiny_models

    models = tempfile.mkdtemp()
    config.add_cleanup(lambda: shutil.rmtree(models))
    write_tiny_models(Path(models))
    os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = models


def pytest_report_header() -> list[str]:
    """Says where the tests are from, and which were not to be had."""
    if FOLDER is None:
        return []
    origin = yaml.safe_load((Path(FOLDER) / "origin.yaml").read_text(encoding="utf-8"))
    source = "the source archive" if origin["checkout"] is None else f"a checkout of {origin['checkout']}"
    missing = ", ".join(origin["missing"]) or "none"
    return [f"tests of transformers {origin['version']}, completed from {source}; missing, with stand-ins: {missing}"]
