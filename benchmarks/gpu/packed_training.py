"""Parts `full`, `lora` and `qlora`: training steps on packed rows against padded batches, with stock Llama.

A plain loop: for each step the forward passes of its conversations, one clipped step of fused AdamW. Variants take
turns on the same conversations. Tokens per second are those of the conversations, without padding.
"""

import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import Bench, Figures, release, rounded
from packed_attention import VARLEN, reason_to_skip, to_device
from packed_batches import Variant, Workload, real_lengths
from quantization import write_folder
from torch._dynamo.utils import counters
from transformers import LlamaForCausalLM

from tinyllama_hf import TinyLlamaConfig, load
from tinyllama_hf.errors import InputError, one_line
from tinyllama_hf.finetune.packed_rows import PACKED_SDPA, packed_attention_name


ROUNDS, PER_STEP, PASSES = 5, 32, 4  # conversations and forward passes per step


@dataclass
class Measured:
    """What was measured of a variant: its steps together."""

    seconds: float = 0.0
    peak_bytes: int = 0
    graphs: int = 0
    error: str | None = None

    def figures(self, tokens: int) -> Figures:
        """Returns the columns of its row."""
        if self.error:
            return {"error": self.error}
        peak = rounded(self.peak_bytes / 1e9) if self.peak_bytes else None
        return {"tokens_per_second": round(tokens / self.seconds), "peak_gigabytes": peak, "compiled": self.graphs}

    def ratio(self, reference: "Measured | None", variant: Variant) -> Figures:
        """Returns how many times as fast it is as another variant."""
        if self.error or reference is None or reference.error:
            return {}
        return {"ratio": rounded(reference.seconds / self.seconds), "ratio_to": variant.name}


class Training:
    """A model with random weights and its optimizer.

    Args:
        bench (`Bench`): device and size.
        base (`LlamaForCausalLM`): trained as a whole, or under an adapter.
        has_adapter (`bool`): whether to train an adapter of rank 8.
    """

    def __init__(self, bench: Bench, base: LlamaForCausalLM, has_adapter: bool):
        self.bench, self.base, self.model = bench, base.train(), base
        if has_adapter:
            from peft import LoraConfig, get_peft_model

            self.model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        self.parameters = [each for each in self.model.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)

    def checkpoint_activations(self) -> None:
        """Recomputes activations from now on."""
        self.base.gradient_checkpointing_enable({"use_reentrant": False})
        self.base.enable_input_require_grads()

    def step(self, batches: Sequence[dict[str, Any]]) -> None:
        """Trains on all batches with one step of the optimizer."""
        count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        for batch in batches:
            inputs = to_device(batch, self.bench.device)
            with torch.autocast("cuda", torch.bfloat16, enabled=self.bench.device == "cuda"):
                loss = self.model(**inputs, use_cache=False, num_items_in_batch=count).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def rows(self, workload: Workload, variants: Sequence[Variant], rounds: int, **columns: Any) -> Iterator[Figures]:
        """Measures variants in turns, one step each, after a first step of each that allocates and compiles."""
        measured: dict[Variant, Measured] = {}
        for variant in variants:
            start = {"variant": variant.name, "attention": variant.attention, **columns}
            if reason := reason_to_skip(variant.attention, self.bench.device):
                yield {**start, "skipped": reason}
            elif error := self._turn(workload, variant, 0, first := Measured()):
                yield {**start, "error": error}
            else:
                measured[variant] = Measured()
                yield {**start, "first_step_seconds": rounded(first.seconds), "compiled": first.graphs}
        for step in range(1, rounds + 1):
            for variant, found in measured.items():
                found.error = found.error or self._turn(workload, variant, step, found)
        tokens = sum(workload.tokens(step) for step in range(1, rounds + 1))
        reference = measured.get(variants[0])
        for variant, found in measured.items():
            start = {"variant": variant.name, "attention": variant.attention, **columns}
            yield {**start, **found.figures(tokens), **found.ratio(reference, variants[0])}

    def _turn(self, workload: Workload, variant: Variant, step: int, found: Measured) -> str | None:
        """Trains one step, adds what was measured, and returns an error."""
        batches = workload.batches(variant, step)
        self.base.set_attn_implementation(variant.attention)
        on_gpu, before = self.bench.device == "cuda", counters["stats"]["unique_graphs"]
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        try:
            found.seconds += self.bench.seconds(lambda: self.step(batches))
        except Exception as error:  # out of memory, or an attention that fails here; the others are measured
            traceback.print_exc()
            self.optimizer.zero_grad(set_to_none=True)
            release()
            return f"{type(error).__name__}: {one_line(error)[:300]}"
        found.graphs += counters["stats"]["unique_graphs"] - before
        found.peak_bytes = max(found.peak_bytes, torch.cuda.max_memory_allocated() if on_gpu else 0)
        return None


