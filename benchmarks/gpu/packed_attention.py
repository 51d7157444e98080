"""Part `packed_rows`: packed rows have the losses and gradients of each conversation alone, on this device."""

import traceback
from collections.abc import Iterator
from typing import Any

import torch
from measuring import Bench, Figures, rounded
from packed_batches import draw_conversations, packed_batch, padded_batch, real_lengths
from torch.nn.functional import cross_entropy, pad
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import repeat_kv
from transformers.utils import is_flash_attn_2_available

from tinyllama_hf.errors import one_line
from tinyllama_hf.finetune.packed_rows import PACKED_SDPA, balanced_rows


VARLEN = "packed_varlen"
LOSS_LIMIT, GRADIENT_LIMIT = 1e-5, 1e-4


def packed_varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each conversation of a row by `torch.nn.attention.varlen`, which needs a GPU and 16 bit.

    Its interface changed between torch 2.10, 2.11 and 2.13, so the package does not use it.
    """
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]  # torch 2.11 has no `enable_gqa`
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    # Under autocast, rotary embeddings leave queries and keys in fp32. Shape [tokens, heads, head_dim]
    packed = [tensor[0].transpose(0, 1).to(value.dtype) for tensor in (query, key, value)]
    bounds, longest = cu_seq_lens_q, max_length_q
    output = varlen_attn(*packed, bounds, bounds, longest, longest, scale=scaling, window_size=(-1, 0))
    return output[None], None


AttentionInterface.register(VARLEN, packed_varlen_attention)


def reason_to_skip(attention: str, device: str) -> str | None:
    """Returns why an attention implementation cannot train on a device, `None` if it can."""
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        return "needs a GPU and the package flash-attn"
    if attention in ("flex_attention", VARLEN) and device != "cuda":
        return "has no backward pass on a CPU"
    return None


def packed_rows(bench: Bench) -> Iterator[Figures]:
    """fp32 without TF32; then bf16, where the limit is twice the error of each conversation alone in bf16."""
    torch.set_float32_matmul_precision("highest")
    check = Check(bench)
    yield check.row("joined", "sdpa", (0.01, 0.01))  # shows that the comparison can fail
    for attention in ("sdpa", PACKED_SDPA, "flex_attention"):
        yield check.row("packed", attention, (LOSS_LIMIT, GRADIENT_LIMIT))
    for parameter in check.model.parameters():
        parameter.data = parameter.data.bfloat16()  # and not the buffers, which stock Llama keeps in fp32
    loss, gradient = check.differences("alone", "sdpa")
    yield {"variant": "alone", "attention": "sdpa", "dtype": "bfloat16", **figures(loss, gradient)}
    for attention in ("sdpa", PACKED_SDPA, "flex_attention", "flash_attention_2", VARLEN):
        yield check.row("packed", attention, (2 * loss, 2 * gradient))


class Check:
    """Losses and gradients of a small model on some conversations, compared with each conversation alone in fp32."""

    def __init__(self, bench: Bench):
        self.device = bench.device
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=512, hidden_size=256, num_attention_heads=4, num_key_value_heads=2,
                             intermediate_size=256, num_hidden_layers=2, max_position_embeddings=2048)  # fmt: skip
        self.model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").to(bench.device).train()
        long, short = real_lengths(bench.size(2048, 128))
        lengths = long[: bench.size(24, 6)] + short[: bench.size(40, 10)]
        self.conversations = draw_conversations(lengths, config.vocab_size)
        self.rows = balanced_rows([tokens for tokens, _ in lengths], len(lengths) // 8)
        self.alone = self._computed("alone", "sdpa")

    def row(self, variant: str, attention: str, limits: tuple[float, float]) -> Figures:
        """Returns the differences of a variant, which is wrong above the limits; `joined` rows below them."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        start = {"variant": variant, "attention": attention, "dtype": dtype}
        if reason := reason_to_skip(attention, self.device):
            return {**start, "skipped": reason}
        try:
            found = self.differences(variant, attention)
        except Exception as error:  # the others are checked as well
            traceback.print_exc()
            return {**start, "wrong": 1, "error": f"{type(error).__name__}: {one_line(error)[:300]}"}
        is_above = [value > limit for value, limit in zip(found, limits, strict=True)]
        wrong = not all(is_above) if variant == "joined" else any(is_above)
        return {**start, **figures(*found), "conversations": len(self.conversations), "wrong": int(wrong)}

    def differences(self, variant: str, attention: str) -> tuple[float, float]:
        """Returns the largest difference of a loss, and of a gradient relative to the largest of its parameter."""
        (losses, gradients), (expected, wanted) = self._computed(variant, attention), self.alone
        relative = [((gradients[n] - wanted[n]).abs().max() / wanted[n].abs().max()).item() for n in wanted]
        return (losses - expected).abs().max().item(), max(relative)

    def _computed(self, variant: str, attention: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns the losses of all tokens in the order of the conversations, and the gradients of their mean."""
        self.model.set_attn_implementation(attention)
        self.model.zero_grad(set_to_none=True)
        rows = [[number] for number in range(len(self.conversations))] if variant == "alone" else self.rows
        losses: dict[int, torch.Tensor] = {}
        for row in rows:
            group = [self.conversations[number] for number in row]
            batch = padded_batch(group) if variant == "alone" else packed_batch(group)
            if variant == "joined":
                batch = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
            inputs = to_device(batch, self.device)
            labels = inputs.pop("labels")[0, 1:]
            logits = self.model(**inputs, use_cache=False).logits[0, :-1].float()
            found = cross_entropy(logits, labels, reduction="none")
            (found.sum() / sum(len(one.input_ids) for one in self.conversations)).backward()
            parts = pad(found.detach(), (0, 1)).split([len(one.input_ids) for one in group])
            losses |= dict(zip(row, parts, strict=True))
        gradients = {name: each.grad.float() for name, each in self.model.named_parameters() if each.grad is not None}
        return torch.cat([losses[number] for number in sorted(losses)]), gradients


def figures(loss: float, gradient: float) -> Figures:
    """Returns the columns of two differences."""
    return {"loss_difference": rounded(loss), "gradient_difference": rounded(gradient)}


def to_device(batch: dict[str, Any], device: str) -> dict[str, Any]:
    """Returns a batch with its tensors on a device."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
