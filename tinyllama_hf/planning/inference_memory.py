"""Memory of generation, computed in advance: weights, cache, and the largest batch that fits a device.

Nothing is fitted. Weights are counted from the configuration, to the byte that bitsandbytes or torchao stores; the
cache is measured on the object of transformers ([`kv_cache`]); the forward pass over the prompts is run by the real
model on fake tensors ([`memory_engine`]). Not included: the logits of each new token, the buffers of sampling,
allocator overhead, and the CUDA context. `MEMORY_RESERVE` is kept free for them.
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
from ..decoding.rows import row_bucket, slots_of
from ..devices import format_bytes
from ..errors import InputError
from ..quantization.names import GPU_CAPABILITIES, QUANTIZATIONS
from ..quantization.torchao import group_size, stored_bytes
from .kv_cache import CacheSize, cache_size
from .memory_engine import MEMORY_RESERVE, LiveBytes


class Setup(NamedTuple):
    """A model and how it is loaded.

    Attributes:
        config (`TinyLlamaConfig`): the architecture; of weights that were saved quantized, with `quantization_config`.
        dtype (`torch.dtype`): of everything that is not quantized: embeddings, norms, head, activations and cache.
        quantization (`str`): from `choose_quantization`.
        has_graphs (`bool`): whether generation runs as graphs over caches of fixed size, as on an NVIDIA GPU.
    """

    config: TinyLlamaConfig
    dtype: torch.dtype = torch.bfloat16
    quantization: str = "none"
    has_graphs: bool = False


def weight_bytes(setup: Setup) -> int:
    """Returns the bytes of parameters and buffers after `load`, including quantization scales. Needs neither
    bitsandbytes nor torchao.

    On a CPU with AVX512_BF16 the first forward pass adds the scales of 4-bit weights in a second layout: 2 bytes per
    64 weights.
    """
    config = copy.deepcopy(setup.config)  # transformers writes the type into it
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=setup.dtype)
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if setup.quantization == "none":
        return held
    saved = _saved_quantization(config)
    # `load` quantizes the scales as well; bitsandbytes does so only on request.
    nested = saved.get("bnb_4bit_use_double_quant", not saved)
    plain = saved.get("llm_int8_skip_modules")
    # The output embedding is outside the inner model and is not quantized.
    linear = [
        module.weight
        for name, module in model.model.named_modules(prefix="model")
        if isinstance(module, nn.Linear) and should_convert_module(name, plain)
    ]
    if setup.quantization in GPU_CAPABILITIES:
        group = group_size(config) if setup.quantization == "int4" else None
        sizes = [stored_bytes(setup.quantization, weight.shape, group) for weight in linear]
    else:
        sizes = [_quantized_bytes(weight, setup.quantization, nested) for weight in linear]
    return held + sum(sizes) - sum(weight.nbytes for weight in linear)


def _saved_quantization(config: TinyLlamaConfig) -> dict[str, Any]:
    """Returns `quantization_config` of weights that were saved quantized, empty if they were not."""
    return getattr(config, "quantization_config", None) or {}


def _quantized_bytes(weight: torch.Tensor, quantization: str, nested: bool) -> int:
    """Returns the bytes that bitsandbytes stores for a weight of `[out_features, in_features]`."""
    if quantization == "int8":
        return weight.numel() + 4 * weight.shape[0]  # an fp32 scale per row
    blocks = math.ceil(weight.numel() / 64)
    # Per 64 weights one scale: in fp32, or in a byte, with an fp32 scale per 256 scales, their fp32 mean and a table.
    scales = blocks + 4 * (math.ceil(blocks / 256) + 1 + 256) if nested else 4 * blocks
    return math.ceil(weight.numel() / 2) + scales + 4 * 16  # and the table of the 16 values


def prefill_bytes(setup: Setup, batch: int, context: int) -> int | None:
    """Returns the peak of the forward pass over prompts that fill the context, without weights and cache.

    Equal to what torch's allocator hands out on a CPU, except for scratch memory inside kernels. With 4-bit weights a
    kernel may hold one dequantized weight at a time. `None` for int8, int4 and fp8, where the memory of a product is
    not known.
    """
    if setup.quantization not in ("none", "nf4", "fp4"):
        return None
    config = copy.deepcopy(setup.config)
    config.num_hidden_layers = min(2, config.num_hidden_layers)  # the peak is the same in every further layer
    with FakeTensorMode(), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, dtype=setup.dtype).eval()
        ids, mask = torch.ones(2, batch, context, dtype=torch.long)  # prompts of different lengths have a mask
        with LiveBytes() as live:
            live.count([ids, mask, *model.parameters(), *model.buffers()], "given")
            output = model(ids, attention_mask=mask, logits_to_keep=1, use_cache=True)
    peak, layers = live.peaks[live.phase], output.past_key_values.layers
    return peak.total() - peak["given"] - sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


class BatchMemory(NamedTuple):
    """Bytes of a batch: of [`weight_bytes`], [`cache_size`], [`held_cache`] and [`prefill_bytes`]."""

    setup: Setup
    weights: int
    cache: CacheSize
    held: CacheSize
    prefill: int | None

    @property
    def total(self) -> int:
        """Weights and cache: what is held throughout."""
        return self.weights + self.held.total


def held_cache(setup: Setup, batch: int, context: int) -> CacheSize:
    """Returns the size of the cache that generation holds: on an NVIDIA GPU of fixed size, for a bucket of rows."""
    if not setup.has_graphs:
        return cache_size(setup.config, batch, context, setup.dtype)
    slots = slots_of(context, setup.config.max_position_embeddings, LONGEST_DRAFT)
    return cache_size(setup.config, row_bucket(batch), slots, setup.dtype)


def batch_memory(setup: Setup, batch: int, context: int) -> BatchMemory:
    """Computes the memory of a batch.

    Args:
        setup (`Setup`): the model and how it is loaded.
        batch (`int`): sequences at a time.
        context (`int`): tokens per sequence, prompt and continuation.

    Raises:
        InputError: if a value is out of range.
    """
    limit = setup.config.max_position_embeddings
    if batch < 1:
        raise InputError(f"--batch {batch}: must be at least 1")
    if not 1 <= context <= limit:
        raise InputError(f"--context {context}: must be between 1 and {limit}, the model's context")
    cache = cache_size(setup.config, batch, context, setup.dtype)
    held = held_cache(setup, batch, context)
    return BatchMemory(setup, weight_bytes(setup), cache, held, prefill_bytes(setup, batch, context))


def largest_batch(setup: Setup, context: int, usable: int, with_prefill: bool = False) -> int:
    """Returns the largest batch whose weights and cache fit.

    Args:
        setup (`Setup`): the model and how it is loaded.
        context (`int`): tokens per sequence.
        usable (`int`): bytes.
        with_prefill (`bool`, *optional*, defaults to `False`): the forward pass over full prompts has to fit, too.
    """
    weights = weight_bytes(setup)

    def needed(batch: int) -> int:
        cache = held_cache(setup, batch, context).total
        return weights + cache + ((prefill_bytes(setup, batch, context) or 0) if with_prefill else 0)

    one = cache_size(setup.config, 1, context, setup.dtype).total
    return bisect.bisect_right(range(1, max(usable - weights, 0) // one + 2), usable, key=needed)


def memory_lines(name: str, found: BatchMemory) -> list[str]:
    """Describes the memory of a batch.

    Args:
        name (`str`): of the model, with the source of its architecture.
        found (`BatchMemory`): from [`batch_memory`].
    """
    setup, cache = found.setup, found.cache
    held = dtype = str(setup.dtype).removeprefix("torch.")
    if setup.quantization != "none":
        held = f"{setup.quantization}; {format_bytes(weight_bytes(setup._replace(quantization='none')))} in {dtype}"
    text = [
        f"model       {name}",
        f"weights     {format_bytes(found.weights)} ({held})",
        f"cache       {format_bytes(cache.total)} ({dtype}): {cache.per_token:,.0f} bytes per token, "
        f"{format_bytes(cache.per_request)} per request of {cache.tokens:,} tokens, {cache.requests:,} requests",
    ]
    heads = setup.config.num_attention_heads
    times = heads / (setup.config.num_key_value_heads or heads)
    if times > 1:
        text.append(
            f"            {format_bytes(times * cache.total)} if each of the {heads} heads had its own keys and "
            f"values: {times * cache.per_token:,.0f} bytes per token, {times:.3g} times as much"
        )
    if setup.has_graphs:
        text.append(
            f"graphs      {format_bytes(found.held.total)} of cache, since it has a fixed size on a GPU: "
            f"{found.held.requests:,} rows of {found.held.tokens:,} tokens"
        )
    text.append(f"total       {format_bytes(found.total)} of weights and cache")
    prefill = f"not included: the memory that products with {setup.quantization} weights need is not known"
    if found.prefill is not None:
        prefill = f"{format_bytes(found.prefill)} more while prompts of {cache.tokens:,} tokens are read at once"
    return [*text, f"prefill     {prefill}"]


def fit_lines(found: BatchMemory, available: int, device: str) -> list[str]:
    """Describes the largest batches that fit a device.

    Args:
        found (`BatchMemory`): from [`batch_memory`].
        available (`int`): bytes of the device.
        device (`str`): its name.
    """
    usable, tokens = _usable(available), found.cache.tokens
    fits = f"up to {largest_batch(found.setup, tokens, usable):,} sequences of {tokens:,} tokens"
    if found.prefill is not None:
        full = largest_batch(found.setup, tokens, usable, with_prefill=True)
        fits += f"; {full:,} if full prompts are read at once"
    kept = f"{format_bytes(usable)} of {format_bytes(available)}, less {MEMORY_RESERVE:.0%}"
    return [f"device      {device}: {kept}", f"fits        {fits}"]


def check_batch(found: BatchMemory, available: int) -> None:
    """Refuses a batch that does not fit with its weights and cache.

    Args:
        found (`BatchMemory`): from [`batch_memory`].
        available (`int`): bytes of the device.

    Raises:
        InputError: with the largest batch that fits, unchanged and with each smaller quantization.
    """
    usable, setup, cache = _usable(available), found.setup, found.cache
    if found.total <= usable:
        return
    fitting = largest_batch(setup, cache.tokens, usable)
    better: dict[int, str] = {}
    # Not int4 and fp8: they are larger than nf4 and int8, and need a GPU.
    kinds = [kind for kind in QUANTIZATIONS if kind not in GPU_CAPABILITIES]
    for kind in () if _saved_quantization(setup.config) else kinds:
        better.setdefault(largest_batch(setup._replace(quantization=kind), cache.tokens, usable), kind)
    others = "".join(f", {size:,} with --quantization {kind}" for size, kind in better.items() if size > fitting)
    raise InputError(
        f"--batch {cache.requests}: weights and cache take {format_bytes(found.total)}, and {format_bytes(usable)} "
        f"can be used; the largest batch that fits is {fitting:,}{others}"
    )


def check_fits(model: PreTrainedModel, batch_size: int, context: int, draft: Proposer | None = None) -> None:
    """Refuses a batch if its keys and values cannot fit the free memory of the device of a loaded model.

    Args:
        model (`PreTrainedModel`): a Llama, quantized or not.
        batch_size (`int`): sequences at a time.
        context (`int`): tokens of the longest sequence, prompt and continuation.
        draft (`Proposer`, *optional*): loaded as well; a draft model has its own keys and values.

    Raises:
        InputError: with the largest batch size that fits.
    """
    usable = _usable(free_memory(model.device))
    models: list[Any] = [model]
    if isinstance(draft, ModelProposer):
        models.append(draft.model)
    slots, rows = num_slots(context + LONGEST_DRAFT if draft else context), batch_size
    if model.device.type == "cuda":
        slots, rows = slots_of(context, model.config.max_position_embeddings, LONGEST_DRAFT), row_bucket(batch_size)
    needed = sum(cache_size(each.config, rows, slots, each.dtype).total for each in models)
    if needed > usable:
        largest = usable * batch_size // needed
        fix = f"the largest that fits is {largest:,}" if largest else "not even 1 fits; shorten the sequences"
        where = " in model and draft" if len(models) > 1 else ""
        raise InputError(
            f"--batch-size {batch_size}: keys and values of {context:,} tokens each{where} take "
            f"{format_bytes(needed)}, and {format_bytes(usable)} of {model.device} can be used; {fix}"
        )


def free_memory(device: torch.device) -> int:
    """Returns the bytes that are free on a device; on a CPU without swapping and within the limit of a container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(min(psutil.virtual_memory().available, _container_free()))


def _usable(available: int) -> int:
    return int((1 - MEMORY_RESERVE) * available)


def _container_free(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Returns what the limit of the container leaves; psutil (7.2) reports only the memory of the whole machine."""
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
