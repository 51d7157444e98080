"""Counts the memory of the real model without allocating it.

The model runs on fake tensors, which have a shape and no data, and [`LiveBytes`] counts the live ones. A compiled
layer runs as the two graphs into which AOTAutograd splits it, so that its partitioner decides what is kept for the
backward pass. No code is generated: neither a compiler nor a GPU is needed.

Not counted: scratch memory inside kernels, allocator overhead, and on a GPU the CUDA context and the cuBLAS workspaces
(32 MiB on Hopper, about 8 MiB on others, one for the forward and one for the backward thread; see the notes on CUDA in
torch's docs).
"""

import contextlib
import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama


MEMORY_RESERVE = 0.1  # share of a device that is kept free for what is not counted


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors by kind, and records the peak of each phase.

    Attributes:
        phase (`str`): the current part of the run.
        peaks (`dict[str, Counter[str]]`): bytes by kind at the highest moment, by phase.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "start"
        self.peaks: dict[str, Counter[str]] = {}
        self._live: Counter[str] = Counter()
        self._blocks: weakref.WeakKeyDictionary[torch.UntypedStorage, list[Any]] = weakref.WeakKeyDictionary()
        self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._paused:
            is_cast = func is torch.ops.aten._to_copy.default
            self.count(result, "copies" if is_cast and self._kind(args[0]) == "weights" else None)
        return result

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count new tensors. Tensors that were counted are still subtracted once they are freed."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def count(self, value: Any, kind: str | None = None) -> None:
        """Counts the tensors in a value that are not counted yet. With `kind`, all of them get this kind."""
        for tensor in tree_leaves(value):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            block = self._blocks.get(storage)
            if block is None:
                default = "loss" if self.phase.startswith("the loss") else "activations"
                block = self._blocks[storage] = [default, storage.nbytes()]
                weakref.finalize(storage, self._subtract, block).atexit = False
                self._live[block[0]] += block[1]
            if kind:
                self._subtract(block)
                block[0] = kind
                self._live[kind] += block[1]
        if self._live.total() > self.peaks.get(self.phase, Counter()).total():
            self.peaks[self.phase] = Counter(self._live)

    def _subtract(self, block: list[Any]) -> None:
        self._live[block[0]] -= block[1]

    def _kind(self, tensor: torch.Tensor) -> str | None:
        return self._blocks.get(tensor.untyped_storage(), [None])[0]


