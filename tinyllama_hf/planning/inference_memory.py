"""Memory of generation, worked out before it is needed: weights, cache, and the largest batch that fits a device.

Nothing here is fitted. Weights are counted from the configuration, byte for byte as bitsandbytes holds them; the cache is
measured on the library's own object (`kv_cache.py`); the forward pass of a prompt is run by the real model on tensors
without storage. Not in it: the logits of each new token, what sampling sorts, the allocator's losses, and on a GPU the CUDA
context, for all of which `MEMORY_RESERVE` is left.
"""

import bisect
import copy
import math
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from ..configuration_tinyllama import TinyLlamaConfig
from ..decoding.engine import LONGEST_DRAFT
from ..decoding.proposals import ModelProposer, Proposer
from ..decoding.ragged_cache import num_slots
from ..devices import format_bytes
from ..errors import InputError
from ..quantization.bitsandbytes import QUANTIZATIONS
from .kv_cache import CacheSize, cache_size, multi_head
from .memory_engine import LiveBytes


MEMORY_RESERVE = 0.1  # of a device


class Setup(NamedTuple):
    """What a model generates with.

    Attributes:
        config (`TinyLlamaConfig`): the architecture; if the weights were saved quantised, with how in `quantization_config`.
        dtype (`torch.dtype`): of what is not quantised: embeddings, norms, head, activations, and the cache by default.
        quantization (`str`): from `choose_quantization`.
    """

    config: TinyLlamaConfig
    dtype: torch.dtype = torch.bfloat16
    quantization: str = "none"


def weight_bytes(setup: Setup) -> int:
    """Bytes of parameters and buffers as `load` holds them, with the scales of quantised ones; needs no bitsandbytes.

    On a CPU with AVX512_BF16 the first pass adds the scales of 4-bit weights in another layout: 2 bytes for 64 weights.
    """
    config = copy.deepcopy(setup.config)  # the library notes the type in it
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=setup.dtype)
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if setup.quantization == "none":
        return held
    saved = _saved_quantization(config)
    nested = saved.get("bnb_4bit_use_double_quant", not saved)  # `load` quantises scales too, the library if told
    plain = saved.get("llm_int8_skip_modules")
    # The output embedding, outside the inner model, is not quantised.
    linear = [module.weight for name, module in model.model.named_modules(prefix="model")
              if isinstance(module, nn.Linear) and should_convert_module(name, plain)]  # fmt: skip
    return held + sum(_quantized_bytes(weight, setup.quantization, nested) - weight.nbytes for weight in linear)


def _saved_quantization(config: TinyLlamaConfig) -> dict[str, Any]:
    """The library's configuration of weights that were saved quantised, empty if they were not."""
    return getattr(config, "quantization_config", None) or {}


def _quantized_bytes(weight: torch.Tensor, quantization: str, nested: bool) -> int:
    """Bytes that bitsandbytes holds for a weight of `[out_features, in_features]`."""
    if quantization == "int8":
        return weight.numel() + 4 * weight.shape[0]  # a scale in fp32 for each row
    blocks = math.ceil(weight.numel() / 64)
    # A scale of 64 weights takes a byte, with an fp32 scale for 256 of these, their fp32 mean and a table; or it is fp32.
    scales = blocks + 4 * (math.ceil(blocks / 256) + 1 + 256) if nested else 4 * blocks
    return math.ceil(weight.numel() / 2) + scales + 4 * 16  # and the table of values


