"""The training loss with a bound on its memory: the logits of one chunk of tokens exist at a time.

`benchmarks/loss.py` measures it against the stock loss and `torch.nn.functional.linear_cross_entropy`.
"""

import torch
from torch import nn


IGNORE_INDEX = -100
# The logits of a chunk take this much, in the type of the product: 1024 tokens of 32000 ids in fp32, 2048 in bf16. Larger
# chunks make better products, and fewer sums into the gradient of the weight.
CHUNK_BYTES = 128 * 2**20
# Rows that are turned into gradients at a time, in fp32: on a CPU as many as stay in the cache of a core, on a GPU enough
# to fill it.
ROWS = {"cpu": 16, "cuda": 512}


def chunk_tokens(vocab_size: int, itemsize: int) -> int:
    """Tokens whose logits exist at a time, in a type of so many bytes."""
    return max(CHUNK_BYTES // (vocab_size * itemsize), 1)


def linear_cross_entropy_sum(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of `hidden @ weight.T` against the labels, summed over the tokens that have one.

    Args:
        hidden (`torch.Tensor`): `[num_tokens, hidden_size]`.
        weight (`torch.Tensor`): `[vocab_size, hidden_size]`, the output embedding.
        labels (`torch.Tensor`): `[num_tokens]`, -100 where no token is predicted.

    Returns:
        `torch.Tensor`: a scalar in fp32, natural logarithm.

    Raises:
        IndexError: if a label is neither -100 nor an id of the vocabulary; on a GPU the kernel asserts it.
        RuntimeError: in a backward pass with `create_graph=True`, since second derivatives are not available.
    """
    if not torch.is_grad_enabled():  # inside the function the mode is always off, and a parameter would ask for one
        hidden, weight = hidden.detach(), weight.detach()
    return _ChunkedCrossEntropy.apply(hidden, weight, labels)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradient together with the loss, so that no logits need to be kept or computed again."""

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        device_type = hidden.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype
        weight_cast = weight.to(dtype)
        wants_hidden, wants_weight, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        # fp32, or the sum over chunks would lose the small terms.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        losses = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        size = chunk_tokens(len(weight), dtype.itemsize)
        for start in range(0, len(labels), size):
            tokens = slice(start, start + size)
            chunk = hidden[tokens].to(dtype)
            logits = chunk @ weight_cast.T
            _losses_and_gradients(logits, labels[tokens], losses[tokens], wants_hidden or wants_weight)
            if wants_hidden:
                grad_hidden[tokens] = logits @ weight_cast
            if wants_weight:
                grad_weight += logits.T @ chunk
            del logits  # before the next chunk's are there
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return losses.sum()

    @staticmethod
    def backward(ctx, grad_output):
        # Not `once_differentiable`, which lets `create_graph=True` through where the incoming gradient is a constant, as
        # that of a loss is. A compiled backward pass cannot be differentiated in any case, and is traced with gradients on.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "create_graph=True: the training loss is computed together with its gradient, which has no derivative. "
                "Call the model without labels, and compute the loss from its logits: "
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
    """Fills in the losses `[tokens]`, and replaces logits `[tokens, vocab]` by their gradient, softmax - one_hot.

    A few rows at a time, so that all passes over them but the first and the last meet the cache, and in fp32.
    """
    valid = labels != IGNORE_INDEX
    index = labels.masked_fill(~valid, 0)[:, None]
    step = ROWS.get(logits.device.type, ROWS["cuda"])
    for start in range(0, len(labels), step):
        rows = slice(start, start + step)
        values = logits[rows].to(torch.float32, copy=True)
        # The negative logits at the labels, zero where there is none; refuses a label as the stock loss does.
        at_label = nn.functional.nll_loss(values, labels[rows], ignore_index=IGNORE_INDEX, reduction="none")
        largest = values.amax(-1, keepdim=True)
        sums = values.sub_(largest).exp_().sum(-1, keepdim=True)
        losses[rows] = (sums.log() + largest).squeeze(1).mul_(valid[rows]).add_(at_label)
        if not wants_gradients:
            continue
        values.mul_(valid[rows, None] / sums)
        values.scatter_add_(1, index[rows], -valid[rows, None].float())
        logits[rows] = values
