"""Shared by all benchmarks: interleaved rounds, medians, and results with their provenance."""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tinyllama_hf import provenance
from tinyllama_hf.files import write_json
from tinyllama_hf.portable import portable


RESULTS = Path(__file__).parent / "results"


def interleaved(
    variants: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Returns the seconds of each variant in each round. Variants take turns, so other load affects all alike."""
    for variant in variants.values():  # the first call also allocates and selects kernels
        variant()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            began = clock()
            variant()
            seconds[name].append(clock() - began)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Returns the median of each variant's rounds."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def save(name: str, figures: Any) -> Path:
    """Writes `results/NAME.json`, with the provenance of the figures."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    write_json(path, {"figures": figures, "provenance": portable(provenance.collect())})
    return path
