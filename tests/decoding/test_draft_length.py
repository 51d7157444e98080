"""The adaptive number of drafted tokens, for known costs and acceptance."""

import torch

from tinyllama_hf.decoding.draft_length import DraftLength, expected_tokens
from tinyllama_hf.decoding.engine import LONGEST_DRAFT


def feed(length, seconds, acceptance, rounds=60):
    """Runs rounds with these costs: of a draft pass, of a target pass over one token, and of each further token."""
    draft, target, further = seconds
    widths = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(rounds):
        width = length.choose()
        widths.append(width)
        kept = (torch.rand(4, width, generator=generator) < acceptance).long().cumprod(1).sum(1).tolist()
        length.observe(width, [width] * 4, kept, draft * width, target + further * width)
    return widths


def test_cheap_and_right_drafts_are_long():
    widths = feed(DraftLength(4, range(1, 9)), (0.05, 1.0, 0.02), 0.95)[10:]
    assert min(width for width in widths if width) >= 5
    assert 0 < widths.count(0) <= 3, "plain rounds are timed again at times"


def test_dear_or_wrong_drafts_are_left_alone():
    for seconds, acceptance in (((0.9, 1.0, 0.1), 0.6), ((0.1, 1.0, 0.05), 0.02), ((0.1, 1.0, 0.9), 0.7)):
        widths = feed(DraftLength(4, range(1, 9)), seconds, acceptance, rounds=256)
        assert sum(width > 0 for width in widths[20:]) <= 6, (seconds, acceptance)
        assert any(widths[20:]), "drafting is tried again at times"


def test_look_up_that_finds_something_in_one_row_of_eight():
    length, tokens, seconds = DraftLength(8, range(1, 9)), 0, 0.0
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        width = length.choose()
        kept = [(torch.rand(width, generator=generator) < 0.8).long().cumprod(0).sum().item()] + [0] * 7
        length.observe(width, [width] * 8, kept, 0.001, 1.0 + 0.25 * width)
        tokens, seconds = tokens + 8 + sum(kept), seconds + 1.0 + 0.25 * width
    assert tokens / seconds > 0.95 * 8


def test_it_comes_back_when_the_text_becomes_easy():
    length = DraftLength(4, range(1, 9))
    assert feed(length, (0.1, 1.0, 0.05), 0.02)[-1] == 0
    assert feed(length, (0.1, 1.0, 0.05), 0.9, rounds=200)[-20:].count(0) <= 1


def test_expected_tokens():
    assert expected_tokens(0.5, 3) == 1 + 0.5 + 0.25 + 0.125
    assert expected_tokens(1.0, LONGEST_DRAFT) == LONGEST_DRAFT + 1 and expected_tokens(0.3, 0) == 1


def test_a_row_near_its_end_is_not_taken_for_one_that_rejects():
    """It can take one of eight drafted tokens, and accepts it."""
    length = DraftLength(1, range(1, 9))
    length.observe(0, [1], [0], 0.0, 1.0)
    for _ in range(20):
        length.observe(8, [1], [1], 0.08, 1.1)
    assert length.choose() >= 5
