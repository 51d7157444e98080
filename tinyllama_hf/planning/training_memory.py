"""Memory of a training step at its highest moment, by part.

A step of the real model (forward pass, backward pass, AdamW) runs on fake tensors ([`memory_engine`]) with two and
with three layers. Each further layer adds as much as the third. What DDP and FSDP2 add and split is computed on top.
Nothing is fitted; `benchmarks/plan_memory.py` compares the estimate with measured steps. Not included: what
[`memory_engine`] does not count, and a dense document mask.
"""

import contextlib
import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaForCausalLM

from .. import losses
from ..configuration_tinyllama import TinyLlamaConfig
from ..modeling_tinyllama import TinyLlamaForCausalLM
from ..pretrain.launch import UNPACKED_SDPA
from ..pretrain.setup import shapes_only
from .memory_engine import LiveBytes, compile_layers, liger_kernels


Sharding = Literal["none", "ddp", "fsdp"]
# What is counted, and its name in a plan.
PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "buffers": "communication",
    "copies": "bf16 copies of weights",
    "activations": "activations",
    "loss": "logits and loss",
}


class Layout(NamedTuple):
    """The settings of a step.

    Args:
        micro_batch_size (`int`): sequences of a forward pass.
        sequence_length (`int`): tokens of a sequence.
        precision (`str`): `"fp32"`, or `"bf16"`: autocast over fp32 weights.
        activation_checkpointing (`bool`): layers keep only their input and are computed again.
        attention (`str`): as in the recipe; all but `"eager"` are estimated as `"sdpa"`.
        compiled (`bool`): each layer is compiled.
        kernels (`str`): as in the recipe. Layers with `"liger"` are never compiled here, since its kernels break the
            graph.
        accumulates (`bool`): a step has several micro-batches: gradients exist from the second one on.
        loss (`str`): `"chunked"`, that of `TinyLlamaForCausalLM`, or `"stock"`, that of `LlamaForCausalLM`.
        sharding (`str`): `"none"`, `"ddp"`, or `"fsdp"`: FSDP2, resharded after the forward pass.
        num_shards (`int`): number of devices that share the weights.
        device_type (`str`): `"cpu"` or `"cuda"`.
    """

    micro_batch_size: int
    sequence_length: int
    precision: str = "fp32"
    activation_checkpointing: bool = False
    attention: str = "sdpa"
    compiled: bool = False
    kernels: str = "none"
    accumulates: bool = False
    loss: Literal["chunked", "stock"] = "chunked"
    sharding: Sharding = "none"
    num_shards: int = 1
    device_type: str = "cpu"


@dataclass(frozen=True)
class StepMemory:
    """The highest moment of a step, and the bytes of each of `PARTS` at that moment."""

    moment: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())


def step_memory(config: TinyLlamaConfig, layout: Layout) -> StepMemory:
    """Computes the highest moment of a step, after the first step, which creates the states of the optimizer.

    Args:
        config (`TinyLlamaConfig`): the model.
        layout (`Layout`): the step.
    """
    # FSDP2 gathers weights in bf16, which makes the residual stream bf16, too.
    in_bf16 = layout.sharding == "fsdp" and layout.precision == "bf16"
    plain = layout._replace(sharding="none", num_shards=1)
    peaks = _peaks(config.to_json_string(), plain, torch.bfloat16 if in_bf16 else torch.float32)
    moments = [StepMemory(phase, _shard(parts, config, layout)) for phase, parts in peaks.items()]
    return max(moments, key=lambda memory: memory.total)


def _shard(traced: Counter[str], config: TinyLlamaConfig, layout: Layout) -> dict[str, int]:
    """Returns the parts per device, from those of one process."""
    parts = {part: traced[part] for part in PARTS}
    if layout.sharding == "none":
        return parts
    total, layer = _num_parameters(config.to_json_string())
    if layout.sharding == "ddp":
        return parts | {"buffers": 4 * total}  # buckets with a copy of every gradient
    # FSDP2 gathers the current layer and the next one, in the type of the products, and keeps embedding and head
    # gathered throughout the step. Gathering needs a buffer in addition to the weights. The full gradients of the
    # current layer exist twice: as autograd computes them, and in the fp32 buffer of the reduction.
    outside = total - config.num_hidden_layers * layer
    itemsize, shards = 2 if layout.precision == "bf16" else 4, layout.num_shards
    return parts | {
        "weights": 4 * total // shards,
        "gradients": 4 * traced["gradients"] // itemsize // shards,
        "optimizer": 8 * total // shards,
        "buffers": itemsize * (3 * layer + outside) + (4 + itemsize) * layer + itemsize * outside,
    }


@functools.lru_cache(maxsize=64)
def _num_parameters(config_json: str) -> tuple[int, int]:
    """Returns the numbers of parameters of the model and of one layer."""
    model = shapes_only(TinyLlamaConfig.from_dict(json.loads(config_json)))
    total, layer = (sum(p.numel() for p in part.parameters()) for part in (model, model.model.layers[0]))
    return total, layer


