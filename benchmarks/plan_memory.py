"""The memory estimate of `tinyllama-hf plan` compared with real training steps.

    python benchmarks/plan_memory.py
    python benchmarks/plan_memory.py --gpu-results      compared with the steps of the H200 in results/gpu_h200_*.json

Each configuration differs from the first one of its precision in one setting. Each runs in its own process: three
optimizer steps of the real model with its loss and fused AdamW. On a CPU the figure is the peak of the resident set
minus its size before the model was built; on a GPU it is torch's `max_memory_allocated`. The C library is told to
return freed memory (`MALLOC_MMAP_THRESHOLD_`), since memory that it keeps for later would be measured, too;
`--default-malloc` shows how much.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaForCausalLM

from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM
from tinyllama_hf.planning.training_memory import Layout, step_memory


STEPS = 3


class Case(NamedTuple):
    """A configuration to measure; all widths follow from `hidden_size`."""

    layers: int = 8
    hidden_size: int = 512
    vocab_size: int = 32000
    micro_batch_size: int = 2
    sequence_length: int = 512
    precision: str = "fp32"
    loss: str = "chunked"
    activation_checkpointing: bool = False
    accumulation: int = 1

    def model_config(self) -> TinyLlamaConfig:
        """Heads of width 64, four per key/value head; the MLP is 2.75 times as wide, as in the 1.1b model."""
        return TinyLlamaConfig.preset(
            "120m",
            num_hidden_layers=self.layers,
            hidden_size=self.hidden_size,
            intermediate_size=self.hidden_size * 11 // 4,
            num_attention_heads=self.hidden_size // 64,
            num_key_value_heads=self.hidden_size // 256,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.sequence_length,
        )

    def layout(self) -> Layout:
        """The settings for the estimate."""
        return Layout(
            micro_batch_size=self.micro_batch_size,
            sequence_length=self.sequence_length,
            precision=self.precision,
            activation_checkpointing=self.activation_checkpointing,
            accumulates=self.accumulation > 1,
            loss=self.loss,
            device_type="cuda" if torch.cuda.is_available() else "cpu",
        )


_FP32, _BF16 = Case(), Case(precision="bf16")
CASES = {
    "fp32": _FP32,
    "fp32, layers 16": _FP32._replace(layers=16),
    "fp32, width 1024": _FP32._replace(hidden_size=1024),
    "fp32, vocabulary 8192": _FP32._replace(vocab_size=8192),
    "fp32, micro-batch 8": _FP32._replace(micro_batch_size=8),
    "fp32, sequence 2048": _FP32._replace(sequence_length=2048),
    "fp32, sequence 128": _FP32._replace(sequence_length=128),
    "fp32, stock loss": _FP32._replace(loss="stock"),
    "fp32, checkpointing at micro-batch 8": _FP32._replace(micro_batch_size=8, activation_checkpointing=True),
    "fp32, accumulation": _FP32._replace(accumulation=2),
    "bf16": _BF16,
    "bf16, width 1024": _BF16._replace(hidden_size=1024),
    "bf16, micro-batch 8": _BF16._replace(micro_batch_size=8),
    "bf16, stock loss": _BF16._replace(loss="stock"),
    "bf16, checkpointing at micro-batch 8": _BF16._replace(micro_batch_size=8, activation_checkpointing=True),
}


# Measured on a GPU only.
LARGE = {
    "bf16, width 2048, 8 layers, 4 x 2048": Case(8, 2048, micro_batch_size=4, sequence_length=2048, precision="bf16")
}


def gpu_results() -> Iterator[tuple[str, TinyLlamaConfig, Layout, float]]:
    """Yields name, model, settings and measured bytes of each committed result with a peak."""
    results = Path(__file__).parent / "results"
    rows = json.loads((results / "gpu_h200_pretrain.json").read_text())["figures"]
    settings_of = {row["name"]: row["settings"] for row in rows if "settings" in row}
    # Measured in the second call, which recorded no settings.
    settings_of["ours mb16 liger compile auto"] = settings_of["ours mb16 liger compile off"] | {"compile": "auto"}
    for row in rows:
        name = row.get("name", row.get("part"))
        gigabytes = row.get("peak_gigabytes", row.get("gb"))
        if gigabytes is None:
            continue
        settings = settings_of[name]
        layout = Layout(
            micro_batch_size=settings["micro_batch_size"],
            sequence_length=settings["sequence_length"],
            precision=settings["precision"],
            activation_checkpointing=settings["activation_checkpointing"],
            attention=settings["attention"],
            compiled=settings["compile"] != "off",
            kernels=settings["kernels"],
            accumulates=settings["accumulation"] > 1,
            loss="stock" if settings["model"] == "stock" else "chunked",
            device_type="cuda",
        )
        config = TinyLlamaConfig.preset(settings["preset"], max_position_embeddings=settings["sequence_length"])
        yield name, config, layout, gigabytes * 1e9
    for row in json.loads((results / "gpu_h200_checks.json").read_text())["figures"]:
        if "measured_mb" in row:
            name = row["part"].removeprefix("i ")
            case = (CASES | LARGE)[name]
            yield name, case.model_config(), case.layout()._replace(device_type="cuda"), row["measured_mb"] * 1e6


def resident_bytes(field: str) -> int:
    """Returns a field of `/proc/self/status`: VmRSS is the current size, VmHWM the peak of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def measured_here(case: Case) -> int:
    """Runs the steps in this process. Returns the bytes at the peak without those before the model was built."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.manual_seed(0)
    before = 0 if on_gpu else resident_bytes("VmRSS")
    model_class = TinyLlamaForCausalLM if case.loss == "chunked" else LlamaForCausalLM
    config = case.model_config()
    with device:
        model = model_class._from_config(
            config if case.loss == "chunked" else config.to_llama(), attn_implementation="sdpa"
        ).train()
    if case.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    shape = (case.micro_batch_size, case.sequence_length + 1)
    for _ in range(STEPS):
        for _ in range(case.accumulation):
            tokens = torch.randint(0, case.vocab_size, shape, device=device)
            labels = tokens[:, 1:].contiguous()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=case.precision == "bf16"):
                loss = model(
                    input_ids=tokens[:, :-1],
                    labels=labels,
                    shift_labels=labels,
                    num_items_in_batch=labels.numel() * case.accumulation,
                    use_cache=False,
                ).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated() if on_gpu else resident_bytes("VmHWM") - before


def measure(case: Case, default_malloc: bool = False) -> int:
    """Runs [`measured_here`] in a new process."""
    environment = dict(os.environ)
    if not default_malloc:
        environment["MALLOC_MMAP_THRESHOLD_"] = "131072"  # glibc's default; set explicitly, it is not adjusted
    command = [sys.executable, __file__, "--measure", json.dumps(case._asdict())]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout)


def compare(case: Case, default_malloc: bool = False) -> dict[str, Any]:
    """Returns estimate and measurement of a configuration."""
    estimate, measured = step_memory(case.model_config(), case.layout()), measure(case, default_malloc)
    return {
        "estimated_megabytes": round(estimate.total / 1e6, 1),
        "measured_megabytes": round(measured / 1e6, 1),
        "ratio": round(estimate.total / measured, 3),
        "moment": estimate.moment,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--default-malloc", action="store_true", help="do not configure glibc; writes nothing")
    parser.add_argument("--only", help="the configurations whose names contain this; writes nothing")
    parser.add_argument("--gpu-results", action="store_true", help="compare with the H200; measures nothing")
    parser.add_argument("--measure", metavar="JSON", help="the process that is measured")
    arguments = parser.parse_args()
    if arguments.gpu_results:
        for name, config, layout, measured in gpu_results():
            estimate = step_memory(config, layout)
            ratio = estimate.total / measured
            print(
                f"{estimate.total / 1e6:>11,.0f} {measured / 1e6:>11,.0f} {ratio:>6.3f}  {name} ({estimate.moment})",
                flush=True,
            )
        return
    if arguments.measure:
        print(measured_here(Case(**json.loads(arguments.measure))))
        return
    from common import save

    figures = {}
    print(f"{'estimate MB':>11} {'measured MB':>11} {'ratio':>6}  configuration (highest moment of the estimate)")
    for name, case in CASES.items():
        if arguments.only and arguments.only not in name:
            continue
        row = figures[name] = compare(case, arguments.default_malloc)
        print(
            f"{row['estimated_megabytes']:>11} {row['measured_megabytes']:>11} {row['ratio']:>6}  "
            f"{name} ({row['moment']})",
            flush=True,
        )
    if not arguments.default_malloc and not arguments.only:
        print(f"wrote {os.path.relpath(save('plan_memory', figures))}")


if __name__ == "__main__":
    main()
