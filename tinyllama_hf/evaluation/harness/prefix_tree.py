"""Log-likelihoods of many continuations, where shared prefixes are read once.

The requests are sorted by their tokens. In this order neighbors share the longest prefixes, for example the question
of several choices, or the few-shot examples of all questions of a subject. A *row* is a prefix tree of neighboring
requests, written one branch after another: it has each token once, the position of a token is its depth in the tree,
and a token attends to those on the path from the root to itself. So a plain causal model can read a row in one forward
pass, with `position_ids` and an attention mask. No token attends to a later one in the row.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ...errors import InputError


# Tokens of a forward pass.
TOKENS_PER_PASS = {"cpu": 2048, "cuda": 16384, "mps": 8192}
# Tokens of a row. Longer rows repeat less of the shared contexts: on the seven tasks, rows of 512 read a tenth fewer
# tokens than rows of 256. With rows of n tokens, attention costs about n / (6 * hidden_size) of the rest, which in
# small models grows by more than a tenth.
_TOKENS_PER_ROW, _TOKENS_PER_LONG_ROW, _HIDDEN_SIZE_OF_LONG_ROWS = 256, 512, 512
# Maximum number of logits in memory: 128 MB in fp32.
_LOGITS = 1 << 25
PREFIX_TREE = "prefix_tree"  # `attn_implementation` for rows
_QUERIES = 64  # per call of sdpa; 128 were slower


class EncodedRequest(NamedTuple):
    """Tokens of a request: `continuation` is scored after `context`, which has at least one token."""

    context: Sequence[int]
    continuation: Sequence[int]


class LikelihoodAnswer(NamedTuple):
    """Log-likelihood of a continuation in nats, and whether greedy decoding would generate it."""

    log_likelihood: float
    is_greedy: bool


class TreeRow(NamedTuple):
    """A prefix tree of requests, in one row.

    Attributes:
        tokens (`list[int]`): `[num_tokens]`, each after its parent.
        parents (`list[int]`): `[num_tokens]`, index of the previous token; -1 for the first token of a sequence.
        scored (`list[tuple[int, list[int]]]`): for each request, its number and the indices of the tokens that predict
            its continuation.
    """

    tokens: list[int]
    parents: list[int]
    scored: list[tuple[int, list[int]]]

    def depths(self) -> list[int]:
        """Returns the position of each token in its sequence, `[num_tokens]`."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        return depths

    def mask(self) -> torch.Tensor:
        """Returns which tokens (second dimension) each token attends to, `[num_tokens, num_tokens]`."""
        size = len(self.tokens)
        mask = torch.eye(size, dtype=torch.bool)
        start = 0
        while start < size:  # a branch at a time: consecutive tokens
            end = start + 1
            while end < size and self.parents[end] == end - 1:
                end += 1
            if self.parents[start] >= 0:
                mask[start:end] |= mask[self.parents[start]]
            mask[start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
            start = end
        return mask


def tree_rows(requests: Sequence[EncodedRequest], tokens_per_row: int = _TOKENS_PER_ROW) -> list[TreeRow]:
    """Puts requests into rows, the longest row first.

    A row has at most `tokens_per_row` tokens, or twice those of its first request if that is more, so that a long
    context is read for many requests. Among the places where the row is at least half full, it ends where the next
    request shares the least with it.
    """
    inputs = [[*context, *continuation][:-1] for context, continuation in requests]
    order = sorted(range(len(requests)), key=inputs.__getitem__)
    shared = [0] + [_num_shared(inputs[a], inputs[b]) for a, b in itertools.pairwise(order)]
    rows, start = [], 0
    while start < len(order):
        end, sizes = start, [0]
        limit = max(tokens_per_row, 2 * len(inputs[order[start]]))
        while end < len(order):
            new = len(inputs[order[end]]) - (shared[end] if end > start else 0)
            if sizes[-1] + new > limit:
                half_full = [n for n in range(start + 1, end + 1) if sizes[n - start] >= limit / 2]
                end = min(half_full or [end], key=lambda n: (shared[n], -n))
                break
            sizes.append(sizes[-1] + new)
            end += 1
        rows.append(_row(requests, inputs, order[start:end]))
        start = end
    return sorted(rows, key=lambda row: -len(row.tokens))


def _num_shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Returns the number of equal tokens at the start."""
    end = min(len(first), len(second))
    if first[:end] == second[:end]:
        return end
    return next(n for n in range(end) if first[n] != second[n])


def _row(requests: Sequence[EncodedRequest], inputs: Sequence[list[int]], numbers: Sequence[int]) -> TreeRow:
    """Returns the tree of requests, which must be sorted by their tokens."""
    row = TreeRow([], [], [])
    path: list[int] = []  # index in the row of each token of the last sequence
    last: list[int] = []
    for number in numbers:
        tokens = inputs[number]
        del path[_num_shared(last, tokens) :]
        for token in tokens[len(path) :]:
            row.parents.append(path[-1] if path else -1)
            path.append(len(row.tokens))
            row.tokens.append(token)
        row.scored.append((number, path[len(requests[number].context) - 1 :]))
        last = tokens
    return row


def prefix_tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of rows; on a CPU, for a block of queries at a time, with the keys up to its end.

    On a CPU, sdpa with a mask computes all pairs of tokens, twice as many as needed. On a GPU, blocks only add calls.

    Args:
        query (`torch.Tensor`): `[rows, heads, tokens, head_dim]`.
        key, value (`torch.Tensor`): `[rows, num_key_value_heads, tokens, head_dim]`.
        attention_mask (`torch.Tensor`): `[rows, 1, tokens, tokens]`, False above the diagonal.
    """
    if query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    outputs = []
    for start in range(0, query.shape[2], _QUERIES):
        end = start + _QUERIES
        mask = attention_mask[:, :, start:end, :end]
        queries, keys, values = query[:, :, start:end], key[:, :, :end], value[:, :, :end]
        outputs.append(scaled_dot_product_attention(queries, keys, values, mask, scale=scaling, enable_gqa=True))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(PREFIX_TREE, prefix_tree_attention)


@contextlib.contextmanager
def _attention_of_rows(model: PreTrainedModel) -> Iterator[None]:
    """Makes a model use [`prefix_tree_attention`]. Its own may not accept this mask; eager expects one to add."""
    before = model.config._attn_implementation
    model.set_attn_implementation(PREFIX_TREE)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def score_requests(
    model: PreTrainedModel,
    requests: Sequence[EncodedRequest],
    answered: Callable[[list[tuple[int, LikelihoodAnswer]], int], Any],
) -> None:
    """Scores requests in batches of rows. A batch that does not fit in the memory of a GPU is split.

    Args:
        model (`PreTrainedModel`): a causal language model in evaluation mode.
        requests (`Sequence[EncodedRequest]`): none longer than the context of the model plus one.
        answered (`Callable`): called after each forward pass with the numbers of requests and their answers, and the
            number of tokens read.

    Raises:
        InputError: if a single row does not fit in memory.
    """
    is_wide = model.config.hidden_size >= _HIDDEN_SIZE_OF_LONG_ROWS
    rows = tree_rows(requests, _TOKENS_PER_LONG_ROW if is_wide else _TOKENS_PER_ROW)
    budget, start = TOKENS_PER_PASS.get(model.device.type, 2048), 0
    while start < len(rows):
        count = max(1, budget // len(rows[start].tokens))
        batch = rows[start : start + count]
        answers = _try_rows(model, batch, requests)
        if answers is None:
            budget = sum(len(row.tokens) for row in batch) // 2
            torch.cuda.empty_cache()  # outside the handler, since the error holds the tensors of the batch
            continue
        answered(answers, sum(len(row.tokens) for row in batch))
        start += len(batch)


def _try_rows(
    model: PreTrainedModel, rows: Sequence[TreeRow], requests: Sequence[EncodedRequest]
) -> list[tuple[int, LikelihoodAnswer]] | None:
    """Returns the answers of rows; `None` if the GPU has no memory for them, but may have for fewer rows."""
    try:
        with _attention_of_rows(model):
            return _score_rows(model, rows, requests)
    except torch.OutOfMemoryError as error:
        if len(rows) > 1:
            return None
        raise InputError(
            f"a row of {len(rows[0].tokens)} tokens does not fit in the memory of {model.device}. Use --quantization, "
            "or a device with more memory"
        ) from error


@torch.inference_mode()
def _score_rows(
    model: PreTrainedModel, rows: Sequence[TreeRow], requests: Sequence[EncodedRequest]
) -> list[tuple[int, LikelihoodAnswer]]:
    device, longest = model.device, len(rows[0].tokens)
    mask = torch.eye(longest, dtype=torch.bool).repeat(len(rows), 1, 1)  # for padding too: its outputs would be NaN
    for own, row in zip(mask, rows, strict=True):
        own[: len(row.tokens), : len(row.tokens)] = row.mask()
    states = model.get_decoder()(
        input_ids=_padded([row.tokens for row in rows]).to(device),
        position_ids=_padded([row.depths() for row in rows]).to(device),
        attention_mask=mask[:, None].to(device),
        use_cache=False,
    ).last_hidden_state.flatten(0, 1)  # [rows * longest, hidden_size]
    owners, places, targets = [], [], []
    for start, row in zip(range(0, len(rows) * longest, longest), rows, strict=True):
        for number, indices in row.scored:
            owners += [number] * len(indices)
            places += [start + index for index in indices]
            targets += list(requests[number].continuation)
    scores, is_best = _token_scores(model, states, torch.tensor(places), torch.tensor(targets))
    sums: dict[int, list[float]] = {}
    greedy: dict[int, bool] = {}
    for number, score, best in zip(owners, scores.tolist(), is_best.tolist(), strict=True):
        sums.setdefault(number, []).append(score)
        greedy[number] = greedy.get(number, True) and best
    return [(number, LikelihoodAnswer(math.fsum(own), greedy[number])) for number, own in sums.items()]


def _padded(rows: Sequence[list[int]]) -> torch.Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def _token_scores(
    model: PreTrainedModel, states: torch.Tensor, places: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the log-probability of each target at its place, and whether it is the most likely token.

    The head is applied once per place, in chunks of places.

    Args:
        states (`torch.Tensor`): `[positions, hidden_size]`.
        places (`torch.Tensor`), targets (`torch.Tensor`): `[targets]`, on the CPU.
    """
    order = places.argsort(stable=True)
    distinct, counts = places[order].unique_consecutive(return_counts=True)
    ends = [0, *counts.cumsum(0).tolist()]
    scores = torch.empty(len(places), dtype=torch.float64)
    is_best = torch.empty(len(places), dtype=torch.bool)
    head = model.get_output_embeddings()
    step = max(1, _LOGITS // model.config.vocab_size)
    for start in range(0, len(distinct), step):
        part = distinct[start : start + step]
        logits = head(states[part.to(states.device)]).float()  # [places, vocab_size]
        own = order[ends[start] : ends[start + len(part)]]
        rows = torch.arange(len(part)).repeat_interleave(counts[start : start + step]).to(logits.device)
        wanted = targets[own].to(logits.device)
        scores[own] = (logits[rows, wanted] - logits.logsumexp(1)[rows]).double().cpu()
        is_best[own] = (logits.argmax(1)[rows] == wanted).cpu()
    return scores, is_best
