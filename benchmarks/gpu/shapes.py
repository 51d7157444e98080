"""Parts `samples` and `heads`: many samples of a prompt, and one key/value head for all, per group or per head.

TinyLlama published 7094.5 tokens/s for 100 prompts with 10 samples each in vLLM on an A40, without lengths.
"""

from collections.abc import Iterator

from measuring import Bench, Figures

from tinyllama_hf import TinyLlamaConfig


def samples(bench: Bench) -> Iterator[Figures]:
    """100 prompts with 10 samples each."""
    prompts, number = bench.size((100, 10), (3, 2))
    drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "num_return_sequences": number}
    call = bench.call(bench.model(), prompts, **drawn)
    figures = bench.measure({"": call}, prompts * number * bench.new_tokens)[""]
    yield {"variant": f"{number} samples each", "batch": prompts, **figures}


def heads(bench: Bench) -> Iterator[Figures]:
    """At equal model size: the MLP gets what the smaller key and value projections save."""
    grouped = TinyLlamaConfig.preset(bench.preset)
    number, head_dim = grouped.num_attention_heads, grouped.hidden_size // grouped.num_attention_heads
    models = {}
    for name, kv_heads in (("multi-query", 1), ("grouped-query", grouped.num_key_value_heads), ("multi-head", number)):
        saved = 2 * head_dim * (grouped.num_key_value_heads - kv_heads) / 3  # of three projections of the MLP
        inner = 16 * round((grouped.intermediate_size + saved) / 16)
        models[name] = bench.model(num_key_value_heads=kv_heads, intermediate_size=inner)
    for batch in bench.size((1, 32, 128), (1, 2)):
        calls = {name: bench.call(model, batch) for name, model in models.items()}
        found = bench.measure(calls, batch * bench.new_tokens)
        for name, figures in found.items():
            config, parameters = models[name].config, models[name].num_parameters()
            sizes = {"key_value_heads": config.num_key_value_heads, "parameters": parameters}
            sizes["cache_bytes_per_token"] = models[name].kv_cache_bytes_per_token(bench.dtype)
            yield {"variant": name, "batch": batch, **figures, **sizes}
