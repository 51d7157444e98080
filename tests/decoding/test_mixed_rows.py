"""Rows with different settings in one batch, prompts that are read in pieces, and rows that are canceled."""

import pytest
import torch
from transformers import LogitsProcessor

from tests.decoding.test_exactness import near
from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM
from tinyllama_hf.decoding.acceptance import MostLikelyToken
from tinyllama_hf.decoding.engine import Decoding
from tinyllama_hf.decoding.proposals import ModelProposer, PromptLookup
from tinyllama_hf.decoding.rows import RowPlan


NEW = 12


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return TinyLlamaForCausalLM(TinyLlamaConfig.preset("micro", vocab_size=128)).eval().double()


class Plus(LogitsProcessor):
    """A processor of a user, called in Python for each row."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids, scores):
        scores[:, self.token] += 5.0 * (input_ids.shape[1] % 2)
        return scores


# Prompt, settings.
ROWS = [
    ([5, 17, 33, 9, 9, 2, 7], {"logits_processor": [MostLikelyToken()]}),
    ([9, 4], {"temperature": 0.7, "top_k": 20}),
    ([100, 3, 77, 41, 8, 60, 21], {"temperature": 1.3}),
    ([1, 2, 3], {"logits_processor": [Plus(7)]}),
    ([5, 17, 33], {"repetition_penalty": 1.5, "logits_processor": [MostLikelyToken()]}),
]


def decoding(model, key, draft=None, draft_length=None, **more):
    ids, settings = ROWS[key]
    draws = torch.rand(3, NEW, dtype=torch.float64, generator=torch.Generator().manual_seed(key))
    plan = RowPlan(key, NEW, draws, draft_length)
    arguments = {"do_sample": True, "top_k": 0, "max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": None}
    prompt = torch.tensor([ids])
    return Decoding(model, draft, None, prompt, torch.ones_like(prompt), [plan], **arguments | settings | more)


def finish(running):
    while len(running.rows):
        running.round()
    return {key: ids.tolist() for key, ids in running.rows.take_finished()}


def alone(model, key, *options):
    made = decoding(model, key, *options)
    made.start()
    return finish(made)[key]


def joined(model, *options):
    running = decoding(model, 0, *options)
    running.start()
    for key in range(1, len(ROWS)):
        running.round()
        other = decoding(model, key, *options)
        other.start()
        running.join(other)
    return running


@pytest.mark.parametrize("kind", ["plain", "lookup", "model"])
def test_each_row_is_as_alone(model, kind):
    """Greedy and sampled rows, with processors of their own; with a draft of fixed length, which a seed needs."""
    draft = {"plain": None, "lookup": PromptLookup(), "model": ModelProposer(near(model, 0.05, 1))}[kind]
    length = None if kind == "plain" else 3
    found = finish(joined(model, draft, length))
    assert found == {key: alone(model, key, draft, length) for key in range(len(ROWS))}


def test_the_most_likely_token_is_greedy(model):
    for key in (0, 4):
        ids, settings = ROWS[key]
        penalty = settings.get("repetition_penalty", 1.0)
        greedy = model.generate(
            torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None,
            repetition_penalty=penalty,
        )  # fmt: skip
        assert alone(model, key) == greedy[0, len(ids) :].tolist()


def test_equal_settings_share_one_call_again(model):
    """After the rows with other settings have ended."""
    running = joined(model)
    assert running._processors.recordable is None
    running.cancel({1, 2, 3, 4})
    assert running._processors.recordable == (("MostLikelyToken",),)
    assert finish(running)[0] == alone(model, 0)


@pytest.mark.parametrize("kind", ["plain", "model"])
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_prompts_in_pieces(model, kind, size):
    draft = ModelProposer(near(model, 0.05, 1)) if kind == "model" else None
    ids = ROWS[2][0]
    made = decoding(model, 2, draft, 3)
    whole = model(torch.tensor([ids])).logits[0]
    read = []
    while (logits := made.read_piece(size, with_logits=True)) is not None:
        read.append(logits[0])
    torch.testing.assert_close(torch.cat(read), whole[:-1].float(), rtol=0, atol=1e-5)
    made.start()
    running = decoding(model, 0, draft, 3)
    running.start()
    running.join(made)
    found = finish(running)
    assert found == {key: alone(model, key, draft, 3) for key in (0, 2)}


def test_pieces_of_a_batch_with_padding(model):
    prompts = [[5, 17, 33], [100, 3, 77, 41, 8, 60, 21]]
    padded = torch.tensor([[0] * 4 + prompts[0], prompts[1]])
    mask = (torch.arange(7) >= torch.tensor([[4], [0]])).long()
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = []
    for size in (None, 2):
        made = Decoding(model, None, 0, padded, mask, **options)
        while size and made.read_piece(size) is not None:
            pass
        made.start()
        found.append(finish(made))
    assert found[0] == found[1]


def test_canceled_rows_leave_and_the_others_go_on(model):
    running = joined(model)
    before = {key: len(running.rows.lengths) for key in running.rows.keys}
    assert set(before) == set(range(5))
    running.cancel({1, 3})
    assert sorted(running.rows.keys) == [0, 2, 4]
    cut = dict(running.rows.take_finished())
    assert set(cut) == {1, 3} and all(0 < len(cut[key]) < NEW for key in cut)
    assert cut[1].tolist() == alone(model, 1)[: len(cut[1])]
    assert finish(running) == {key: alone(model, key) for key in (0, 2, 4)}
    running.cancel({0, 99})
    assert running.round() == {}


def test_logits_of_chosen_rows_and_counts_of_drafts(model):
    """Only of the rows that want them, by key, also of rows that join."""
    draft = ModelProposer(near(model, 0.05, 1))
    running = decoding(model, 0, draft, 3)
    running.start()
    other = decoding(model, 1, draft, 3)
    other.token_scores["logits"] = {1: []}
    other.start()
    running.join(other)
    new = finish(running)
    logits = torch.cat(running.token_scores["logits"][1])
    whole = model(torch.tensor([ROWS[1][0] + new[1]])).logits[0, len(ROWS[1][0]) - 1 : -1]
    torch.testing.assert_close(logits, whole.float(), rtol=0, atol=1e-5)
    assert running.token_scores["logits"].keys() == {1}
    for key in (0, 1):
        drafted, accepted = running.draft_counts[key]
        assert 0 < accepted <= drafted and accepted < NEW
    statistics = running.statistics
    assert [sum(counts) for counts in zip(*running.draft_counts.values(), strict=True)] == [
        statistics.drafted, statistics.accepted,
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["lookup", "model"])
def test_rows_without_a_draft(model, kind):
    """Nothing is drafted for them, their tokens are those of plain decoding, and the others keep their drafts."""
    draft = PromptLookup() if kind == "lookup" else ModelProposer(near(model, 0.05, 1))
    running = decoding(model, 0, draft, 3)
    running.start()
    for key in (2, 4):
        other = decoding(model, key, draft)
        row = other.rows._rows[0]
        row.plan = row.plan._replace(is_drafted=False)
        other.start()
        running.join(other)
    assert finish(running) == {0: alone(model, 0, draft, 3), 2: alone(model, 2), 4: alone(model, 4)}
    drafted = {key: counts[0] for key, counts in running.draft_counts.items()}
    assert drafted[2] == drafted[4] == 0 < drafted[0]