@functools.lru_cache(maxsize=64)
def _peaks(config_json: str, layout: Layout, dtype: torch.dtype) -> dict[str, Counter[str]]:
    """Returns the bytes by part at the highest moment of each phase, for one process."""
    config = TinyLlamaConfig.from_dict(json.loads(config_json))
    layers = config.num_hidden_layers
    config.num_hidden_layers = min(layers, 3)
    with FakeTensorMode(), _kernels(config, layout):
        step = _Step(config, layout, dtype)
        if layers <= 3:
            return step.peaks(layers)
        three, two = step.peaks(3), step.peaks(2)
    # Of the layers between the first and the last none is higher than both.
    return {
        phase: Counter(
            {part: two[phase][part] + (layers - 2) * (three[phase][part] - two[phase][part]) for part in PARTS}
        )
        for phase in two
    }


@contextlib.contextmanager
def _kernels(config: TinyLlamaConfig, layout: Layout) -> Iterator[None]:
    """Uses the kernels of the device of the step."""
    rows, real = losses.ROWS[layout.device_type], losses._losses_and_gradients

    def two_blocks(logits: torch.Tensor, labels: torch.Tensor, found: torch.Tensor, wants_gradients: bool) -> None:
        # Every chunk of tokens and every block of rows in it allocates as much as the second one.
        if found.storage_offset() < 2 * len(found):
            real(logits[: 2 * rows], labels[: 2 * rows], found[: 2 * rows], wants_gradients)

    # The fused kernels for fp32 on a GPU do not support grouped heads; torch then computes the attention weights.
    grouped = config.num_key_value_heads != config.num_attention_heads
    unfused = layout.device_type == "cuda" and layout.precision == "fp32" and grouped
    with (
        patch.dict(losses.ROWS, cpu=rows),
        patch.object(losses, "_losses_and_gradients", two_blocks),
        sdpa_kernel(SDPBackend.MATH) if unfused else contextlib.nullcontext(),
    ):
        yield


class _Step:
    """A training step on fake tensors."""

    def __init__(self, config: TinyLlamaConfig, layout: Layout, dtype: torch.dtype):
        self.layout, self.live = layout, LiveBytes()
        attention = "eager" if layout.attention == "eager" else UNPACKED_SDPA
        is_stock = layout.loss == "stock"
        kind, built = (LlamaForCausalLM, config.to_llama()) if is_stock else (TinyLlamaForCausalLM, config)
        self.model: Any = kind._from_config(built, attn_implementation=attention, dtype=dtype).train()
        if layout.activation_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if layout.compiled and layout.kernels == "none":
            compile_layers(self.model, lambda: self.live)
            self._loss()  # traces the layers; what tracing keeps is not counted
        self._watch_phases()

    def _watch_phases(self) -> None:
        def enters(output: torch.Tensor, phase: Callable[[], str]) -> None:
            output.register_hook(lambda _: self._enter(phase()))

        inner = self.model.model
        inner.norm.register_forward_pre_hook(lambda *_: self._enter("the loss, forward"))
        inner.embed_tokens.register_forward_hook(lambda *call: enters(call[2], lambda: "the end of the backward pass"))
        for index, layer in enumerate(inner.layers):
            layer.register_forward_hook(lambda *call, index=index: enters(call[2], lambda: self._backward_of(index)))

    def _backward_of(self, index: int) -> str:
        names = {0: "first", len(self.model.model.layers) - 1: "last"}
        return f"the backward pass of the {names.get(index, 'next')} layer"

    def _enter(self, phase: str) -> None:
        self.live.phase = phase

    def peaks(self, layers: int) -> dict[str, Counter[str]]:
        """Removes all but the first layers, runs a step, and returns the bytes by part at the peak of each phase."""
        model, layout, live = self.model, self.layout, LiveBytes()
        self.live = live
        del model.model.layers[layers:]
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        if not layout.accumulates:
            optimizer.zero_grad()
        hooks = [
            p.register_post_accumulate_grad_hook(lambda p: live.count(p.grad, "gradients")) for p in model.parameters()
        ]
        kernels = liger_kernels(model) if layout.kernels == "liger" else contextlib.nullcontext()
        with live, kernels:
            live.count(list(model.parameters()), "weights")
            live.count([p.grad for p in model.parameters()], "gradients")
            live.count([list(state.values()) for state in optimizer.state.values()], "optimizer")
            live.phase = "the forward pass"
            loss = self._loss()
            live.phase = "the loss, backward"
            loss.backward()
            live.phase = "the optimizer's step"
            optimizer.step()
        for hook in hooks:
            hook.remove()
        return live.peaks

    def _loss(self) -> torch.Tensor:
        tokens = torch.zeros(self.layout.micro_batch_size, self.layout.sequence_length + 1, dtype=torch.long)
        labels = tokens[:, 1:].contiguous()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.layout.precision == "bf16"):
            return self.model(
                input_ids=tokens[:, :-1],
                labels=labels,
                shift_labels=labels,
                num_items_in_batch=labels.numel(),
                use_cache=False,
            ).loss