class _FusedGraph:
    """Runs a graph of a compiled layer and counts the tensors that the code of inductor allocates.

    Inductor fuses elementwise operations and reductions: a tensor that only they read is recomputed from its inputs
    and never allocated. Allocated are the inputs and outputs of matrix products and attention, and the outputs of the
    graph. A fused kernel may overwrite an input that is not read later.
    """

    _boxed_call = True  # the inputs are in a list that is emptied, which frees saved tensors after their last use

    def __init__(self, module: fx.GraphModule, live: Callable[[], LiveBytes]):
        self.module, self.live = module, live
        nodes = list(module.graph.nodes)
        position = {node: index for index, node in enumerate(nodes)}
        self.existing = {
            node
            for node in nodes
            if _is_kernel(node) or any(_is_kernel(user) or user.op == "output" for user in node.users)
        }
        self.freed: dict[fx.Node, list[fx.Node]] = {node: [] for node in nodes}
        last_read: dict[fx.Node, int] = {}
        for node in reversed(nodes[:-1]):
            readers = (
                last_read[user] if user not in self.existing and user in last_read else position[user]
                for user in node.users
            )
            last_read[node] = max(readers, default=position[node])
            self.freed[nodes[last_read[node]]].append(node)

    def __call__(self, inputs: list[Any]) -> Any:
        live, nodes = self.live(), self.module.graph.nodes
        values = dict(zip((node for node in nodes if node.op == "placeholder"), inputs, strict=True))
        inputs.clear()
        for node in nodes:
            if node.op == "output":
                return fx.node.map_arg(node.args[0], values.__getitem__)
            if node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                with live.paused():
                    values[node] = node.target(*args, **kwargs)
                if not _is_kernel(node):
                    self._free(node, values)
                if node in self.existing:
                    live.count(values[node])
            self._free(node, values)

    def _free(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        for freed in self.freed[node]:
            values.pop(freed, None)


def _is_kernel(node: fx.Node) -> bool:
    """Whether a library computes the node: matrix products and attention."""
    name = getattr(node.target, "__name__", "")
    return name.split(".")[0] in ("mm", "bmm", "addmm", "baddbmm") or name.startswith("_scaled_dot_product")


def compile_layers(model: PreTrainedModel, live: Callable[[], LiveBytes]) -> None:
    """Makes each decoder layer run as the graphs of a compiled layer.

    Args:
        model (`PreTrainedModel`): a Llama of fake tensors.
        live (`Callable`): returns the current counter.
    """
    from functorch.compile import aot_function, min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    layer = type(model.model.layers[0])(model.config, 0)
    num_parameters = len(list(layer.parameters()))

    def forward(parameters: dict[str, torch.Tensor], hidden: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        return torch.func.functional_call(layer, parameters, (hidden,), options)

    def partition(joint: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **_: Any) -> Any:
        # As torch.compile does: parameters stay in memory, so that keeping one costs nothing.
        return min_cut_rematerialization_partition(
            joint, inputs, num_fwd_outputs=num_fwd_outputs, static_lifetime_input_indices=list(range(num_parameters))
        )

    def counting(module: fx.GraphModule, _: Any) -> _FusedGraph:
        return _FusedGraph(module, live)

    compiled = aot_function(
        forward,
        fw_compiler=counting,
        bw_compiler=counting,
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )

    def run(parameters: dict[str, torch.Tensor], hidden: torch.Tensor, **options: Any) -> torch.Tensor:
        with live().paused():  # the graphs count their tensors; the first call traces them
            return compiled(parameters, hidden, options)

    for each in model.model.layers:
        parameters: dict[str, torch.Tensor] = dict(each.named_parameters())
        each.forward = functools.partial(run, parameters)
        if each.gradient_checkpointing:
            each.forward = functools.partial(each._gradient_checkpointing_func, each.forward)


class _LigerNorm(torch.autograd.Function):
    """Saves the input and one number per row. Writes the gradient over the incoming one."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, hidden.new_empty(hidden.shape[:-1], dtype=torch.float32))
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0], torch.empty_like(ctx.saved_tensors[1])


class _LigerProduct(torch.autograd.Function):
    """silu(gate) * up: saves both, and overwrites them with their gradients."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return ctx.saved_tensors


@contextlib.contextmanager
def liger_kernels(model: PreTrainedModel) -> Iterator[None]:
    """Replaces modules of a Llama of fake tensors by ones that allocate what Liger's kernels allocate (0.8), without
    triton.

    Liger's rotary embedding overwrites queries and keys, and in the backward pass their gradients.
    """
    for module in model.modules():
        if isinstance(module, modeling_llama.LlamaRMSNorm):
            # Only this instance gets another method.
            module.forward = functools.partial(_LigerNorm.apply, weight=module.weight)  # type: ignore[method-assign]
        elif isinstance(module, modeling_llama.LlamaMLP):
            # As above.
            module.forward = functools.partial(_liger_mlp, module)  # type: ignore[method-assign]
    with patch.object(modeling_llama, "apply_rotary_pos_emb", lambda queries, keys, *_: (queries, keys)):
        yield


def _liger_mlp(mlp: modeling_llama.LlamaMLP, hidden: torch.Tensor) -> torch.Tensor:
    return mlp.down_proj(_LigerProduct.apply(mlp.gate_proj(hidden), mlp.up_proj(hidden)))