def prefill_bytes(setup: Setup, batch: int, context: int) -> int | None:
    """Bytes beside weights and cache at the height of the pass that reads prompts which fill the context, at once.

    The model runs on tensors without storage, and what lives of them is counted: the bytes of torch's allocator on a CPU
    (`tests/planning/test_inference_memory.py` holds them to a real pass), scratch of single kernels aside. `None` for int8, whose
    products take more; 4-bit ones may have a dequantised weight beside, one at a time.
    """
    if setup.quantization == "int8":
        return None
    config = copy.deepcopy(setup.config)
    config.num_hidden_layers = min(2, config.num_hidden_layers)  # each further layer is as high as the second
    with FakeTensorMode(), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, dtype=setup.dtype).eval()
        ids, mask = torch.ones(2, batch, context, dtype=torch.long)  # a mask, as prompts of different lengths have
        with LiveBytes() as live:
            live.count([ids, mask, *model.parameters(), *model.buffers()], "given")
            output = model(ids, attention_mask=mask, logits_to_keep=1, use_cache=True)
    peak = live.peaks[live.phase]
    return (
        peak.total()
        - peak["given"]
        - sum(layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers)
    )


class Memory(NamedTuple):
    """Bytes of a batch; see [`weight_bytes`], [`cache_size`] and [`prefill_bytes`]."""

    setup: Setup
    weights: int
    cache: CacheSize
    prefill: int | None

    @property
    def total(self) -> int:
        """Weights and cache: what is held to the end."""
        return self.weights + self.cache.total


def memory(setup: Setup, batch: int, context: int) -> Memory:
    """Works out the memory of a batch.

    Args:
        setup (`Setup`): the model, and how it is held.
        batch (`int`): sequences at a time.
        context (`int`): tokens of each, prompt and continuation.

    Raises:
        InputError: if a value is out of range, there is no such quantization.
    """
    limit = setup.config.max_position_embeddings
    if batch < 1:
        raise InputError(f"--batch {batch}: must be at least 1")
    if not 1 <= context <= limit:
        raise InputError(f"--context {context}: must lie between 1 and {limit}, the model's context")
    cache = cache_size(setup.config, batch, context, setup.dtype)
    return Memory(setup, weight_bytes(setup), cache, prefill_bytes(setup, batch, context))


