"""The n-gram models against the formula of Chen and Goodman, implemented with dictionaries."""

import collections
import math

import numpy as np
import pytest

from tinyllama_hf.evaluation.held_out.ngram import NGramModel


VOCABULARY = 7


def stream(length: int, seed: int = 0) -> np.ndarray:
    """Tokens with enough repetitions for all orders."""
    rng = np.random.default_rng(seed)
    tokens = [0, 1]
    for _ in range(length - 2):
        tokens.append((tokens[-1] + tokens[-2]) % VOCABULARY if rng.random() < 0.7 else int(rng.integers(VOCABULARY)))
    return np.array(tokens)


def reference(tokens: list[int], order: int):
    """Returns p(word | context) by interpolated modified Kneser-Ney, token by token."""
    grams = {
        n: collections.Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
        for n in range(1, order + 1)
    }
    counts = {order: grams[order]}
    for n in range(1, order):
        counts[n] = collections.Counter(gram[1:] for gram in grams[n + 1])
    discounts = {}
    for n in counts:
        for gram in grams[n]:
            counts[n].setdefault(gram, 0)
        of = [max(sum(c == k for c in counts[n].values()), 1) for k in (1, 2, 3, 4)]
        y = of[0] / (of[0] + 2 * of[1])
        raw = [0, 1 - 2 * y * of[1] / of[0], 2 - 3 * y * of[2] / of[1], 3 - 4 * y * of[3] / of[2]]
        discounts[n] = [0, *(min(max(d, 0.1), k) for k, d in enumerate(raw[1:], start=1))]

    def probability(word: int, context: tuple[int, ...]) -> float:
        n = len(context) + 1
        lower = probability(word, context[1:]) if context else 1 / VOCABULARY
        follow = {g: c for g, c in counts[n].items() if g[:-1] == context}
        total = sum(follow.values())
        if total == 0:
            return lower
        discount = discounts[n]
        left = sum(discount[min(c, 3)] for c in follow.values()) / total
        own = counts[n].get((*context, word), 0)
        return (own - discount[min(own, 3)]) / total + left * lower

    return probability


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_equals_the_formula(order):
    tokens, text = stream(300), stream(60, seed=1)
    probability = reference(tokens.tolist(), order)
    expected = [
        math.log(probability(int(text[i]), tuple(int(t) for t in text[max(i - order + 1, 0) : i])))
        for i in range(1, len(text))
    ]
    assert NGramModel(tokens, VOCABULARY, order).log_probabilities(text) == pytest.approx(expected, abs=1e-12)


def test_probabilities_sum_to_one():
    model = NGramModel(stream(300), VOCABULARY, 5)
    for context in ([0], [6, 6, 6, 6, 6], [1, 1, 2, 3, 5]):
        total = sum(math.exp(model.log_probabilities(np.array([*context, word]))[-1]) for word in range(VOCABULARY))
        assert total == pytest.approx(1, abs=1e-12)


def test_too_few_tokens():
    with pytest.raises(ValueError, match="too few"):
        NGramModel(np.array([1, 2]), VOCABULARY, 5)
