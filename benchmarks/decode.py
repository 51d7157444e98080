"""Decoding at batch 1 on a CPU: tokens/s and tokens per CPU second of transformers, bitsandbytes, ours and llama.cpp.

    pip install --target PEERS --no-deps xllamacpp==2026.10.11549
    python benchmarks/decode.py --scratch FOLDER --peers PEERS [--rounds 3] [--threads 1 2]

The model has the shape of the preset and random weights. It is kept in SCRATCH in bf16 (5 GB for 1.1b), with the
files that `convert` writes for llama.cpp. Each engine runs in its own process. All are loaded first (16 GB for 1.1b),
then they take turns. Only decoding is timed, from the first new token to the last, in wall time and in CPU time.
Other load affects tokens per CPU second with one thread the least. `forward passes alone` is bitsandbytes without the
`generate` of the library.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from clock import Clock
from transformers import BitsAndBytesConfig, DynamicCache, LlamaForCausalLM, PreTrainedModel

from tinyllama_hf import convert, load
from tinyllama_hf.progress import quiet_bitsandbytes
from tinyllama_hf.quantization.quantized_model import measure_footprint


class Engine(NamedTuple):
    """What decodes: the process that holds a model, and how that one is asked.

    Attributes:
        source (`str`): `stock`, `ours`, or the type of a GGUF file.
        options (`dict`): of [`loaded`].
        loop (`str`): `generate` or `forward`.
    """

    source: str
    options: dict[str, Any]
    loop: str = "generate"


ENGINES = {
    "stock fp32": Engine("stock", {"dtype": "float32"}),
    "stock bf16": Engine("stock", {"dtype": "bfloat16"}),
    "bitsandbytes int8": Engine("stock", {"quantization": "int8"}),
    "bitsandbytes nf4": Engine("stock", {"quantization": "nf4"}),
    "bitsandbytes nf4, forward passes alone": Engine("stock", {"quantization": "nf4"}, "forward"),
    "tinyllama_hf int8": Engine("ours", {"quantization": "int8"}),
    "tinyllama_hf nf4": Engine("ours", {"quantization": "nf4"}),
    "llama.cpp q8_0": Engine("gguf-q8_0", {}),
    "llama.cpp q4_0": Engine("gguf-q4_0", {}),
}


def loaded(source: str, folder: str, dtype: str = "bfloat16", quantization: str | None = None) -> PreTrainedModel:
    """A model by stock transformers or by our `load`."""
    if source == "ours":
        model, _ = load(folder, dtype=dtype, device="cpu", quantization=quantization)
    else:
        options: dict[str, Any] = {}
        if quantization:
            quiet_bitsandbytes()
            nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
            kind = {"load_in_8bit": True} if quantization == "int8" else {"load_in_4bit": True, **nf4}
            options = {"quantization_config": BitsAndBytesConfig(**kind), "device_map": "cpu"}
        model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
    model.generation_config.eos_token_id = None  # every run has the same length
    return model


def by_generate(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int, clock: Clock) -> None:
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, streamer=clock
    )


@torch.inference_mode()
def by_forward(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int, clock: Clock) -> None:
    clock.put(ids)
    cache = DynamicCache(config=model.config)
    for _ in range(new_tokens):
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1].argmax(dim=-1, keepdim=True)
        clock.put(ids)


def serve(engine: dict[str, Any]) -> None:
    """One engine's process: a measurement for each line on standard input, as in peers/decode_gguf.py."""
    model = loaded(**engine)
    weights = measure_footprint(model).weights
    loops: dict[str, Callable[..., None]] = {"generate": by_generate, "forward": by_forward}
    for line in sys.stdin:
        request = json.loads(line)
        torch.set_num_threads(request["threads"])
        clock = Clock()
        loops[request["loop"]](model, torch.tensor([request["prompt"]]), request["new_tokens"] + 1, clock)
        tokens, seconds, cpu_seconds = clock.steps()
        answer = {"tokens": tokens, "seconds": seconds, "cpu_seconds": cpu_seconds}
        print(json.dumps(answer | {"weight_bytes": weights}), flush=True)


class Process:
    """A process that measures when it is asked."""

    def __init__(self, command: list[str], environment: dict[str, str]):
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment
        )

    def __call__(self, **request: Any) -> dict[str, float]:
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            self.process.wait()
            self.log.seek(0)
            sys.exit(f"{' '.join(self.process.args)}\n{self.log.read()[-3000:]}")

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def prepared(scratch: Path, preset: str) -> Path:
    """A model of this shape with random weights, and a tokenizer, which GGUF files hold."""
    from quality import made, random_model

    from tinyllama_hf.data.embedded import documents
    from tinyllama_hf.data.train_tokenizer import train_tokenizer

    scratch.mkdir(parents=True, exist_ok=True)
    texts = (document.text for document in documents("code"))
    tokenizer = made(scratch / "tokenizer", lambda to: train_tokenizer(texts, 512, to))
    return random_model(scratch, preset, tokenizer)


