"""Part `drafts`: a draft of a tenth of its target's device time with chosen agreements, against plain decoding.

The pair is that of benchmarks/speculative.py. Plain decoding is the same engine, with another copy of the target: the
graphs of one model are kept for one draft only.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from measuring import Bench, Call, Figures, graphs_of, release, rounded
from speculative import DRAFT_GEOMETRY, controlled_model, set_agreement

from tests.exactness import left_padded
from tinyllama_hf.decoding import fixed_memory
from tinyllama_hf.decoding.engine import FIXED_DRAFTS
from tinyllama_hf.decoding.proposals import SpeculationStatistics
from tinyllama_hf.decoding.speculative import generate_recorded, speculative_generate


SHARE = 0.1  # of the target's time, which a step of the draft takes
FIRST_TOKENS = 32
TINY = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 1000}  # fmt: skip


class Pair:
    """A target, a copy of it for plain decoding, and a draft."""

    def __init__(self, bench: Bench):
        self.bench, self.statistics = bench, SpeculationStatistics(0)
        self.target = controlled_model(bench.dtype, bench.device, **bench.size({}, TINY))
        self.plain_target = copy.deepcopy(self.target)
        self.target_seconds = self.step_seconds(self.plain_target)
        self.draft = self.choose_draft()

    def choose_draft(self) -> Any:
        """Returns the draft whose step is nearest to a tenth of the target's, by the times of one and four layers."""
        few, many = (self.step_seconds(self.small(layers)) for layers in (1, 4))
        per_layer = max((many - few) / 3, 1e-9)
        self.layers = min(max(round(1 + (SHARE * self.target_seconds - few) / per_layer), 1), 12)
        draft = self.small(self.layers)
        self.draft_seconds = self.step_seconds(draft)
        return draft

    def small(self, layers: int) -> Any:
        """Returns a draft with random weights."""
        geometry = {**DRAFT_GEOMETRY, **self.bench.size({}, TINY), "num_hidden_layers": layers}
        return controlled_model(self.bench.dtype, self.bench.device, **geometry)

    def step_seconds(self, model: Any) -> float:
        """Returns the device's time of a replayed pass over one token at batch 1."""
        self.plain_call(model, 1, 4)()
        seconds = self.bench.replayed_seconds(model, "pass")
        assert seconds is not None
        fixed_memory.release(model)
        return seconds

    def inputs(self, batch: int) -> dict[str, torch.Tensor]:
        """Returns ragged prompts, from half the length to all of it."""
        longest = self.bench.prompt_tokens
        lengths = torch.linspace(longest // 2, longest, batch).long().tolist() if batch > 1 else [longest]
        vocabulary, generator = self.target.config.vocab_size, torch.Generator().manual_seed(batch)
        prompts = [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]
        return {name: tensor.to(self.bench.device) for name, tensor in left_padded(prompts).items()}

    def plain_call(self, model: Any, batch: int, tokens: int) -> Call:
        """Returns a call of the engine without a draft."""
        inputs = self.inputs(batch)

        def run() -> None:
            output = generate_recorded(model, **inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
            assert output is not None, "plain decoding was not recorded"

        return run

    def draft_call(self, batch: int, tokens: int, draft_length: int | None = None) -> Call:
        """Returns a call of the engine with the draft, whose length it chooses by default; keeps the statistics."""
        inputs = self.inputs(batch)

        def run() -> None:
            output = speculative_generate(
                self.target, self.draft, **inputs, draft_length=draft_length, max_new_tokens=tokens,
                do_sample=False, pad_token_id=0, return_dict_in_generate=True,
            )  # fmt: skip
            self.statistics = output.statistics

        return run

    def stock_call(self, tokens: int) -> Call:
        """Returns a call of assisted generation in transformers, at batch 1."""
        inputs, draft = self.inputs(1), self.draft

        def run() -> None:
            draft.generation_config = copy.deepcopy(draft.generation_config)  # it changes with every call
            self.plain_target.generate(**inputs, assistant_model=draft, max_new_tokens=tokens, min_new_tokens=tokens,
                                       do_sample=False, pad_token_id=0)  # fmt: skip

        return run


def drafts(bench: Bench) -> Iterator[Figures]:
    """Batches from small to large, and in each the agreements, which need no new graphs."""
    pair = Pair(bench)
    yield {"variant": "a step at batch 1", "draft_layers": pair.layers,
           "target_milliseconds": rounded(1e3 * pair.target_seconds),
           "draft_milliseconds": rounded(1e3 * pair.draft_seconds),
           "draft_share": rounded(pair.draft_seconds / pair.target_seconds)}  # fmt: skip
    agreements = bench.size((0.6, 0.75, 0.1), (0.75,))
    for batch in bench.size((1, 8, 32), (1, 2)):
        set_agreement(pair.target, pair.draft, agreements[0])
        set_agreement(pair.plain_target, pair.draft, agreements[0])
        yield first_call(pair, batch)
        for length in FIXED_DRAFTS:  # so that no measured call records a step
            pair.draft_call(batch, bench.new_tokens, length)()
        for agreement in agreements:
            set_agreement(pair.target, pair.draft, agreement)
            variant = {"variant": f"agreement {agreement:.0%}", "batch": batch}
            yield {**variant, **compared(pair, batch, bench.new_tokens), "graphs": graphs_of(pair.target)}
            if batch == 1:
                tokens = min(FIRST_TOKENS, bench.new_tokens)
                first = compared(pair, batch, tokens)
                yield {**variant, "variant": f"{variant['variant']}, first {tokens} tokens", **first}
                yield {**variant, "variant": f"{variant['variant']}, stock assisted", **stock(pair, tokens)}
    release()


def first_call(pair: Pair, batch: int) -> Figures:
    """A call whose steps are not recorded yet."""
    fixed_memory.release(pair.target)
    seconds = pair.bench.seconds(pair.draft_call(batch, pair.bench.new_tokens))
    return {"variant": "first call, with recording", "batch": batch, "seconds": rounded(seconds),
            "graphs": graphs_of(pair.target)}  # fmt: skip


def compared(pair: Pair, batch: int, tokens: int) -> Figures:
    """Plain decoding and ours, in turns."""
    bench = pair.bench
    calls = {"plain": pair.plain_call(pair.plain_target, batch, tokens), "ours": pair.draft_call(batch, tokens)}
    found = bench.measure(calls, batch * tokens)
    if errors := [figures["error"] for figures in found.values() if "error" in figures]:
        return {"error": errors[0]}
    speed = {name: figures["tokens_per_second"] for name, figures in found.items()}
    statistics = pair.statistics
    plain, draft = (bench.replayed_seconds(*of) for of in ((pair.plain_target, "pass"), (pair.target, "draft")))
    return {
        **{f"{name}_tokens_per_second": value for name, value in speed.items()},
        "ours_over_plain": rounded(speed["ours"] / speed["plain"]),
        "acceptance": rounded(statistics.acceptance),
        "tokens_per_pass": rounded(statistics.tokens_per_pass),
        "plain_rounds": statistics.plain_rounds,
        "rounds": statistics.target_passes,
        "draft_share": rounded(draft / plain) if draft and plain else None,
    }


def stock(pair: Pair, tokens: int) -> Figures:
    """Assisted generation of transformers: one call, after a short one that selects kernels."""
    pair.stock_call(4)()
    seconds = pair.bench.seconds(pair.stock_call(tokens))
    return {"stock_tokens_per_second": rounded(tokens / seconds)}
