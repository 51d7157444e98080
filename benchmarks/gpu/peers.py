"""Part `peers`: how transformers generates with the same weights, next to ours.

The static cache is compiled, which takes tens of seconds per batch size.
"""

from collections.abc import Iterator
from typing import Any

import torch
from measuring import Bench, Call, Figures, endless, release, rounded
from transformers import GenerationConfig, LlamaForCausalLM
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from tinyllama_hf.errors import one_line


CACHE_BLOCK = 256  # tokens


def peers(bench: Bench) -> Iterator[Figures]:
    """Rows of ours and of stock Llama."""
    ours = bench.model()
    with torch.device(bench.device):
        stock = LlamaForCausalLM(ours.config.to_llama()).to(bench.dtype).eval()
    stock.load_state_dict(ours.state_dict())
    endless(stock)
    for batch in bench.size((1, 8, 64), (1, 2)):
        calls = {"ours": bench.call(ours, batch), "growing cache": bench.call(stock, batch)}
        found = bench.measure(calls, batch * bench.new_tokens, rounds=1)
        yield from ({"variant": name, "batch": batch, **figures} for name, figures in found.items())
    order = ((1, "static"), (8, "continuous"), (64, "continuous"), (8, "static"))
    for batch, kind in bench.size(order, ((2, "static"), (2, "continuous"))):
        if kind == "static":
            name, call = "static cache, compiled", bench.call(stock, batch, cache_implementation="static")
        else:
            name, call = "continuous batching", continuous(bench, stock, batch)
        yield {"variant": name, "batch": batch, **with_first(bench, call, batch)}
        stock.destroy_cached_continuous_batching_manager()
        release()


def with_first(bench: Bench, call: Call, batch: int) -> Figures:
    """The first call, which compiles or records, and the faster of two later ones."""
    try:
        first, *later = (bench.seconds(call) for _ in range(3))
    except Exception as error:  # of a peer
        return {"error": f"{type(error).__name__}: {one_line(error)}"[:300]}
    speed = batch * bench.new_tokens / min(later)
    return {"tokens_per_second": rounded(speed), "seconds": rounded(min(later)), "first_call_seconds": rounded(first)}


def continuous(bench: Bench, model: Any, batch: int) -> Call:
    """Returns a call of `generate_batch`, with room for these prompts; its manager is kept from the first call on."""
    ids = bench.prompts(batch).remainder(model.config.vocab_size).tolist()
    tokens = bench.prompt_tokens + bench.new_tokens
    settings = ContinuousBatchingConfig(
        num_blocks=batch * (tokens // CACHE_BLOCK + 2), max_batch_tokens=batch * bench.prompt_tokens
    )
    options = GenerationConfig(max_new_tokens=bench.new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def run() -> None:
        found = model.generate_batch(
            ids, generation_config=options, continuous_batching_config=settings, persistent_manager=True
        )
        counts = [len(output.generated_tokens) for output in found.values()]
        assert counts == [bench.new_tokens] * batch, f"new tokens: {counts}"

    return run