def started(engine: Engine, folder: Path, peers: Path | None) -> Process:
    """The process of an engine; its file is made if it is not there."""
    from quality import made

    if engine.source in ("stock", "ours"):
        settings = {"source": engine.source, "folder": str(folder), **engine.options}
        return Process([sys.executable, __file__, "--serve", json.dumps(settings)], dict(os.environ))
    written = made(folder.with_name(f"{folder.name}-{engine.source}"), lambda to: convert(folder, engine.source, to))
    script = Path(__file__).parent / "peers" / "decode_gguf.py"
    return Process(
        [sys.executable, str(script), str(next(written.glob("*.gguf")))], os.environ | {"PYTHONPATH": str(peers)}
    )


def measure(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Rows of the table: every engine once a round, one after the other."""
    processes: dict[str, Process] = {}
    engines = {name: ENGINES[name] for name in arguments.engines}
    prompt = torch.randint(3, 512, (arguments.prompt_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = []

    def ask(engine: Engine, threads: int, new_tokens: int) -> dict[str, float]:
        process = processes[json.dumps(engine[:2])]
        return process(prompt=prompt, threads=threads, new_tokens=new_tokens, loop=engine.loop)

    try:
        for engine in engines.values():
            if json.dumps(engine[:2]) not in processes:
                processes[json.dumps(engine[:2])] = started(engine, folder, arguments.peers)
                ask(engine, arguments.threads[0], 2)  # loaded before the next one loads
        for threads in arguments.threads:
            for engine in engines.values():  # the first call also allocates and selects kernels
                ask(engine, threads, 2)
            found: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
            for _ in range(arguments.rounds):
                for name, engine in engines.items():
                    found[name].append(ask(engine, threads, arguments.new_tokens))
            rows += [row(name, threads, answers) for name, answers in found.items()]
    finally:
        for process in processes.values():
            process.end()
    return rows


def row(name: str, threads: int, answers: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of the rounds."""
    rate, cpu_rate = (
        statistics.median(answer["tokens"] / answer[key] for answer in answers) for key in ("seconds", "cpu_seconds")
    )
    return {"engine": name, "threads": threads, "tokens_per_second": round(rate, 2),
            "tokens_per_cpu_second": round(cpu_rate, 2),
            "weights_megabytes": round(max(answer["weight_bytes"] for answer in answers) / 1e6)}  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each engine and number of threads, and how the fastest of each kind compare."""
    lines = [f"{'engine':<40} {'threads':>7} {'tokens/s':>9} {'tokens/CPU-s':>13} {'weights MB':>12}"]
    for found in rows:
        lines.append(
            f"{found['engine']:<40} {found['threads']:>7} {found['tokens_per_second']:>9.2f} "
            f"{found['tokens_per_cpu_second']:>13.2f} {found['weights_megabytes']:>12}"
        )
    most = max(found["threads"] for found in rows)
    rates = {found["engine"]: found["tokens_per_second"] for found in rows if found["threads"] == most}
    fastest = max(rates, key=rates.__getitem__)
    lines.append(f"\nthreads: {most}; fastest: {fastest}, of whose speed have")
    lines += [f"{rate / rates[fastest]:>5.0%}  {name}" for name, rate in sorted(rates.items(), key=lambda r: -r[1])]
    theirs = [rate for name, rate in rates.items() if name.startswith("bitsandbytes nf4")]
    if theirs and "tinyllama_hf nf4" in rates:
        lines.append(
            f"tinyllama_hf nf4 over the best of bitsandbytes nf4: {rates['tinyllama_hf nf4'] / max(theirs):.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, help="folder for the models, kept")
    parser.add_argument("--peers", type=Path, help="folder with xllamacpp; without it, llama.cpp is left out")
    parser.add_argument("--preset", default="1.1b", help="shape of the model")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), metavar="ENGINE")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds")
    parser.add_argument("--name", default="decode", help="of the file in results/")
    parser.add_argument("--serve", metavar="JSON", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(json.loads(arguments.serve))
        return
    if arguments.scratch is None:
        parser.error("--scratch is needed")
    if arguments.peers is None:
        arguments.engines = [name for name in arguments.engines if ENGINES[name].source in ("stock", "ours")]
        print("llama.cpp is left out: --peers is not given")
    from common import save

    rows = measure(arguments, prepared(arguments.scratch, arguments.preset))
    print(table(rows))
    options = {name: getattr(arguments, name) for name in ("preset", "prompt_tokens", "new_tokens", "rounds")}
    print(f"wrote {os.path.relpath(save(arguments.name, {**options, 'rows': rows}))}")


if __name__ == "__main__":
    main()
