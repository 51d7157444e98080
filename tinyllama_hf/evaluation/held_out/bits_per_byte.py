"""Bits per byte on held-out documents, which is comparable across tokenizers and with n-gram models.

Each document is scored separately, starting with the begin-of-sequence token. Every token of its text is scored once,
with at least half a context before it if the document is long enough. Begin- and end-of-sequence are not scored.
The bits of all documents are summed and divided by their UTF-8 bytes.

Documents are read as a stream. Memory is bounded by the longest document, [`BUFFER_TOKENS`], the tokens of a batch and
[`HEAD_ELEMENTS`], for any number of documents and any vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import InputError
from ...tokenization_tinyllama import encode_text
from .. import score_metrics
from ..score_files import BitsPerByte, TextProtocol
from .held_out_text import HeldOut
from .text_windows import Window, count_in_batch, sorted_buffers, windows


BUFFER_TOKENS = 1 << 19
# Tokens of a batch, and logits computed at once. On a CPU small numbers are as fast, and need less memory.
BATCH_TOKENS = {"cpu": 1 << 11, "cuda": 1 << 16}
HEAD_ELEMENTS = {"cpu": 1 << 23, "cuda": 1 << 27}


def score_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Sequence[HeldOut],
    batch_tokens: int | None = None,
    update: Callable[..., Any] = lambda **fields: None,
) -> tuple[BitsPerByte, TextProtocol]:
    """Scores a model on held-out documents.

    Args:
        model (`PreTrainedModel`): a causal Llama.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        held_out (`Sequence[HeldOut]`): the documents, by data set.
        batch_tokens (`int`, *optional*): maximum number of tokens of a forward pass, padding included. A window is
            never split, so a batch has at least one. Halved when a GPU runs out of memory.
        update (`Callable`): called with `completed` and `total` numbers of UTF-8 bytes, as `rich.Progress.update`.

    Returns:
        `tuple[BitsPerByte, TextProtocol]`: the scores, and the settings that affect them.

    Raises:
        InputError: if the tokenizer has no begin-of-sequence token, or one window does not fit in GPU memory.
    """
    if tokenizer.bos_token_id is None:
        raise InputError(
            "the tokenizer has no begin-of-sequence token. Bits per byte needs one at the start of each document"
        )
    context = model.config.max_position_embeddings
    stride = max(context // 2, 1)
    stream = _stream(tokenizer, held_out, context, stride)
    nats, completed = [0.0] * len(held_out), 0.0
    total = sum(h.source.bytes for h in held_out)
    scorer = _WindowScorer(model, batch_tokens)
    for buffer in sorted_buffers(stream, BUFFER_TOKENS):
        for window, negative in scorer.score(buffer):
            nats[window.source] += negative
            completed += window.num_bytes
            update(completed=completed, total=total)
    protocol = TextProtocol(context, stride, bos=True, dtype=str(model.dtype).removeprefix("torch."))
    return summarize(nats, held_out), protocol


def _stream(
    tokenizer: PreTrainedTokenizerBase, held_out: Sequence[HeldOut], context: int, stride: int
) -> Iterator[Window]:
    """Yields the windows of all documents, which are read and tokenized one by one."""
    for number, h in enumerate(held_out):
        for text in h.texts:
            tokens = document_tokens(tokenizer, text)
            yield from windows(number, tokens, context, stride, len(text.encode()))


def document_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """Returns the tokens of a document, `[num_tokens]`, begin-of-sequence first."""
    return np.array([tokenizer.bos_token_id, *encode_text(tokenizer, text)])


def summarize(nats: Sequence[float], held_out: Sequence[HeldOut]) -> BitsPerByte:
    """Returns bits per byte over all documents and by data set, from the negative log-probability of each data set."""
    sizes = [h.source.bytes for h in held_out]
    rows = zip(held_out, nats, sizes, strict=True)
    return BitsPerByte(
        bits_per_byte=score_metrics.bits_by_size(sum(nats), sum(sizes)),
        by_source={h.source.path: score_metrics.bits_by_size(own, size) for h, own, size in rows},
    )


class _WindowScorer:
    """Computes the negative log-likelihood of windows, in batches that fit in memory.

    Args:
        model (`PreTrainedModel`): a causal Llama.
        batch_tokens (`int`, *optional*): maximum number of tokens of a batch; the default depends on the device.
    """

    def __init__(self, model: PreTrainedModel, batch_tokens: int | None = None):
        self._model, self._device = model, model.device.type
        self._head_elements = HEAD_ELEMENTS.get(self._device, HEAD_ELEMENTS["cuda"])
        self.batch_tokens = batch_tokens or BATCH_TOKENS.get(self._device, BATCH_TOKENS["cuda"])

    def score(self, ordered: Sequence[Window]) -> Iterator[tuple[Window, float]]:
        """Yields windows from long to short with their negative log-likelihood, in nats."""
        start = 0
        while start < len(ordered):
            count = count_in_batch(ordered[start:], self.batch_tokens)
            batch = ordered[start : start + count]
            values = self._try(batch)
            if values is None:
                self.batch_tokens = count * batch[0].num_inputs // 2
                torch.cuda.empty_cache()  # outside the handler, since the exception holds the tensors
                continue
            yield from zip(batch, values, strict=True)
            start += count

    def _try(self, batch: Sequence[Window]) -> list[float] | None:
        """Returns the values of a batch; `None` if the GPU has no memory for it, but may have for a smaller one."""
        try:
            return self._negative_log_likelihoods(batch)
        except torch.OutOfMemoryError as error:
            if len(batch) > 1:
                return None
            raise InputError(
                f"{self._model.device}: out of memory on a window of {batch[0].num_inputs:,} tokens, the context of "
                "the model. Stop other processes on this GPU, or use --dtype bf16 or --device cpu"
            ) from error

    @torch.inference_mode()
    def _negative_log_likelihoods(self, batch: Sequence[Window]) -> list[float]:
        """Returns the negative log-likelihood, in nats, of the scored tokens of each window."""
        # Padded on the right, so that with causal attention no scored token attends to padding.
        tokens = pad_sequence([torch.from_numpy(window.tokens) for window in batch], batch_first=True)
        inputs = tokens[:, :-1].to(self._model.device)
        hidden = self._model.base_model(input_ids=inputs, use_cache=False).last_hidden_state
        first = torch.tensor([[window.num_inputs - window.num_scored] for window in batch])
        last = torch.tensor([[window.num_inputs] for window in batch])
        places = torch.arange(inputs.shape[1])
        rows, columns = ((places >= first) & (places < last)).nonzero(as_tuple=True)
        targets = tokens[rows, columns + 1].to(hidden.device)
        scores = self._log_likelihoods(hidden[rows.to(hidden.device), columns.to(hidden.device)], targets)
        parts = scores.double().cpu().split([window.num_scored for window in batch])
        return [-part.sum().item() for part in parts]

    def _log_likelihoods(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Returns the log-likelihoods `[num_scored]` of tokens, from hidden states `[num_scored, hidden]`.

        The logits are computed in parts, since those of 65,536 tokens over 128,256 ids would need 34 GB.
        """
        head = self._model.get_output_embeddings()
        rows = max(self._head_elements // self._model.config.vocab_size, 1)
        scores = []
        for part, target in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = head(part).float()
            scores.append(logits.gather(1, target[:, None]).squeeze(1) - logits.logsumexp(1))
        return torch.cat(scores)
