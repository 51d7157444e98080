"""Rows of the server through recorded steps, which a GPU has: the same replies, with rows that join and leave."""

import pytest
import torch

from tests.decoding.replay import Replay
from tests.serving.scheduled import Delivered, row
from tinyllama_hf import load
from tinyllama_hf.decoding import fixed_memory, graphs
from tinyllama_hf.decoding.proposals import PromptLookup
from tinyllama_hf.serving.scheduler import Scheduler


@pytest.fixture
def stories(shared):
    return load(shared / "data" / "models" / "stories260K", dtype=torch.float32)


def replies(stories, draft):
    """Of rows with equal settings, with different ones, with stop strings; one leaves."""
    tokenizer, scheduler = stories[1], Scheduler(*stories, draft=draft, max_rows=4)
    rows = [row(tokenizer, text, 40) for text in ("Once upon a time", "The", "A girl", "One day")]
    rows += [row(tokenizer, "Once", 30, temperature=0.8, seed=1), row(tokenizer, "He", 30, stop_strings=("she", "."))]
    leaving = Delivered(scheduler, row(tokenizer, "Tom", 300))
    delivered = [Delivered(scheduler, each) for each in rows]
    scheduler.cancel(leaving.rows)
    texts = [each.text() for each in delivered]
    scheduler.close(0)
    scheduler.join()
    return texts


@pytest.mark.parametrize("draft", [None, PromptLookup()], ids=["plain", "lookup"])
def test_the_same_replies(stories, draft, monkeypatch):
    fixed_memory._kept.clear()
    plain = replies(stories, draft)
    recorders: list[Replay] = []
    monkeypatch.setattr(graphs, "recorder_for", lambda device: recorders.append(Replay()) or recorders[-1])
    assert replies(stories, draft) == plain
    assert recorders and sum(recorder.replays for recorder in recorders) > 5
