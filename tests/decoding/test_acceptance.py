"""The acceptance rules alone: exact distributions for given random numbers, and filling that is never accepted."""

import pytest
import torch
from transformers.generation import MaxLengthCriteria, StoppingCriteriaList

from tinyllama_hf.decoding.acceptance import accept_greedy, accept_sampled, draw
from tinyllama_hf.decoding.row_state import CHOOSING, RowState
from tinyllama_hf.decoding.rows import RowPlan, Rows


ROWS, WIDTH = 10_000, 2
P = torch.tensor([0.1, 0.2, 0.3, 0.4])
Q = torch.tensor([0.4, 0.3, 0.2, 0.1])


def rows_with_draws(number: int) -> RowState:
    """Returns rows of one token, each with its own random numbers."""
    draws = torch.rand(number, 3, WIDTH + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plans = [RowPlan(row, WIDTH + 1, draws[row]) for row in range(number)]
    criteria = StoppingCriteriaList([MaxLengthCriteria(WIDTH + 2)])
    return Rows(torch.ones(number, 1, dtype=torch.long), None, criteria, 64, plans, do_sample=True).state


def draft(state: RowState, tokens: torch.Tensor, counts: torch.Tensor, q: torch.Tensor | None = None) -> RowState:
    """Writes drafted tokens `[rows, width]` after the rows' ends."""
    state.put(tokens)
    state.drafted.copy_(counts)
    state.probabilities = q
    return state


@pytest.fixture(scope="module")
def rows() -> RowState:
    return rows_with_draws(ROWS)


def assert_follows_p(tokens: torch.Tensor) -> None:
    """Asserts frequencies within 5 standard deviations, each at most 0.5 / sqrt(samples)."""
    shares = torch.bincount(tokens, minlength=4) / len(tokens)
    assert (shares - P).abs().max() < 2.5 * len(tokens) ** -0.5, shares


@pytest.mark.parametrize("is_drawn", [True, False], ids=["from q", "look-up"])
def test_tokens_follow_the_target(rows, is_drawn):
    """Numbers must not be used twice: a token that its number rejected would be preferred by the same number."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.multinomial(Q, ROWS * WIDTH, replacement=True, generator=generator).view(ROWS, WIDTH)
    tokens = tokens if is_drawn else torch.full_like(tokens, 1)
    draft(rows, tokens, torch.full((ROWS,), WIDTH), Q.expand(ROWS, WIDTH, -1) if is_drawn else None)
    found, accepted, _ = accept_sampled(P.log().expand(ROWS, WIDTH + 1, -1), rows)
    assert_follows_p(found[:, 0])
    assert_follows_p(found[accepted > 0, 1])
    share = torch.minimum(P, Q).sum() if is_drawn else P[1]
    assert ((accepted > 0).float().mean() - share).abs() < 2.5 * ROWS**-0.5


def test_token_behind_the_accepted_ones_follows_the_target(rows):
    """If nothing was drafted, and if all drafted tokens are accepted."""
    scores, tokens = P.log().repeat(ROWS, WIDTH + 1, 1), torch.zeros(ROWS, WIDTH, dtype=torch.long)
    found, accepted, _ = accept_sampled(scores, draft(rows, tokens, torch.zeros(ROWS, dtype=torch.long)))
    assert not accepted.any()
    assert_follows_p(found[:, 0])
    scores[:, :WIDTH, 1:] = -torch.inf  # the drafted token is certain
    found, accepted, _ = accept_sampled(scores, draft(rows, tokens, torch.full((ROWS,), WIDTH)))
    assert (accepted == WIDTH).all()
    assert_follows_p(found[:, WIDTH])
    numbers = rows.uniform(CHOOSING, WIDTH + 1)[:, WIDTH:]
    assert torch.equal(found[:, WIDTH:], draw(P.expand(ROWS, 1, -1), numbers)), "by the number of its own place"


@pytest.mark.parametrize("accept", [accept_greedy, accept_sampled])
def test_filling_is_never_accepted(accept):
    """Even if the target would have chosen it: only the first `counts` tokens were drafted."""
    rows, counts = rows_with_draws(3), torch.tensor([0, 1, 2])
    scores = torch.full((3, WIDTH + 1, 4), -torch.inf)
    scores[..., 2] = 0.0
    tokens = torch.full((3, WIDTH), 2)
    assert accept(scores, draft(rows, tokens, counts))[1].tolist() == [0, 1, 2]
    tokens[2, 0] = 1
    assert accept(scores, draft(rows, tokens, counts))[1].tolist() == [0, 1, 0], "nothing after a rejected token"
