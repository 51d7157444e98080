"""2,000 hostile bodies end in a refusal or a call, in a short time; hard schemas end a reply, and never the server."""

import gc
import time

import pytest
import torch

from tests.serving.hostile_bodies import LARGE_FORMS, hostile_bodies
from tinyllama_hf.serving.call import Call, Refusal
from tinyllama_hf.serving.response_formats import GrammarProcessor, grammar_tokenizer


@pytest.fixture(scope="module")
def outcomes(reader):
    """Of each body its form and endpoint, the call or refusal, and the processor time of this thread in seconds."""
    gc.collect()
    gc.freeze()  # otherwise each collection visits all objects of torch and transformers
    found = []
    for name, kind, body in hostile_bodies(2_000):
        began = time.thread_time()
        try:
            outcome = reader.read(kind, body)
        except Refusal as refusal:
            outcome = refusal
        found.append((name, kind, outcome, time.thread_time() - began))
    gc.unfreeze()
    return found


def test_each_ends_in_a_refusal_or_a_call(outcomes):
    """In any other case the fixture fails."""
    calls = [outcome for *_, outcome, _ in outcomes if isinstance(outcome, Call)]
    assert len(outcomes) == 2_000 and len({name for name, *_ in outcomes}) > len(LARGE_FORMS)
    assert 100 < len(calls) < 1_900
    for name, _, outcome, seconds in outcomes:
        assert seconds < 2, name
        if isinstance(outcome, Refusal):
            assert outcome.status in (400, 404) and 10 < len(outcome.message) < 1_100, (name, outcome.message)
    for row in (row for call in calls for row in call.rows):
        assert len(row.ids) + row.max_new_tokens <= 400 and row.ids and all(0 <= token < 512 for token in row.ids)


def test_grammars_of_accepted_schemas_can_be_followed(outcomes, local):
    """Each mask allows a token; where the grammar is too large only the end, and the reason is kept."""
    tokenizer, random, failed = grammar_tokenizer(*local), torch.Generator().manual_seed(0), {}
    calls = [(name, outcome) for name, *_, outcome, _ in outcomes if "schema" in name and isinstance(outcome, Call)]
    for name, call in calls:
        processor, ids = GrammarProcessor(tokenizer, call.rows[0].grammar, 1), [1]
        while len(ids) < 30 and ids[-1] != 2:
            began = time.thread_time()
            scores = processor(torch.tensor([ids]), torch.rand(1, 512, generator=random))
            assert torch.isfinite(scores).any() and time.thread_time() - began < 1, name
            ids.append(int(scores.argmax()))
        if processor.error:
            failed[name] = processor.error
            assert ids[-1] == 2, name
    assert len(calls) > 30 and failed.keys() >= {"a schema that refers to itself", "a schema without end"}
    assert not any("<state>" in reason or len(reason) > 300 for reason in failed.values())
