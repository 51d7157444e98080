"""Bits per byte on held-out documents: comparable between tokenizers, and with n-gram models.

Each document is scored by itself, starting with the begin-of-sequence token. Every token of its text is scored once,
with at least half a context before it where the document is long enough. Begin- and end-of-sequence are not scored.
The bits of all documents are summed and divided by their UTF-8 bytes.
"""

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.shards import read_metadata
from ..errors import InputError
from ..tokenization_tinyllama import encode_text
from . import score_metrics
from .score_files import BitsPerByte, TextProtocol


class HeldOut(NamedTuple):
    """The held-out documents of a prepared data set."""

    name: str
    fingerprint: str
    texts: tuple[str, ...]


class Window(NamedTuple):
    """The tokens of a document that one forward pass reads. The last `num_scored` of them are scored."""

    document: int
    tokens: np.ndarray
    num_scored: int


def held_out_documents(folder: str | Path) -> HeldOut:
    """Reads the documents that `tinyllama-hf prepare` held out.

    Raises:
        InputError: if the folder is not a prepared data set, or has no held-out documents.
    """
    folder = Path(folder)
    metadata = read_metadata(folder)
    texts = []
    for file in sorted((folder / "validation").glob("*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            texts += [json.loads(line)["text"] for line in lines]
    if not texts:
        raise InputError(f"{folder} has no held-out documents. Prepare it again with a larger --validation-fraction")
    return HeldOut(str(folder), metadata["fingerprint"], tuple(texts))


def windows(document: int, tokens: np.ndarray, context: int, stride: int) -> Iterator[Window]:
    """Splits a document into overlapping windows, so that every token after the first is scored once.

    Args:
        document (`int`): index of the document.
        tokens (`np.ndarray`): `[num_tokens]`, begin-of-sequence first.
        context (`int`): number of tokens that a forward pass reads.
        stride (`int`): number of scored tokens in each window after the first.
    """
    done, predicted = 0, len(tokens) - 1
    while done < predicted:
        new = min(context if done == 0 else stride, predicted - done)
        first = max(done + new - context, 0)
        yield Window(document, tokens[first : done + new + 1], new)
        done += new


@torch.inference_mode()
def _negative_log_likelihoods(model: PreTrainedModel, batch: Sequence[Window]) -> list[float]:
    """Returns the negative log-likelihood, in nats, of the scored tokens of each window."""
    # Padded on the right: with causal attention, no scored token attends to padding.
    tokens = pad_sequence([torch.from_numpy(window.tokens) for window in batch], batch_first=True).to(model.device)
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits.float()
    scores = logits.gather(2, tokens[:, 1:, None]).squeeze(2) - logits.logsumexp(2)  # [batch, longest - 1]
    ends = [len(window.tokens) - 1 for window in batch]
    rows = zip(scores.double().cpu(), ends, batch, strict=True)
    return [-row[end - window.num_scored : end].sum().item() for row, end, window in rows]


def score_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Sequence[HeldOut],
    batch_size: int = 16,
    update: Callable[..., Any] = lambda **fields: None,
) -> tuple[BitsPerByte, TextProtocol]:
    """Scores a model on held-out documents.

    Args:
        model (`PreTrainedModel`): a causal language model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        held_out (`Sequence[HeldOut]`): the documents, by data set.
        batch_size (`int`): windows per forward pass.
        update (`Callable`): called with `completed` and `total` numbers of tokens, as `rich.Progress.update`.

    Returns:
        `tuple[BitsPerByte, TextProtocol]`: the scores, and the settings that affect them.

    Raises:
        InputError: if the tokenizer has no begin-of-sequence token.
    """
    if tokenizer.bos_token_id is None:
        raise InputError(
            "the tokenizer has no begin-of-sequence token. Bits per byte needs one at the start of each document"
        )
    context = model.config.max_position_embeddings
    stride = max(context // 2, 1)
    documents = [text for source in held_out for text in source.texts]
    all_windows: list[Window] = []
    for number, text in enumerate(documents):
        all_windows += windows(number, document_tokens(tokenizer, text), context, stride)
    all_windows.sort(key=lambda window: len(window.tokens))  # little padding in a batch
    nats = [0.0] * len(documents)
    completed, total = 0, sum(window.num_scored for window in all_windows)
    for start in range(0, len(all_windows), batch_size):
        batch = all_windows[start : start + batch_size]
        for window, negative in zip(batch, _negative_log_likelihoods(model, batch), strict=True):
            nats[window.document] += negative
        completed += sum(window.num_scored for window in batch)
        update(completed=completed, total=total)
    protocol = TextProtocol(context, stride, bos=True, dtype=str(model.dtype).removeprefix("torch."))
    return summarize(nats, held_out), protocol


def document_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """Returns the tokens of a document, `[num_tokens]`, begin-of-sequence first."""
    return np.array([tokenizer.bos_token_id, *encode_text(tokenizer, text)])


def summarize(nats: Sequence[float], held_out: Sequence[HeldOut]) -> BitsPerByte:
    """Returns bits per byte over all documents and by data set, from the negative log-probability of each document."""
    by_source, done = {}, 0
    for source in held_out:
        own = nats[done : done + len(source.texts)]
        by_source[source.name] = score_metrics.bits_per_byte(own, source.texts)
        done += len(source.texts)
    texts = [text for source in held_out for text in source.texts]
    return BitsPerByte(bits_per_byte=score_metrics.bits_per_byte(nats, texts), by_source=by_source)
