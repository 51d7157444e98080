"""Part `quantization`: every quantization of the package, next to bf16; those that need no fallback run as graphs."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measuring import Bench, Figures, endless, graphs_of, release, rounded
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tinyllama_hf import load
from tinyllama_hf.decoding import fixed_memory
from tinyllama_hf.decoding.graphs import reason_not_to_record
from tinyllama_hf.decoding.llama_step import compile_for_generation
from tinyllama_hf.errors import InputError
from tinyllama_hf.quantization.names import QUANTIZATIONS


def write_folder(model: Any, folder: Path) -> None:
    """Writes a model with a tokenizer, which `load` needs, and which no text is given to."""
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def quantizations(bench: Bench) -> Iterator[Figures]:
    """int8, which takes longest, comes after the others; then fp8 with compiled layers."""
    dtype = str(bench.dtype).removeprefix("torch.")
    plain, compiled = bench.model(), dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder:
        write_folder(plain, Path(folder))
        for kind in sorted(QUANTIZATIONS[1:], key=lambda kind: kind == "int8"):
            try:
                model = endless(load(folder, device=bench.device, quantization=kind)[0])
            except InputError as reason:
                yield {"variant": kind, "skipped": str(reason)}
                continue
            yield from compared(bench, plain, model, kind, dtype)
            if kind == "fp8":
                compiled[kind] = model
            del model
            release()
    for kind, model in compiled.items():  # without compilation its casts are extra kernels
        for each in (plain, model):
            compile_for_generation(each)
        yield from compared(bench, plain, model, f"{kind}, compiled", f"{dtype}, compiled", batches=(1,))


def compared(
    bench: Bench, plain: Any, model: Any, kind: str, dtype: str, batches: tuple[int, ...] = (1, 8)
) -> Iterator[Figures]:
    """Rows of a quantized model and of the plain one, in turns."""
    slow = reason_not_to_record(model)
    new_tokens = bench.size(32 if slow else bench.new_tokens, bench.new_tokens)
    for batch in batches:
        calls = {dtype: bench.call(plain, batch, new_tokens), kind: bench.call(model, batch, new_tokens)}
        found = bench.measure(calls, batch * new_tokens, rounds=1 if slow else None)
        speed = {name: row.get("tokens_per_second", 0) for name, row in found.items()}
        more = {"over_plain": rounded(speed[kind] / speed[dtype]) if speed[dtype] else None}
        more |= {"without_graphs": slow} if slow else {"graphs": graphs_of(model)}
        for name, figures in found.items():
            own = plain if name == dtype else model
            size = {"gigabytes_of_weights": rounded(own.get_memory_footprint() / 1e9), "new_tokens": new_tokens}
            yield {"variant": name, "batch": batch, **figures, **size, **(more if name == kind else {})}
    fixed_memory.release(model)
