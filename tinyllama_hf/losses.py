"""The training loss with a bound on its memory: the logits of one chunk of tokens exist at a time.

`benchmarks/loss.py` measures it against the stock loss and `torch.nn.functional.linear_cross_entropy`.
"""

import torch


IGNORE_INDEX = -100
# The logits of a chunk take CHUNK_TOKENS x vocabulary x 4 bytes twice: 131 MB for 32000 tokens.
CHUNK_TOKENS = 512


def linear_cross_entropy_sum(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of `hidden @ weight.T` against the labels, summed over the tokens that have one.

    Args:
        hidden (`torch.Tensor`): `[num_tokens, hidden_size]`.
        weight (`torch.Tensor`): `[vocab_size, hidden_size]`, the output embedding.
        labels (`torch.Tensor`): `[num_tokens]`, -100 where no token is predicted.

    Returns:
        `torch.Tensor`: a scalar in fp32, natural logarithm.
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
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(labels), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            chunk, label = hidden[rows].to(dtype), labels[rows]
            logits = (chunk @ weight_cast.T).float()
            valid = label != IGNORE_INDEX
            index = label.clamp(min=0)[:, None]
            log_normalizer = logits.logsumexp(-1, keepdim=True)
            total += ((log_normalizer - logits.gather(1, index)).squeeze(1) * valid).sum()
            if not (wants_hidden or wants_weight):
                continue
            # d loss / d logits = softmax - one_hot, in place of the logits
            grad = logits.sub_(log_normalizer).exp_()
            grad.scatter_add_(1, index, torch.full_like(index, -1, dtype=grad.dtype))
            grad = grad.mul_(valid[:, None]).to(dtype)
            if wants_hidden:
                grad_hidden[rows] = grad @ weight_cast
            if wants_weight:
                grad_weight += grad.T @ chunk
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_output.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_output).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None
