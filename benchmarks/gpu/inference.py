"""Generation with 1.1b on one GPU: batches, quantization, a draft, and grouped-query attention variants.

    python benchmarks/gpu/inference.py                          # on an H100 or H200; --parts and --output resume it
    python benchmarks/gpu/inference.py --device cpu --tiny      # the same parts with a small model

Parts:
- `batch`: 1 to 128 rows, with the growing cache of transformers and its static one, for which it compiles the model;
- `samples`: 100 prompts with 10 samples each (TinyLlama published 7094.5 tokens/s in vLLM on an A40, without lengths);
- `quantization`: int8 and nf4 of bitsandbytes, int4 and fp8 of torchao where the device has their kernels;
- `speculative`: a draft of a tenth of the size with a chosen agreement (benchmarks/speculative.py);
- `heads`: one key/value head for all, per group or per head, at equal model size.

Weights are random, in bf16 on a GPU and fp32 on a CPU, and no row ends early. Prompts have equal length. Decoding is
timed separately from the prompt. A variant that runs out of memory is a row too.
"""

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch


ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # neither package nor benchmarks need be installed

from clock import Clock  # noqa: E402
from speculative import Row as SpeculativeRow  # noqa: E402
from speculative import controlled_pair  # noqa: E402

from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, provenance  # noqa: E402
from tinyllama_hf.errors import InputError  # noqa: E402
from tinyllama_hf.files import read_json, write_json  # noqa: E402
from tinyllama_hf.quantization.bitsandbytes import quantization_config  # noqa: E402
from tinyllama_hf.quantization.names import GPU_CAPABILITIES, QUANTIZATIONS  # noqa: E402
from tinyllama_hf.quantization.quantized_model import QuantizedTinyLlama, check_quantization  # noqa: E402
from tinyllama_hf.quantization.torchao import check_layers, torchao_config  # noqa: E402


PRESET, PROMPT_TOKENS, NEW_TOKENS, ROUNDS = "1.1b", 128, 64, 3
SIZES: dict[str, Any] = {
    "batch": (1, 2, 4, 8, 16, 32, 64, 128),
    "compiled": (1, 8, 32),
    "samples": (100, 10),  # prompts, samples of each
    "quantization": (1, 8, 32),
    "speculative": (1, 8, 32),
    "agreements": (0.6, 0.75, 0.9),
    "heads": (1, 32, 128),
    "layers": None,  # of the controlled pair's target: all
}
TINY = SIZES | {"batch": (1, 2), "compiled": (1,), "samples": (3, 2), "quantization": (1, 2), "speculative": (1, 2),
                "agreements": (0.75,), "heads": (1, 2), "layers": 1}  # fmt: skip
Call = Callable[[torch.Tensor, Clock], None]
Figures = dict[str, Any]


class Bench:
    """Models, and calls that are measured, on one device.

    Args:
        device (`str`): `cuda` or `cpu`.
        tiny (`bool`): small models and few tokens, to see that all parts run.
    """

    def __init__(self, device: str, tiny: bool):
        self.device, self.sizes = device, TINY if tiny else SIZES
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.preset, self.rounds = ("micro", 1) if tiny else (PRESET, ROUNDS)
        self.prompt_tokens, self.new_tokens = (16, 8) if tiny else (PROMPT_TOKENS, NEW_TOKENS)

    def model(self, **overrides: Any) -> TinyLlamaForCausalLM:
        """A model with random weights that stops nowhere."""
        config = TinyLlamaConfig.preset(self.preset, **overrides)
        with torch.device(self.device):
            model = TinyLlamaForCausalLM(config).to(self.dtype).eval()
        return endless(model)

    def prompts(self, rows: int) -> torch.Tensor:
        """`[rows, prompt_tokens]`."""
        ids = torch.randint(3, 32000, (rows, self.prompt_tokens), generator=torch.Generator().manual_seed(rows))
        return ids.to(self.device)

    def call(self, model: Any, **options: Any) -> Call:
        """`generate`, greedily unless the options say otherwise."""

        def run(ids: torch.Tensor, clock: Clock) -> None:
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.new_tokens, streamer=clock,
                           **{"do_sample": False, **options})  # fmt: skip

        return run

    def rows(self, batch: int, calls: dict[str, Call], samples: int = 1) -> list[Figures]:
        """Measures each call once per round, in turns. The first round, which allocates and compiles, is left out."""
        found: dict[str, list[Figures] | str] = {name: [] for name in calls}
        for number in range(self.rounds + 1):
            for name, call in calls.items():
                if isinstance(found[name], list):
                    result = self._measured(call, batch, samples)
                    if isinstance(result, str):
                        found[name] = result
                    elif number:
                        found[name].append(result)
        return [
            {"variant": name, "batch": batch}
            | ({"error": result} if isinstance(result, str) else {k: median(result, k) for k in result[0]})
            for name, result in found.items()
        ]

    def _measured(self, call: Call, batch: int, samples: int) -> Figures | str:
        ids, clock, on_gpu = self.prompts(batch), Clock(), self.device == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        try:
            call(ids, clock)
        except torch.OutOfMemoryError:
            release()
            return "out of memory"
        sequences, (steps, decoding, _) = batch * samples, clock.steps()
        whole = clock.times[-1][0] - clock.times[0][0]
        figures = {
            "decode_tokens_per_second": sequences * steps / decoding,
            "tokens_per_second": sequences * (steps + 1) / whole,
            "prompt_tokens_per_second": ids.numel() / (whole - decoding),
            "milliseconds_per_step": 1e3 * decoding / steps,
        }
        if on_gpu:  # keys and values, activations, logits
            figures["gigabytes_beside_weights"] = (torch.cuda.max_memory_allocated() - before) / 1e9
        return figures


