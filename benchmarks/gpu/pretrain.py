"""Pretraining of 1.1b on one GPU: tokens/s, MFU, memory, an ablation per feature, and stock Llama with the same loop.

    python benchmarks/gpu/pretrain.py                               # on an H100 or H200, in under ten minutes
    python benchmarks/gpu/pretrain.py --preset micro --sequence-length 128 --micro-batch-sizes 2 4      # on a CPU

Each setting runs in its own process: the micro-batch sizes first; then, from the fastest one, each feature changed
alone; then stock `LlamaForCausalLM` in its best settings. A setting that runs out of memory is a row too. Each row is
written as soon as it is measured. The same command with the same --output measures the missing rows.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "gpu")]  # neither package nor benchmarks need be installed


def measure(settings: dict[str, Any]) -> dict[str, Any]:
    """Steps of one setting in this process: median seconds of a step and what follows from it."""
    import torch
    from workload import build

    from tinyllama_hf.pretrain.throughput import measure_matmul_flops, model_flops_utilization, peak_memory_bytes

    on_gpu = torch.cuda.is_available()
    train_step, flops = build(settings)
    model = train_step.accelerator.unwrap_model(train_step.model)
    embedding = (
        model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else model.model.get_input_embeddings()
    )
    seconds, results = [], []
    for step in range(1, settings["warmup_steps"] + settings["steps"] + 1):
        began = time.perf_counter()
        results.append(train_step(step).loss)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak = peak_memory_bytes(train_step.device)
    name = torch.cuda.get_device_name() if on_gpu else None
    median = statistics.median(seconds[settings["warmup_steps"] :])
    rate = train_step.config.steps.tokens_of(1) / median
    all_flops = flops + 6 * embedding.weight.numel()
    matmul = measure_matmul_flops(
        train_step.device, torch.bfloat16 if settings["precision"] == "bf16" else torch.float32
    )
    return {
        "tokens_per_second": round(rate),
        "mfu": model_flops_utilization(rate, flops, name),
        "mfu_all_parameters": model_flops_utilization(rate, all_flops, name),
        "share_of_measured_matmul_rate": rate * flops / matmul,
        "peak_gigabytes": None if peak is None else round(peak / 1e9, 2),
        "seconds_per_step": median,
        "first_step_seconds": round(seconds[0], 1),
        "loss": [round(loss.item(), 4) for loss in (results[0], results[-1])],
        "gflop_per_token": flops / 1e9,
        "device": name or "CPU",
    }


def measured(settings: dict[str, Any], timeout: float) -> dict[str, Any]:
    """[`measure`] in a fresh process; running out of memory or time is a result."""
    command = [sys.executable, __file__, "--measure", json.dumps(settings)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {timeout:.0f} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.strip().splitlines()[-1])
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    known = next(
        (line for line in reversed(lines) if "OutOfMemory" in line or "Error" in line),
        lines[-1] if lines else "killed",
    )
    return {"error": "out of memory" if "out of memory" in known else known.strip()[:300]}


class Session:
    """Rows that are measured once each, within a budget of time."""

    def __init__(self, output: Path, budget_seconds: float):
        self.output, self.deadline = output, time.monotonic() + budget_seconds
        self.rows: list[dict[str, Any]] = json.loads(output.read_text())["figures"] if output.is_file() else []

    def row(self, name: str, settings: dict[str, Any]) -> dict[str, Any]:
        """The row of a setting, measured now unless it was before."""
        for row in self.rows:
            if row["settings"] == settings and "error" not in row:
                return row
        left = self.deadline - time.monotonic()
        result = measured(settings, left) if left > 20 else {"error": "no time was left; repeat the command"}
        row = {"name": name, **result, "settings": settings}
        self.rows = [r for r in self.rows if r["settings"] != settings] + [row]
        self.save()
        print(line(row), flush=True)
        return row

    def save(self) -> None:
        from tinyllama_hf import provenance
        from tinyllama_hf.files import write_json

        self.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.output, {"figures": self.rows, "provenance": provenance.collect()})


def line(row: dict[str, Any]) -> str:
    """A row for the eye."""
    if "error" in row:
        return f"{row['name']:<44} {row['error']}"
    mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.1%} ({row['mfu_all_parameters']:.1%} by all parameters)"
    return (
        f"{row['name']:<44} {row['tokens_per_second']:>8,} tokens/s  MFU {mfu}  "
        f"{row['share_of_measured_matmul_rate']:.1%} of the measured matmul rate  {row['peak_gigabytes']} GB"
    )


def best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest of some rows."""
    fitting = [row for row in rows if "error" not in row]
    if not fitting:
        sys.exit("no setting could be measured; the rows above say why")
    return max(fitting, key=lambda row: row["tokens_per_second"])


def sweep(arguments: argparse.Namespace, session: Session) -> None:
    """All rows of the benchmark."""
    base = {
        "preset": arguments.preset, "model": "ours", "sequence_length": arguments.sequence_length,
        "micro_batch_size": arguments.micro_batch_sizes[0], "accumulation": 1, "precision": "bf16",
        "compile": "auto", "attention": "sdpa", "kernels": "none", "activation_checkpointing": False,
        "loss_chunk_megabytes": 128, "warmup_steps": arguments.warmup_steps, "steps": arguments.steps,
    }  # fmt: skip
    sizes = arguments.micro_batch_sizes
    ours = best([session.row(f"ours, micro-batch {size}", base | {"micro_batch_size": size}) for size in sizes])[
        "settings"
    ]
    changes: list[dict[str, Any]] = [
        {"compile": "off"}, {"compile": "model"},
        {"attention": "flash_attention_2"}, {"attention": "flash_attention_3"},
        {"attention": "flex"}, {"kernels": "liger", "compile": "off"}, {"activation_checkpointing": True},
        {"loss_chunk_megabytes": 32}, {"loss_chunk_megabytes": 512}, {"accumulation": 4},
    ]  # fmt: skip
    rows = [session.row("ours, " + ", ".join(f"{k} {v}" for k, v in c.items()), ours | c) for c in changes]
    stock = {"model": "stock", "loss_chunk_megabytes": 128}
    peers = [
        session.row(
            f"stock, micro-batch {size}, compile {how}", base | stock | {"micro_batch_size": size, "compile": how}
        )
        for how in ("model", "layers", "off")
        for size in sizes
    ]
    fastest, peer = best([*rows, session.row("ours, best of the above", ours)]), best(peers)
    print(f"\nfastest   {line(fastest)}\npeer      {line(peer)}")
    print(f"ratio     {fastest['tokens_per_second'] / peer['tokens_per_second']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="1.1b", help="of TinyLlamaConfig")
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--micro-batch-sizes", type=int, nargs="+", default=[8, 16, 24])
    parser.add_argument("--warmup-steps", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--budget-seconds", type=float, default=570, help="of all rows together")
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else ROOT / "benchmarks" / "results"
    parser.add_argument("--output", type=Path, default=folder / "gpu_pretrain.json")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(json.loads(arguments.measure))))
        return
    session = Session(arguments.output, arguments.budget_seconds)
    sweep(arguments, session)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
