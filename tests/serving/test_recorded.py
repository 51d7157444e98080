"""Requests of the server through recorded steps, which a GPU has: the same text, stop strings and cancellation."""

import asyncio
import copy

import pytest
import torch
from transformers import GenerationConfig

from tests.decoding.replay import Replay
from tinyllama_hf import load
from tinyllama_hf.decoding import fixed_memory, graphs
from tinyllama_hf.serving.request_queue import Generation


@pytest.fixture
def stories(shared):
    return load(shared / "data" / "models" / "stories260K", dtype=torch.float32)


@pytest.fixture
def recorders(monkeypatch):
    found: list[Replay] = []
    fixed_memory._kept.clear()
    monkeypatch.setattr(graphs, "recorder_for", lambda device: found.append(Replay()) or found[-1])
    return found


def config(**options):
    made = GenerationConfig(max_new_tokens=40, do_sample=False, pad_token_id=0, eos_token_id=2, **options)
    made.seed = None
    return made


def answer(stories, **options):
    model, tokenizer = stories
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    text, _, ids = asyncio.run(
        Generation().generate_non_streaming(model, tokenizer, dict(inputs), config(**options), "id")
    )
    return text, ids.tolist()


@pytest.mark.parametrize("options", [{}, {"stop_strings": ["girl"]}], ids=["length", "stop string"])
def test_the_same_text(stories, recorders, options, monkeypatch):
    found = answer(stories, **options)
    assert recorders and sum(recorder.replays for recorder in recorders) > 5
    monkeypatch.setattr(graphs, "recorder_for", lambda device: None)
    assert found == answer(stories, **copy.deepcopy(options))


def test_a_client_that_leaves_ends_its_generation(stories, recorders):
    model, tokenizer = stories

    async def leave() -> list[str]:
        generation = Generation()
        inputs = dict(tokenizer("Once upon a time", return_tensors="pt"))
        settings = config()
        settings.max_new_tokens = 400
        queue, reply = generation.generate_streaming(model, tokenizer, inputs, settings, "id")
        parts = [await queue.get()]
        reply.cancel()
        while (part := await queue.get()) is not None:
            parts.append(part)
        return parts

    assert len(asyncio.run(leave())) < 200
    assert answer(stories)[0], "the next request is answered"
