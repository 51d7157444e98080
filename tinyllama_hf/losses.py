"""The training loss with bounded memory: only the logits of one chunk of tokens exist at a time.

`benchmarks/loss.py` compares it with the stock loss and `torch.nn.functional.linear_cross_entropy`.
"""

from typing import Any

import torch
from torch import nn


IGNORE_INDEX = -100
# Size of the logits of a chunk: 1024 tokens with a vocabulary of 32000 in fp32, 2048 in bf16. Larger chunks make
# faster matrix products and fewer additions to the weight gradient.
CHUNK_BYTES = 128 * 2**20
# Number of rows to compute gradients of at a time, in fp32: few enough for the cache of a CPU core, enough to
# occupy a GPU.
ROWS = {"cpu": 16, "cuda": 512}


def chunk_tokens(vocab_size: int, itemsize: int) -> int:
    """Returns the number of tokens of a chunk, for logits of `itemsize` bytes."""
    return max(CHUNK_BYTES // (vocab_size * itemsize), 1)


def linear_cross_entropy_sum(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the cross-entropy of `hidden @ weight.T` and the labels, summed over the labeled tokens.

    Args:
        hidden (`torch.Tensor`): `[num_tokens, hidden_size]`.
        weight (`torch.Tensor`): `[vocab_size, hidden_size]`, the output embedding.
        labels (`torch.Tensor`): `[num_tokens]`, -100 where no token is predicted.

    Returns:
        `torch.Tensor`: a scalar in fp32, natural logarithm.

    Raises:
        IndexError: if a label is neither -100 nor a token id; on a GPU, the kernel asserts it.
        RuntimeError: in a backward pass with `create_graph=True`, since second derivatives are not available.
    """
    if not torch.is_grad_enabled():  # `forward` below cannot tell, since the mode is always off in it
        hidden, weight = hidden.detach(), weight.detach()
    return _ChunkedCrossEntropy.apply(hidden, weight, labels)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradient with the loss, so logits are neither stored nor computed twice."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        device_type = hidden.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype
        weight_cast = weight.to(dtype)
        wants_hidden, wants_weight, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        # In fp32, since a sum over many chunks in bf16 would lose small terms.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        size = chunk_tokens(len(weight), dtype.itemsize)
        for start in range(0, len(labels), size):
            tokens = slice(start, start + size)
            chunk = hidden[tokens].to(dtype)
            logits = chunk @ weight_cast.T
            _losses_and_gradients(logits, labels[tokens], losses[tokens], wants_hidden or wants_weight)
            if grad_hidden is not None:
                grad_hidden[tokens] = logits @ weight_cast
            if grad_weight is not None:
                grad_weight += logits.T @ chunk
            del logits  # before those of the next chunk are allocated
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        # `once_differentiable` would not raise here: it accepts `create_graph=True` if the incoming gradient is a
        # constant, as for a loss. A compiled backward pass is traced with gradients enabled, and can never be
        # differentiated.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "create_graph=True: the gradient of the training loss has no derivative. Call the model without "
                "labels and compute the loss from its logits: "
                "model.loss_function(logits=logits, labels=labels, vocab_size=model.config.vocab_size)"
            )
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_output.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_output).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None


def _losses_and_gradients(
    logits: torch.Tensor, labels: torch.Tensor, losses: torch.Tensor, wants_gradients: bool
) -> None:
    """Writes the losses `[tokens]`, and replaces logits `[tokens, vocab]` by their gradient, softmax - one_hot.

    In fp32 and a few rows at a time, so that the rows stay in the CPU cache between the steps.
    """
    valid = labels != IGNORE_INDEX
    index = labels.masked_fill(~valid, 0)[:, None]
    step = ROWS.get(logits.device.type, ROWS["cuda"])
    for start in range(0, len(labels), step):
        rows = slice(start, start + step)
        values = logits[rows].to(torch.float32, copy=True)
        # The negative logit at the label, 0 without a label. Raises for invalid labels, as the stock loss does.
        at_label = nn.functional.nll_loss(values, labels[rows], ignore_index=IGNORE_INDEX, reduction="none")
        largest = values.amax(-1, keepdim=True)
        sums = values.sub_(largest).exp_().sum(-1, keepdim=True)
        losses[rows] = (sums.log() + largest).squeeze(1).mul_(valid[rows]).add_(at_label)
        if not wants_gradients:
            continue
        values.mul_(valid[rows, None] / sums)
        values.scatter_add_(1, index[rows], -valid[rows, None].float())
        logits[rows] = values
