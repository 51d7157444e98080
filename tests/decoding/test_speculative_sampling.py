"""Sampled output with a draft follows the target's exact distribution: chi-square tests with fixed seeds."""

import itertools

import pytest
import torch

from tests.decoding.distributions import VOCABULARY, model, p_value, similar, warped
from tinyllama_hf.batch.generate_many import Request, generate_many
from tinyllama_hf.decoding.proposals import ModelProposer, PromptLookup
from tinyllama_hf.decoding.speculative import speculative_generate
from tinyllama_hf.inference.options import Sampling


DRAWS = 20_000
SETTINGS = (
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
    {"temperature": 0.6, "top_k": 0, "top_p": 1.0},
    {"temperature": 1.0, "top_k": 9, "top_p": 0.9},
    {"temperature": 0.6, "top_k": 12, "top_p": 0.95},
)
# Each below 1e-3 over the number of chi-square tests in this file (Bonferroni) is a failure.
LIMIT = 1e-3 / 10


@pytest.fixture(scope="module")
def chain():
    """Returns a target in which the next token depends on the last one only: each token samples a known row."""
    target = model(0, reads_only_the_last_token=True)
    with torch.inference_mode():
        logits = target(torch.arange(VOCABULARY)[:, None]).logits[:, -1]
    return target, similar(target, 1), logits


@pytest.mark.parametrize(
    "setting",
    [*(pytest.param(s, marks=pytest.mark.slow) for s in SETTINGS[:-1]), SETTINGS[-1]],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_transitions(chain, setting):
    target, draft, logits = chain
    check_transitions(target, draft, logits, setting, rows=8)


@pytest.mark.slow
def test_transitions_of_a_single_row(chain):
    """A pass over one row takes as long as over eight, hence a quarter of the draws."""
    target, draft, logits = chain
    check_transitions(target, draft, logits, SETTINGS[3], rows=1, draws=DRAWS // 4)


@pytest.mark.slow
def test_transitions_with_look_up(chain):
    """Drafted tokens that were not sampled have q = 1."""
    target, _, logits = chain
    check_transitions(target, PromptLookup(2), logits, SETTINGS[0], rows=8)


def check_transitions(target, draft, logits, setting, rows, draws=DRAWS):
    torch.manual_seed(1234)
    length, left = 1250, draws
    counts = torch.zeros(VOCABULARY, VOCABULARY)
    drafted = accepted = 0
    while left > 0:
        prompt = torch.randint(VOCABULARY, (rows, 1))
        output = speculative_generate(
            target,
            draft,
            prompt,
            torch.ones_like(prompt),
            draft_length=3,
            do_sample=True,
            max_new_tokens=length,
            pad_token_id=0,
            return_dict_in_generate=True,
            **setting,
        )
        pairs = output.sequences[:, :-1] * VOCABULARY + output.sequences[:, 1:]
        counts += torch.bincount(pairs.flatten(), minlength=VOCABULARY**2).view(VOCABULARY, VOCABULARY)
        left -= rows * length
        drafted, accepted = drafted + output.statistics.drafted, accepted + output.statistics.accepted
    expected = warped(logits, **setting) * counts.sum(1, keepdim=True)
    found = p_value(counts, expected)
    print(f"{setting}, {rows} rows: {int(counts.sum())} draws, {accepted / drafted:.0%} accepted, p = {found:.3f}")
    assert counts.sum() >= draws and 0.05 < accepted / drafted < 0.95
    assert found > LIMIT


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "draws"), [(1, DRAWS // 5), (8, DRAWS)])
def test_whole_outputs_of_a_model_that_reads_everything(rows, draws):
    """Outputs of three tokens for ragged prompts, against the product of their exact probabilities."""
    target = model(5, reads_only_the_last_token=False)
    draft, setting = similar(target, 6), {"temperature": 0.8, "top_k": 5, "top_p": 1.0}
    torch.manual_seed(99)
    prompts = [torch.randint(VOCABULARY, (length,)) for length in (3, 9, 5, 1, 7, 2, 12, 4)[:rows]]
    width = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(p, (width - len(p), 0)) for p in prompts])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(p), (width - len(p), 0)) for p in prompts])
    counts = torch.zeros(rows, VOCABULARY**3)
    for _ in range(draws // rows):
        new = speculative_generate(
            target, draft, ids, mask, draft_length=2, do_sample=True, max_new_tokens=3, pad_token_id=0, **setting
        )[:, width:]
        codes = (new[:, 0] * VOCABULARY + new[:, 1]) * VOCABULARY + new[:, 2]
        counts[torch.arange(rows), codes] += 1
    expected = torch.stack([exact_outputs(target, prompt, setting) for prompt in prompts]) * (draws // rows)
    found = p_value(counts, expected)
    print(f"{rows} rows: p = {found:.3f}")
    assert found > LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [600, 7000])
def test_draws_that_follow_from_a_seed(batch_size):
    """Rows have their own random numbers, also for rejected tokens, and join while others are generated."""
    target = model(5, reads_only_the_last_token=False)
    setting = {"temperature": 0.8, "top_k": 0, "top_p": 0.9}
    draft = ModelProposer(similar(target, 6))
    prompts = [
        torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(length))
        for length in (3, 9, 5, 1)
    ]
    requests = [Request(key, prompts[key % 4].tolist(), 3 + key % 3) for key in range(DRAWS)]
    counts = torch.zeros(4, VOCABULARY**3)
    for done in generate_many(target, NoTokenizer(), requests, batch_size, Sampling(0.8, 0.9), seed=3, draft=draft):
        first, second, third = done.ids[:3]
        counts[done.key % 4, (first * VOCABULARY + second) * VOCABULARY + third] += 1
    assert 0.05 < draft.statistics.acceptance < 0.95
    expected = torch.stack([exact_outputs(target, prompt, setting) for prompt in prompts]) * (DRAWS // 4)
    found = p_value(counts, expected)
    print(f"batches of {batch_size}: p = {found:.3f}")
    assert found > LIMIT


class NoTokenizer:
    """Tokens without text and without end-of-sequence."""

    pad_token_id, eos_token_id = 0, None


@torch.inference_mode()
def exact_outputs(target, prompt, setting):
    """Returns the probability of every output of three tokens."""
    pairs = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=2)))
    ids = torch.cat([prompt.expand(len(pairs), -1), pairs], dim=1)
    p = warped(target(ids).logits[:, -3:], **setting)  # [pairs, 3, vocab]
    each = torch.arange(len(pairs))
    return (p[each, 0, pairs[:, 0]] * p[each, 1, pairs[:, 1]])[:, None].mul(p[:, 2]).flatten()