def median(results: list[Figures], key: str) -> float:
    return float(f"{statistics.median(result[key] for result in results):.4g}")


def endless(model: Any) -> Any:
    """No end of sequence: every run has the same length."""
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def release() -> None:
    """Gives back what models that are gone, and failed calls, have held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def batches(bench: Bench) -> Iterator[Figures]:
    model = bench.model()
    for batch in bench.sizes["batch"]:
        calls = {"growing cache": bench.call(model)}
        if batch in bench.sizes["compiled"]:
            calls["static cache, compiled"] = bench.call(model, cache_implementation="static")
        yield from bench.rows(batch, calls)


def samples(bench: Bench) -> Iterator[Figures]:
    prompts, number = bench.sizes["samples"]
    drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "num_return_sequences": number}
    calls = {f"{number} samples each": bench.call(bench.model(), **drawn)}
    yield from ({**row, "samples": number} for row in bench.rows(prompts, calls, number))


def quantizations(bench: Bench) -> Iterator[Figures]:
    """Loaded one after the other, since weights are quantized while they are loaded, from a folder."""
    with tempfile.TemporaryDirectory() as folder:
        plain = bench.model()
        plain.save_pretrained(folder)
        models = {str(bench.dtype).removeprefix("torch."): plain}
        for kind in QUANTIZATIONS[1:]:
            try:
                check_quantization(kind, device=bench.device)
                if kind in GPU_CAPABILITIES:
                    check_layers(kind, plain.config, bench.dtype)
            except InputError as reason:
                yield {"variant": kind, "error": f"skipped: {reason}"}
                continue
            if kind in GPU_CAPABILITIES:
                config = torchao_config(kind, plain.config)
            else:
                config = quantization_config(kind, bench.device, True, "auto")
            models[kind] = endless(QuantizedTinyLlama.from_pretrained(
                folder, dtype=bench.dtype, quantization_config=config, device_map=bench.device).eval())  # fmt: skip
    weights = {name: round(model.get_memory_footprint() / 1e9, 3) for name, model in models.items()}
    for batch in bench.sizes["quantization"]:
        for row in bench.rows(batch, {name: bench.call(model) for name, model in models.items()}):
            yield {**row, "gigabytes_of_weights": weights[row["variant"]]}


def speculation(bench: Bench) -> Iterator[Figures]:
    """Plain and assisted decoding with the same target. Stock transformers assists one prompt at a time."""
    for agreement in bench.sizes["agreements"]:
        target, draft = controlled_pair(agreement, bench.dtype, bench.device, bench.sizes["layers"])
        for batch in bench.sizes["speculative"]:
            row = SpeculativeRow(target, draft, batch, bench.new_tokens, bench.prompt_tokens)
            calls = {"plain": row.plain, "ours": row.ours} | (
                {"stock_assisted": row.stock_assisted} if batch == 1 else {}
            )
            figures: Figures = {"variant": f"agreement {agreement:.0%}", "batch": batch}
            try:
                yield figures | row.run(bench.rounds, calls)
            except torch.OutOfMemoryError:
                release()
                yield figures | {"error": "out of memory"}
        del target, draft, row, calls
        release()


def heads(bench: Bench) -> Iterator[Figures]:
    """What the smaller key and value projections save, the MLP gets."""
    grouped = TinyLlamaConfig.preset(bench.preset)
    number, head_dim = grouped.num_attention_heads, grouped.hidden_size // grouped.num_attention_heads
    models = {}
    for name, kv_heads in (("multi-query", 1), ("grouped-query", grouped.num_key_value_heads), ("multi-head", number)):
        saved = 2 * head_dim * (grouped.num_key_value_heads - kv_heads) / 3  # of three projections of the MLP
        inner = 16 * round((grouped.intermediate_size + saved) / 16)
        models[name] = bench.model(num_key_value_heads=kv_heads, intermediate_size=inner)
    sizes = {
        name: {
            "key_value_heads": model.config.num_key_value_heads,
            "parameters": model.num_parameters(),
            "cache_bytes_per_token": model.kv_cache_bytes_per_token(bench.dtype),
        }
        for name, model in models.items()
    }
    for batch in bench.sizes["heads"]:
        for row in bench.rows(batch, {name: bench.call(model) for name, model in models.items()}):
            yield {**row, **sizes[row["variant"]]}


PARTS = {
    "batch": batches,
    "samples": samples,
    "quantization": quantizations,
    "speculative": speculation,
    "heads": heads,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models and few tokens, to see that it runs")
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else ROOT / "benchmarks" / "results"
    parser.add_argument(
        "--output", type=Path, default=folder / "gpu_inference.json", help="other parts in it are kept"
    )
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "--device cuda: this machine has no GPU that torch can use; --device cpu --tiny shows that all runs"
        )
    bench, output = Bench(arguments.device, arguments.tiny), arguments.output
    name = torch.cuda.get_device_name() if bench.device == "cuda" else "CPU"
    settings = {
        "device": name,
        "dtype": str(bench.dtype),
        "preset": bench.preset,
        "prompt_tokens": bench.prompt_tokens,
        "new_tokens": bench.new_tokens,
    }
    rows = read_json(output)["figures"]["rows"] if output.is_file() else []
    output.parent.mkdir(parents=True, exist_ok=True)
    for part in arguments.parts:
        rows, began = [row for row in rows if row["part"] != part], time.perf_counter()
        for row in PARTS[part](bench):
            rows.append({"part": part, **row})
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
            figures = {**settings, "rows": rows}
            write_json(output, {"figures": figures, "provenance": provenance.collect()})
        release()
        print(f"{part}: {time.perf_counter() - began:.0f} s", flush=True)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
