"""Rows of requests with shared prefixes: what each token attends to, and log-likelihoods as of each request alone."""

import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tinyllama_hf.errors import InputError
from tinyllama_hf.evaluation.harness import prefix_tree
from tinyllama_hf.evaluation.harness.prefix_tree import EncodedRequest, score_requests, tree_rows


def questions(seed: int, vocab_size: int = 50, number: int = 30) -> list[EncodedRequest]:
    """Questions with one to five choices, some with a common start, some choices beginning with equal tokens."""
    draw = random.Random(seed)

    def text(longest: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(draw.randint(1, longest))]

    starts, found = [text(20) for _ in range(3)], []
    for _ in range(number):
        context, first = draw.choice([[], *starts]) + text(25), text(3)
        for _ in range(draw.randint(1, 5)):
            found.append(EncodedRequest(context, draw.choice([[], first]) + text(6)))
    found += [found[0], EncodedRequest(*found[1]), EncodedRequest(found[2].context, found[2].continuation[:1])]
    draw.shuffle(found)
    return found


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    built = LlamaForCausalLM(config).eval()
    torch.nn.init.normal_(built.lm_head.weight, std=1.0)
    return built


@torch.inference_mode()
def alone(model, request) -> tuple[float, bool]:
    """The answer to a request in a forward pass of its own."""
    context, continuation = request
    logits = model(torch.tensor([[*context, *continuation]])).logits[0, len(context) - 1 : -1]
    scores = logits.double().log_softmax(1)[range(len(continuation)), continuation]
    return scores.sum().item(), logits.argmax(1).tolist() == list(continuation)


def score_all(model, requests) -> dict[int, tuple[float, bool]]:
    found: dict[int, tuple[float, bool]] = {}

    def answered(answers, num_tokens):
        assert num_tokens > 0 and found.keys().isdisjoint(number for number, _ in answers)
        found.update(answers)

    score_requests(model, requests, answered)
    return found


@pytest.mark.parametrize("tokens_per_row", [1, 40, 100, 10_000])
@pytest.mark.parametrize("seed", range(5))
def test_every_request_is_a_path_of_its_row(seed, tokens_per_row):
    requests = questions(seed)
    rows = tree_rows(requests, tokens_per_row)
    seen = []
    for row in rows:
        depths, mask = row.depths(), row.mask()
        for number, places in row.scored:
            context, continuation = requests[number]
            tokens = [*context, *continuation][:-1]
            last = places[-1]
            path = mask[last].nonzero().flatten().tolist()  # a parent is before its child
            assert [row.tokens[index] for index in path] == tokens
            assert [depths[index] for index in path] == list(range(len(tokens)))
            assert places == path[-len(continuation) :]
            for depth, index in enumerate(path):
                assert mask[index].nonzero().flatten().tolist() == path[: depth + 1]
            seen.append(number)
        assert len(row.tokens) <= max(tokens_per_row, 2 * max(sum(map(len, requests[n])) for n, _ in row.scored))
    assert sorted(seen) == list(range(len(requests)))
    assert [len(row.tokens) for row in rows] == sorted((len(row.tokens) for row in rows), reverse=True)


def test_what_is_shared_is_read_once():
    context = list(range(40))
    choices = [EncodedRequest(context, [40 + n, 1, 2]) for n in range(4)]
    (row,) = tree_rows(choices)
    assert len(row.tokens) == 40 + 4 * 2, "the last token of a choice is predicted, not read"
    other = [EncodedRequest([49, *context], [1, 2]), EncodedRequest([49, *context], [2, 3])]
    rows = tree_rows([*other, *choices], 60)
    assert [len(row.tokens) for row in rows] == [48, 43], "a row ends between two questions"


def test_a_context_that_is_longer_than_a_row_is_read_for_many_requests():
    solved = [n % 50 for n in range(600)]
    (row,) = tree_rows([EncodedRequest(solved, [n]) for n in range(4)], 256)
    assert len(row.tokens) == 600 and len(row.scored) == 4, "choices of one token add none"
    asked = [
        EncodedRequest([*solved, 40 + n, *range(n, n + 30)], [choice, 1]) for n in range(9) for choice in range(4)
    ]
    rows = tree_rows(asked, 256)
    assert [len(row.scored) for row in rows] == [36] and sum(len(row.tokens) for row in rows) == 600 + 9 * (31 + 4)


@pytest.mark.parametrize("seed", range(3))
def test_answers_are_those_of_each_request_alone(model, seed):
    requests = questions(seed)
    for context, _ in requests[:3]:
        likely = model.generate(torch.tensor([context]), max_new_tokens=3, do_sample=False, eos_token_id=None)
        requests.append(EncodedRequest(context, likely[0, len(context) :].tolist()))
    found = score_all(model, requests)
    assert len(found) == len(requests)
    for number, request in enumerate(requests):
        likelihood, is_greedy = alone(model, request)
        assert found[number].log_likelihood == pytest.approx(likelihood, abs=1e-4)
        assert found[number].is_greedy == is_greedy
    assert all(found[number].is_greedy for number in range(len(requests) - 3, len(requests)))


def test_attention_of_rows_computes_no_keys_after_a_block(model, monkeypatch):
    """Only while rows are read, and for a model with eager attention too."""
    requests, shapes = questions(3, number=60), []

    def count(queries, keys, values, mask, **options):
        shapes.append((queries.shape[2], keys.shape[2]))
        assert mask.shape[2:] == shapes[-1]
        return torch.nn.functional.scaled_dot_product_attention(queries, keys, values, mask, **options)

    monkeypatch.setattr(prefix_tree, "scaled_dot_product_attention", count)
    score_all(model, requests)
    assert model.config._attn_implementation == "sdpa"
    assert {keys for _, keys in shapes} >= {64, 128, 192} and (64, 64) in shapes and max(shapes)[1] <= 256
    model.set_attn_implementation("eager")
    try:
        found = score_all(model, requests)
        assert model.config._attn_implementation == "eager"
        for number, request in enumerate(requests):
            assert found[number].log_likelihood == pytest.approx(alone(model, request)[0], abs=1e-4)
    finally:
        model.set_attn_implementation("sdpa")


def test_attention_is_restored_after_an_error(model, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("stop")

    monkeypatch.setattr(prefix_tree, "_token_scores", fail)
    with pytest.raises(RuntimeError, match="stop"):
        score_all(model, questions(0))
    assert model.config._attn_implementation == "sdpa"


def test_the_logits_in_memory_are_bounded(model, monkeypatch):
    requests = questions(1)
    whole, sizes = score_all(model, requests), []
    monkeypatch.setattr(prefix_tree, "_LOGITS", 7 * 50)
    model.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    parts = score_all(model, requests)
    assert max(sizes) == 7
    for number, answer in whole.items():
        assert parts[number].log_likelihood == pytest.approx(answer.log_likelihood, abs=1e-5)


def test_a_batch_beyond_the_memory_is_divided(model, monkeypatch):
    """The model refuses more than a number of tokens as a GPU would; every request is answered once."""
    requests, sizes = questions(2), []

    def refuse(module, inputs, options):
        sizes.append(options["input_ids"].numel())
        if sizes[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")

    whole = score_all(model, requests)
    handle = model.model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        limit = 400
        assert score_all(model, requests).keys() == whole.keys() and sizes[0] > limit >= sizes[-1]
        limit = 20
        with pytest.raises(InputError, match="tokens does not fit in the memory of cpu"):
            score_all(model, requests)
    finally:
        handle.remove()
