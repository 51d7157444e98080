"""The values of the keys that a recipe leaves out and that follow from others. Other defaults are in `config.py`."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..presets import TRAINED_WITH
from ..recipe import parse_count
from ..released import read_llama_fields


_MIN_STEPS = 500
_LEAST_TOKENS_PER_STEP = 2**11  # with fewer, a small model spends most of its time in the optimizer
_MOST_TOKENS_PER_STEP = 2**21  # of TinyLlama
_CONTINUED = (2048, 1e-4)  # a trained model needs no more than a quarter of the rate of a new one


def fill_in(recipe: dict[str, Any], name: str) -> None:
    """Adds the keys that a recipe leaves out, by the rules of docs/recipes.md.

    Values of a wrong type are left to the schema, which reports them.

    Args:
        recipe (`dict`): the contents of the file; changed in place.
        name (`str`): of the file, without its ending.
    """
    model, data, schedule, training, checkpoints, validation = (
        _section(recipe, key) for key in ("model", "data", "schedule", "training", "checkpoints", "validation")
    )
    recipe.setdefault("output_dir", f"runs/{name}")
    length, rate = _trained_with(model)
    length = _positive(data.setdefault("sequence_length", length), length)
    _fill_sources(data)

    total = _positive(training.get("total_tokens"), 10**9)
    step = _tokens_per_step(total, length)
    step = _positive(training.setdefault("tokens_per_step", step), step)
    training.setdefault("micro_batch_size", next(size for size in (8, 4, 2, 1) if step // length % size == 0))

    kind = schedule.setdefault("name", "cosine")
    rate = _positive(schedule.setdefault("peak", rate), rate)
    schedule.setdefault("floor", None if kind == "constant" else float(f"{rate / 10:.6g}"))
    schedule.setdefault("warmup_tokens", min(total // 20, 2000 * step))
    schedule.setdefault("decay_tokens", max(total // 10, 1) if kind == "wsd" else None)

    checkpoints.setdefault("every_tokens", max(min(total // 20, 5000 * step), step))
    validation.setdefault("every_tokens", max(min(total // 20, 1000 * step), step))
    validation.setdefault("max_tokens", max(min(total // 100, 2**21), length))


def _section(recipe: dict[str, Any], name: str) -> dict[str, Any]:
    if recipe.get(name) is None:
        recipe[name] = {}
    section = recipe[name]
    return section if isinstance(section, dict) else {}


def _positive(value: Any, default: Any) -> Any:
    """Returns the value if it is a number above 0 that fits in 64 bits."""
    for read in (float, parse_count):  # YAML 1.1 reads 1e-3 as text, which the schema accepts
        with contextlib.suppress(TypeError, ValueError):
            number = float(read(value))
            break
    else:
        return default
    if not 0 < number < 2**64:
        return default
    return int(number) if number.is_integer() else number


def _trained_with(model: Mapping[str, Any]) -> tuple[int, float]:
    preset, initial = model.get("preset"), model.get("init_from")
    if isinstance(preset, str) and preset in TRAINED_WITH:
        return TRAINED_WITH[preset]
    length, rate = _CONTINUED
    if isinstance(initial, str) and (Path(initial) / "config.json").is_file():
        length = min(length, read_llama_fields(Path(initial)).get("max_position_embeddings", length))
    return length, rate


def _fill_sources(data: dict[str, Any]) -> None:
    """A source may be a path alone. Without weights, all sources have the same; the tokenizer is that of the first."""
    sources = data.get("sources")
    if not isinstance(sources, list) or not sources:
        return
    sources = [{"path": source} if isinstance(source, str) else source for source in sources]
    if all(isinstance(source, dict) and "weight" not in source for source in sources):
        sources = [source | {"weight": 1 / len(sources)} for source in sources]
    data["sources"] = sources
    if isinstance(sources[0], dict) and isinstance(path := sources[0].get("path"), str):
        data.setdefault("tokenizer", f"{path}/tokenizer")


def _tokens_per_step(total: int, length: int) -> int:
    """The largest power of two that makes 500 steps or more, within bounds, in whole sequences."""
    least = min(_LEAST_TOKENS_PER_STEP, total // 20)
    power = 1 << max(int(min(max(total // _MIN_STEPS, least), _MOST_TOKENS_PER_STEP)).bit_length() - 1, 0)
    return max(power // int(length), 1) * int(length)