def full(bench: Bench) -> Iterator[Figures]:
    """All weights, in fp32 under autocast to bf16: batches, attention implementations, then recomputed activations."""
    training = Training(bench, stock_llama(bench, torch.float32), has_adapter=False)
    workload, rounds = conversations(bench), bench.size(ROUNDS, 1)
    yield from training.rows(workload, batch_variants(bench), rounds, checkpointing=False)
    yield from training.rows(workload, attention_variants(bench), rounds, checkpointing=False)
    training.checkpoint_activations()
    yield from training.rows(workload, batch_variants(bench), rounds, checkpointing=True)


def lora(bench: Bench) -> Iterator[Figures]:
    """An adapter in fp32 over weights in bf16."""
    training = Training(bench, stock_llama(bench, bench.dtype), has_adapter=True)
    for checkpointing in (False, True):
        if checkpointing:
            training.checkpoint_activations()
        yield from training.rows(conversations(bench), batch_variants(bench), bench.size(ROUNDS, 1),
                                 checkpointing=checkpointing)  # fmt: skip


def qlora(bench: Bench) -> Iterator[Figures]:
    """An adapter over weights in nf4: the memory of 4 conversations of 512 tokens, then the speed of real ones."""
    with tempfile.TemporaryDirectory() as folder:
        write_folder(stock_llama(bench, bench.dtype), Path(folder))
        release()
        try:
            base, _ = load(folder, bench.dtype, bench.device, "nf4", trainable=True)
        except InputError as reason:
            yield {"variant": "nf4", "skipped": str(reason)}
            return
    training = Training(bench, base, has_adapter=True)
    equal = Workload([[(bench.size(512, 32),) * 2] * 8], 4, base.config.vocab_size)
    attention = packed_attention_name(torch.device(bench.device))
    one_pass = Variant("padded, 4 x 512", "random", 1), Variant("packed, 4 x 512", "packed", 1, attention)
    for checkpointing in (False, True):
        if checkpointing:
            training.checkpoint_activations()
        yield from training.rows(equal, one_pass, 1, checkpointing=checkpointing)
    yield from training.rows(conversations(bench), batch_variants(bench), bench.size(3, 1), checkpointing=True)


def stock_llama(bench: Bench, dtype: torch.dtype) -> LlamaForCausalLM:
    """Returns a stock model with random weights on the device."""
    config = TinyLlamaConfig.preset(bench.preset).to_llama()
    with torch.device(bench.device):
        return LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=dtype)


def conversations(bench: Bench) -> Workload:
    """Returns the steps of one epoch of real lengths."""
    vocab_size = TinyLlamaConfig.preset(bench.preset).vocab_size
    return Workload(real_lengths(bench.size(2048, 128)), bench.size(PER_STEP, 16), vocab_size)


def batch_variants(bench: Bench) -> list[Variant]:
    """Returns batches of 8 in random order and sorted, and packed rows with 8 and 32 conversations on average."""
    attention = packed_attention_name(torch.device(bench.device))
    passes = bench.size(PASSES, 2)
    return [
        Variant("padded", "random", passes),
        Variant("sorted", "sorted", passes),
        Variant("packed", "packed", passes, attention),
        Variant("packed, 4 times as long", "packed", max(1, passes // 4), attention),
    ]


def attention_variants(bench: Bench) -> list[Variant]:
    """Returns packed rows with the attention of the package, with rows of a multiple of 128, and with others."""
    passes, own = bench.size(PASSES, 2), packed_attention_name(torch.device(bench.device))
    others = [name for name in ("sdpa", PACKED_SDPA, "flex_attention", "flash_attention_2", VARLEN) if name != own]
    return [
        Variant("packed", "packed", passes, own),
        Variant("packed, multiple of 128", "packed", passes, own, multiple=128),
        *(Variant("packed", "packed", passes, name) for name in others),
    ]
