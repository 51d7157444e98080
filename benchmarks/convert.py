"""Converting 1.1B parameters from lit-gpt to safetensors and others: time against `cp` of the same bytes, and memory.

    python benchmarks/convert.py --folder SCRATCH [--rounds 5] [--preset 1.1b]

Writes an fp32 checkpoint (4.4 GB) with random weights in lit-gpt's layout A to SCRATCH, which needs 20 GB. Each round
copies it with `cp` and `sync`, and converts it with the Python call, each in a separate process that measures its time
after the imports. Both end with the files synchronized to disk. Memory is the growth of the peak resident set after
the imports. The source is usually in the page cache for both.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from tinyllama_hf.conversion.writing import write_torch_archive
from tinyllama_hf.presets import PRESETS


TARGETS = ("llama", "litgpt", "gguf-f16", "gguf-q8_0", "gguf-q4_0")


def lit_gpt_shapes(preset: str) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of layout A."""
    sizes = PRESETS[preset]
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    head = hidden // sizes["num_attention_heads"]
    fused = (sizes["num_attention_heads"] + 2 * sizes["num_key_value_heads"]) * head
    shapes = {"transformer.wte.weight": (32000, hidden), "lm_head.weight": (32000, hidden)}
    for i in range(sizes["num_hidden_layers"]):
        shapes |= {
            f"transformer.h.{i}.norm_1.weight": (hidden,), f"transformer.h.{i}.attn.attn.weight": (fused, hidden),
            f"transformer.h.{i}.attn.proj.weight": (hidden, hidden), f"transformer.h.{i}.norm_2.weight": (hidden,),
            f"transformer.h.{i}.mlp.swiglu.w1.weight": (inner, hidden),
            f"transformer.h.{i}.mlp.swiglu.w2.weight": (inner, hidden),
            f"transformer.h.{i}.mlp.swiglu.w3.weight": (hidden, inner),
        }  # fmt: skip
    return shapes | {"transformer.ln_f.weight": (hidden,)}


def write_source(path: Path, preset: str) -> None:
    shapes = lit_gpt_shapes(preset)

    def tensors() -> Iterator[torch.Tensor]:
        torch.manual_seed(0)
        yield from (torch.randn(shape) * 0.02 for shape in shapes.values())

    write_torch_archive(path, {name: (torch.float32, shape) for name, shape in shapes.items()}, tensors())


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


def convert_here(source: Path, to: str, output: Path) -> dict[str, float]:
    from tinyllama_hf.conversion import convert
    from tinyllama_hf.conversion.formats import llama_write  # noqa: F401  imported before the measurement
    from tinyllama_hf.conversion.reading import containers, recognize  # noqa: F401

    if to.startswith("gguf"):
        from tinyllama_hf.conversion.formats import gguf_read, gguf_write  # noqa: F401
    before, start = resident("VmRSS"), time.perf_counter()
    convert.convert(source, to, output)
    return {"seconds": time.perf_counter() - start, "additional_bytes": resident("VmHWM") - before}


def copy_here(source: Path, output: Path) -> dict[str, float]:
    output.mkdir()
    start = time.perf_counter()
    subprocess.run(["cp", str(source), str(output)], check=True)
    subprocess.run(["sync", str(output / source.name), str(output)], check=True)
    return {"seconds": time.perf_counter() - start}


def measured(variant: str, source: Path, output: Path) -> dict[str, float]:
    """Runs one conversion or copy in a separate process."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, __file__, "--measure", variant, str(source), str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    size = sum(file.stat().st_size for file in output.rglob("*"))
    shutil.rmtree(output)
    return json.loads(done.stdout.splitlines()[-1]) | {"bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="for the files; removed afterwards")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--preset", default="1.1b", choices=PRESETS, help="shapes of the checkpoint")
    parser.add_argument("--measure", nargs=3, metavar=("VARIANT", "SOURCE", "OUTPUT"), help="one process of a round")
    arguments = parser.parse_args()
    if arguments.measure:
        variant, source, output = arguments.measure
        paths = Path(source), Path(output)
        print(json.dumps(copy_here(*paths) if variant == "cp" else convert_here(paths[0], variant, paths[1])))
        return
    if arguments.folder is None:
        parser.error("--folder is needed")
    from common import medians, save

    arguments.folder.mkdir(parents=True)
    try:
        source = arguments.folder / "lit_model.pth"
        write_source(source, arguments.preset)
        rows: dict[str, list[dict[str, float]]] = {variant: [] for variant in ("cp", *TARGETS)}
        for _ in range(arguments.rounds):
            for variant, found in rows.items():
                found.append(measured(variant, source, arguments.folder / "output"))
        seconds = medians({variant: [row["seconds"] for row in found] for variant, found in rows.items()})
        figures = {
            variant: {
                "seconds": round(seconds[variant], 2),
                "time_of_cp": round(seconds[variant] / seconds["cp"], 2),
                "gigabytes_written": round(found[0]["bytes"] / 1e9, 2),
                "additional_megabytes": round(max(row.get("additional_bytes", 0) for row in found) / 1e6),
            }
            for variant, found in rows.items()
        }
    finally:
        shutil.rmtree(arguments.folder)
    for variant, row in figures.items():
        print(
            f"{variant:<10} {row['seconds']:>8} s  {row['time_of_cp']:>6} x cp  {row['gigabytes_written']:>6} GB  "
            f"{row['additional_megabytes']:>6} MB of memory"
        )
    print(
        "wrote "
        + os.path.relpath(save("convert", {"preset": arguments.preset, "rounds": arguments.rounds, **figures}))
    )


if __name__ == "__main__":
    main()
