"""Part `plain`: 1.1b without a draft, from the first call on, with and without graphs and with compiled layers."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from measuring import Bench, Figures, graphs_of, off, release, rounded
from torch.profiler import ProfilerActivity, profile

from tinyllama_hf.decoding import fixed_memory
from tinyllama_hf.decoding.llama_step import compile_for_generation
from tinyllama_hf.errors import InputError, one_line


LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cudaGraphLaunch")


def plain(bench: Bench) -> Iterator[Figures]:
    """Rows of the engine; `limit_milliseconds` is the time in which the device reads the weights once."""
    for variant in ("first call of the process", "first call of another model"):
        model = bench.model()
        yield first_call(bench, model, variant)
    rate = bytes_per_second(bench)
    release()
    weights = sum(tensor.nbytes for tensor in model.parameters())
    limit = weights / rate
    yield {"variant": "memory reads", "terabytes_per_second": rounded(rate / 1e12),
           "gigabytes_of_weights": rounded(weights / 1e9), "limit_milliseconds": rounded(1e3 * limit),
           "limit_tokens_per_second": rounded(1 / limit)}  # fmt: skip
    for batch in bench.size((1, 8, 64, 128), (1, 2)):
        calls = {"graphs": bench.call(model, batch)}
        if batch <= 64:
            calls["graphs off"] = off(calls["graphs"])
        found = bench.measure(calls, batch * bench.new_tokens, rounds=1 if batch > 8 else 2)
        step = bench.replayed_seconds(model, "pass")
        for name, figures in found.items():
            more = {} if name == "graphs off" else step_figures(step, limit) | {"graphs": graphs_of(model)}
            yield {"variant": name, "batch": batch, **figures, **share(figures, batch, limit), **more}
    for name in ("graphs", "graphs off"):
        yield {"variant": f"profile, {name}", "batch": 1, **profiled(bench, model, name == "graphs off")}
    yield from compiled(bench, limit)


def first_call(bench: Bench, model: Any, variant: str) -> Figures:
    """The first generation of a model, recording included."""
    seconds = bench.seconds(bench.call(model, 1))
    return {"variant": variant, "batch": 1, "tokens_per_second": rounded(bench.new_tokens / seconds),
            "seconds": rounded(seconds), "graphs": graphs_of(model)}  # fmt: skip


def share(figures: Figures, batch: int, limit: float) -> Figures:
    """The part of the limit that whole calls reach, prompts included."""
    speed = figures.get("tokens_per_second")
    return {"share_of_limit": rounded(speed * limit / batch)} if speed else {}


def step_figures(step: float | None, limit: float) -> Figures:
    """The device's time of one replayed pass, and the part of the limit that it reaches."""
    if step is None:
        return {}
    return {"step_milliseconds": rounded(1e3 * step), "step_share_of_limit": rounded(limit / step)}


def bytes_per_second(bench: Bench) -> float:
    """Returns how fast a large copy reads and writes."""
    source = torch.ones(bench.size(2**29, 2**20), device=bench.device)
    copy = torch.empty_like(source)

    def run() -> None:
        for _ in range(5):
            copy.copy_(source)

    run()
    return 5 * 2 * source.nbytes / bench.seconds(run)


def profiled(bench: Bench, model: Any, is_off: bool) -> Figures:
    """Launches, kernels and the device's time of a token: the difference between a longer and a shorter call."""
    few, many = bench.size((4, 20), (2, 4))
    found = []
    for tokens in (few, many):
        call = bench.call(model, 1, tokens)
        call = off(call) if is_off else call
        call()
        began = time.perf_counter()
        with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (bench.device == "cuda")]) as trace:
            bench.seconds(call)
        events = trace.key_averages()
        on_device = [event for event in events if not str(event.device_type).endswith("CPU")]
        launches = sum(event.count for event in events if event.key in LAUNCHES)
        kernels, device = sum(e.count for e in on_device), sum(e.self_device_time_total for e in on_device)
        found.append((launches, kernels, device / 1e3, time.perf_counter() - began))
    names = ("launches", "kernels", "device_milliseconds")
    return {f"{name}_per_token": rounded((long - short) / (many - few))
            for name, short, long in zip(names, *found, strict=False)}  # fmt: skip


def compiled(bench: Bench, limit: float) -> Iterator[Figures]:
    """Compiled layers at batch 1: their first call, which compiles, and later ones."""
    if bench.device == "cpu":
        yield {"variant": "compiled", "skipped": "the stand-in for graphs does not record compiled layers"}
        return
    model = bench.model()
    try:
        compile_for_generation(model)
        yield first_call(bench, model, "compiled, first call")
    except (InputError, RuntimeError) as error:
        yield {"variant": "compiled, first call", "batch": 1, "error": one_line(error)[:300]}
        return
    figures = bench.measure({"compiled": bench.call(model, 1)}, bench.new_tokens)["compiled"]
    step = step_figures(bench.replayed_seconds(model, "pass"), limit)
    yield {"variant": "compiled", "batch": 1, **figures, **share(figures, 1, limit), **step}
    fixed_memory.release(model)
