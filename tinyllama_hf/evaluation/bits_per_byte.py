"""Bits per byte on held-out documents: comparable between tokenizers, and with counting models.

Stock transformers computes it on the exported folder. Each document is read alone, begin-of-sequence first; every token
of its text is scored once, with at least half a context before it where the document has that much. Neither separator
is scored. Bits of all documents are summed and divided by their UTF-8 bytes.
"""

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
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


class HeldOut(NamedTuple):
    """Held-out documents of one prepared data set."""

    name: str
    fingerprint: str
    texts: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return sum(len(text.encode()) for text in self.texts)


class Window(NamedTuple):
    """A stretch of a document that one forward pass reads: tokens, and how many of the last are scored."""

    document: int
    tokens: np.ndarray
    num_scored: int


def held_out_documents(folder: str | Path) -> HeldOut:
    """Reads the text that `tinyllama-hf prepare` held out.

    Raises:
        InputError: if the folder is no data set, or holds out nothing.
    """
    folder = Path(folder)
    metadata = read_metadata(folder)
    texts = []
    for file in sorted((folder / "validation").glob("*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            texts += [json.loads(line)["text"] for line in lines]
    if not texts:
        raise InputError(f"{folder}: holds out no document; prepare it again with a larger --validation-fraction")
    return HeldOut(str(folder), metadata["fingerprint"], tuple(texts))


def windows(document: int, tokens: np.ndarray, context: int, stride: int) -> Iterator[Window]:
    """Cuts a document so that every token after the first is scored once.

    Args:
        document (`int`): number of the document.
        tokens (`np.ndarray`): `[num_tokens]`, begin-of-sequence first.
        context (`int`): tokens that a pass reads.
        stride (`int`): new tokens of each pass after the first.
    """
    done, predicted = 0, len(tokens) - 1
    while done < predicted:
        new = min(context if done == 0 else stride, predicted - done)
        first = max(done + new - context, 0)
        yield Window(document, tokens[first : done + new + 1], new)
        done += new


@torch.inference_mode()
def log_probabilities(
    model: PreTrainedModel, batches: Iterable[Sequence[Window]], advance: Callable[[int], Any] = lambda n: None
) -> Iterator[tuple[int, float]]:
    """Yields, for each window, its document and the natural logarithm of the probability of its scored tokens."""
    for batch in batches:
        # Padding stands on the right, where causal attention lets no scored token see it.
        tokens = pad_sequence([torch.from_numpy(window.tokens) for window in batch], batch_first=True).to(model.device)
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits.float()
        scores = logits.gather(2, tokens[:, 1:, None]).squeeze(2) - logits.logsumexp(2)  # [batch, longest - 1]
        for row, window in zip(scores.double().cpu(), batch, strict=True):
            end = len(window.tokens) - 1
            yield window.document, row[end - window.num_scored : end].sum().item()
            advance(window.num_scored)


def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Sequence[HeldOut],
    batch_size: int = 16,
    advance: Callable[[int], Any] = lambda n: None,
) -> dict[str, Any]:
    """Scores a model on held-out documents.

    Args:
        model (`PreTrainedModel`): a causal language model, stock or ours.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        held_out (`Sequence[HeldOut]`): the documents, by source.
        batch_size (`int`): windows of a forward pass.
        advance (`Callable`): called with the number of tokens scored, for a progress bar.

    Returns:
        `dict`: `bits_per_byte` over all documents, `by_source`, and the `protocol` that decides the figure.

    Raises:
        InputError: if the tokenizer has no begin-of-sequence.
    """
    if tokenizer.bos_token_id is None:
        raise InputError("bits per byte: the tokenizer has no begin-of-sequence, which each document starts with here")
    context = model.config.max_position_embeddings
    stride = max(context // 2, 1)
    documents = [text for source in held_out for text in source.texts]
    pieces = []
    for number, text in enumerate(documents):
        pieces += windows(number, document_tokens(tokenizer, text), context, stride)
    pieces.sort(key=lambda window: len(window.tokens))  # alike in length, so that little is padded
    batches = (pieces[i : i + batch_size] for i in range(0, len(pieces), batch_size))
    nats = [0.0] * len(documents)
    for number, log_probability in log_probabilities(model, batches, advance):
        nats[number] -= log_probability
    protocol = {"context": context, "stride": stride, "bos": True, "dtype": str(model.dtype).removeprefix("torch.")}
    return {**summarise(nats, held_out), "protocol": protocol}


def document_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """The tokens of a document, `[num_tokens]`, begin-of-sequence first."""
    return np.array([tokenizer.bos_token_id, *encode_text(tokenizer, text)])


def summarise(nats: Sequence[float], held_out: Sequence[HeldOut]) -> dict[str, Any]:
    """Turns the negative log-probability of each document, source after source, into bits per byte."""
    by_source, done = {}, 0
    for source in held_out:
        own = nats[done : done + len(source.texts)]
        by_source[source.name] = score_metrics.bits_per_byte(own, source.texts)
        done += len(source.texts)
    texts = [text for source in held_out for text in source.texts]
    return {"bits_per_byte": score_metrics.bits_per_byte(nats, texts), "by_source": by_source}
