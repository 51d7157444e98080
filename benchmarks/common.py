"""What every benchmark shares: interleaved rounds, ratios of medians, results with their provenance."""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tinyllama_hf import provenance
from tinyllama_hf.files import write_json


RESULTS = Path(__file__).parent / "results"


def interleaved(
    variants: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each variant in each round, one variant after the other, so that a busy neighbour meets all of them."""
    for variant in variants.values():  # the first call pays for allocation and for choosing kernels
        variant()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            began = clock()
            variant()
            seconds[name].append(clock() - began)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Median of each variant's rounds."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def save(name: str, figures: Any) -> Path:
    """Writes `results/NAME.json` with everything that says where the figures come from."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    write_json(path, {"figures": figures, "provenance": provenance.collect()})
    return path
