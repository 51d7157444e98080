"""N-gram language models over tokens, used as baselines for a run.

`NGramModel` uses interpolated modified Kneser-Ney smoothing (Chen and Goodman 1998, "An Empirical Study of Smoothing
Techniques for Language Modeling", equation 26), the best of the classical methods. Order 1 is the unigram model.
"""

from itertools import pairwise

import numpy as np


class NGramModel:
    """An n-gram model fitted to one stream of token ids.

    Args:
        tokens (`np.ndarray`): `[num_tokens]` ids, the concatenated documents with their separators.
        vocab_size (`int`): number of ids.
        order (`int`): number of tokens in an n-gram, including the predicted one.

    Raises:
        ValueError: if there are fewer tokens than `order`.
    """

    def __init__(self, tokens: np.ndarray, vocab_size: int, order: int = 5):
        if len(tokens) < order:
            raise ValueError(f"{len(tokens)} tokens are too few for an n-gram model of order {order}")
        self.vocab_size, self.order = vocab_size, order
        # An n-gram is identified by its index in the sorted keys of its order. Its key combines the index of its first
        # n-1 tokens with its last token.
        self._keys: list[np.ndarray] = []
        counts, ids = [], []
        previous = np.zeros(len(tokens) + 1, dtype=np.int64)  # the empty context
        for n in range(1, order + 1):
            key = previous[: len(tokens) - n + 1] * vocab_size + tokens[n - 1 :]
            unique, first, inverse, count = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
            self._keys.append(unique)
            ids.append((first, inverse))
            counts.append(count)
            previous = inverse
        # Below the highest order, Kneser-Ney counts the distinct tokens that precede the n-gram.
        for n, ((_, shorter), (first_longer, _)) in enumerate(pairwise(ids)):
            counts[n] = np.bincount(shorter[first_longer + 1], minlength=len(self._keys[n]))
        self._discounted, self._backoff = zip(*map(self._smooth, self._keys, counts), strict=True)

    def _smooth(self, keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the discounted probability of each n-gram, and the backoff weight of each context."""
        ones, twos, threes, fours = (max((counts == c).sum(), 1) for c in (1, 2, 3, 4))
        y = ones / (ones + 2 * twos)
        discounts = np.array([0, 1 - 2 * y * twos / ones, 2 - 3 * y * threes / twos, 3 - 4 * y * fours / threes])
        discounts = np.clip(discounts, [0, 0.1, 0.1, 0.1], [0, 1, 2, 3])
        discount = discounts[np.minimum(counts, 3)]
        context = keys // self.vocab_size
        total = np.maximum(np.bincount(context, weights=counts), 1)
        return (counts - discount) / total[context], np.bincount(context, weights=discount) / total

    def log_probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """Returns the log-probability (in nats) of each token after the first, given the tokens before it.

        Args:
            tokens (`np.ndarray`): `[num_tokens]` ids of one document, including begin-of-sequence.

        Returns:
            `np.ndarray`: `[num_tokens - 1]`.
        """
        num_predicted = len(tokens) - 1
        probability = np.full(num_predicted, 1 / self.vocab_size)
        # Index of the context of length n-1 before each predicted token; -1 where it was not seen in training.
        context = np.zeros(num_predicted, dtype=np.int64)
        for n in range(1, self.order + 1):
            if n > 1:
                context = self._context(tokens, n - 1)
            seen = (context >= 0) & (context < len(self._backoff[n - 1]))
            found = self._find(n, np.where(seen, context, 0) * self.vocab_size + tokens[1:])
            explicit = np.where(found >= 0, self._discounted[n - 1][found], 0)
            weight = self._backoff[n - 1][np.where(seen, context, 0)]
            # A context that was seen only at the end of the stream has no continuation: the shorter context is used.
            seen &= weight > 0
            probability = np.where(seen, explicit + weight * probability, probability)
        return np.log(probability)

    def _find(self, n: int, keys: np.ndarray) -> np.ndarray:
        place = np.minimum(np.searchsorted(self._keys[n - 1], keys), len(self._keys[n - 1]) - 1)
        return np.where(self._keys[n - 1][place] == keys, place, -1)

    def _context(self, tokens: np.ndarray, length: int) -> np.ndarray:
        """Returns the index of the n-gram that ends before each predicted token; -1 if it is unseen or too short."""
        index = np.zeros(len(tokens) - 1, dtype=np.int64)
        for n in range(1, length + 1):
            token = np.full(len(index), -1, dtype=np.int64)
            offset = length - n  # distance from the end of the context
            token[offset:] = tokens[: len(index) - offset]
            valid = (index >= 0) & (token >= 0)
            index = np.where(valid, self._find(n, np.where(valid, index * self.vocab_size + token, 0)), -1)
        return index