def largest_batch(setup: Setup, context: int, usable: int, with_prefill: bool = False) -> int:
    """The largest batch whose weights and cache fit, and with `with_prefill` the pass that reads full prompts too.

    Args:
        setup (`Setup`): the model, and how it is held.
        context (`int`): tokens of a sequence.
        usable (`int`): bytes.
    """
    weights = weight_bytes(setup)

    def needed(batch: int) -> int:
        cache = cache_size(setup.config, batch, context, setup.dtype).total
        return weights + cache + ((prefill_bytes(setup, batch, context) or 0) if with_prefill else 0)

    one = cache_size(setup.config, 1, context, setup.dtype).total
    return bisect.bisect_right(range(1, max(usable - weights, 0) // one + 2), usable, key=needed)


def lines(name: str, found: Memory) -> list[str]:
    """What a batch takes, as text.

    Args:
        name (`str`): of the model, with the source of its architecture.
        found (`Memory`): from [`memory`].
    """
    setup, cache = found.setup, found.cache
    dtype = str(setup.dtype).removeprefix("torch.")
    held = dtype
    if setup.quantization != "none":
        held = f"{setup.quantization}; {format_bytes(weight_bytes(setup._replace(quantization='none')))} in {dtype}"
    text = [
        f"model       {name}",
        f"weights     {format_bytes(found.weights)} ({held})",
        f"cache       {format_bytes(cache.total)} ({dtype}): {cache.per_token:,.0f} bytes a token, "
        f"{format_bytes(cache.per_request)} a request of {cache.tokens:,} tokens, {cache.requests:,} requests",
    ]
    if setup.config.num_key_value_heads < setup.config.num_attention_heads:
        every = cache_size(multi_head(setup.config), cache.requests, cache.tokens, setup.dtype)
        text.append(
            f"            {format_bytes(every.total)} if each of the {setup.config.num_attention_heads} heads had its own keys and "
            f"values: {every.per_token:,.0f} bytes a token, {every.total / cache.total:.3g} times as much"
        )
    text.append(f"total       {format_bytes(found.total)} of weights and cache")
    if found.prefill is None:
        return [*text, "prefill     not contained: what bitsandbytes takes within an int8 product is not known here"]
    return [
        *text,
        f"prefill     {format_bytes(found.prefill)} more for a moment where prompts of {cache.tokens:,} tokens are read at once",
    ]


def fit_lines(found: Memory, available: int, device: str) -> list[str]:
    """The largest batches that fit a device, as text.

    Args:
        found (`Memory`): from [`memory`].
        available (`int`): bytes of the device.
        device (`str`): in words.
    """
    usable, tokens = _usable(available), found.cache.tokens
    text = f"fits        up to {largest_batch(found.setup, tokens, usable):,} sequences of {tokens:,} tokens"
    if found.prefill is not None:
        full = largest_batch(found.setup, tokens, usable, with_prefill=True)
        text += f"; {full:,} where full prompts are read at once"
    return [
        f"device      {device}: {format_bytes(usable)} of {format_bytes(available)}, less {MEMORY_RESERVE:.0%}",
        text,
    ]


def check_batch(found: Memory, available: int) -> None:
    """Refuses a batch whose weights and cache do not fit.

    Args:
        found (`Memory`): from [`memory`].
        available (`int`): bytes of the device.

    Raises:
        InputError: naming the largest batch that fits, as asked and with what takes less.
    """
    usable, setup, cache = _usable(available), found.setup, found.cache
    if found.total <= usable:
        return
    fitting = largest_batch(setup, cache.tokens, usable)
    kinds = () if _saved_quantization(setup.config) else QUANTIZATIONS
    changes = {f"--quantization {name}": setup._replace(quantization=name) for name in kinds}
    better: dict[int, str] = {}
    for option, changed in changes.items():
        better.setdefault(largest_batch(changed, cache.tokens, usable), option)
    others = "".join(f", {largest:,} with {option}" for largest, option in better.items() if largest > fitting)
    raise InputError(
        f"--batch {cache.requests}: takes {format_bytes(found.total)} of weights and cache, and {format_bytes(usable)} can be used; "
        f"the largest that fits is {fitting:,}{others}"
    )


def check_fits(model: PreTrainedModel, batch_size: int, context: int, draft: Proposer | None = None) -> None:
    """Refuses a batch whose keys and values cannot fit the free memory of a loaded model's device.

    Args:
        model (`PreTrainedModel`): a Llama, quantised or not.
        batch_size (`int`): sequences at a time.
        context (`int`): tokens of the longest, prompt and continuation.
        draft (`Proposer`, *optional*): loaded too; where it is a model it keeps keys and values of its own.

    Raises:
        InputError: naming `--batch-size` and the largest that fits.
    """
    usable = _usable(free_memory(model.device))
    models = [model]
    if isinstance(draft, ModelProposer):
        models.append(draft.model)
    slots = num_slots(context + LONGEST_DRAFT if draft else context)
    needed = sum(cache_size(each.config, batch_size, slots, each.dtype).total for each in models)
    if needed > usable:
        largest = usable * batch_size // needed
        fix = f"the largest that fits is {largest:,}" if largest else "not even 1 fits; shorten the sequences"
        whose = " in model and draft" if len(models) > 1 else ""
        raise InputError(
            f"--batch-size {batch_size}: keys and values of {context:,} tokens each{whose} take {format_bytes(needed)}, and "
            f"{format_bytes(usable)} of {model.device} can be used; {fix}"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device now; on a CPU without swapping, and within the limit of a container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(min(psutil.virtual_memory().available, _container_free()))


def _usable(available: int) -> int:
    return int((1 - MEMORY_RESERVE) * available)


def _container_free(root: Path = Path("/sys/fs/cgroup")) -> float:
    """What the limit of a container leaves; psutil (7.2) sees the whole machine's memory alone."""
    for limit, used, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            allowed, taken = ((root / name).read_text(encoding="ascii").strip() for name in (limit, used))
            statistics = (root / limit).with_name("memory.stat").read_text(encoding="ascii")
        except OSError:
            continue
        if allowed.isdigit():  # else "max"
            reclaimable = dict(line.split() for line in statistics.splitlines())[cached]
            return int(allowed) - int(taken) + int(reclaimable)
    return math.inf
