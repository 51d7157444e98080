"""Rows of many clients in one batch: each as alone, joining and leaving at any time, within limits."""

import itertools
import threading
import time

import pytest
import torch

from tests.decoding.test_exactness import near
from tests.serving.scheduled import Delivered, row
from tests.serving.served import CONTEXT
from tinyllama_hf.batch.generate_many import Request, generate_many
from tinyllama_hf.decoding.proposals import ModelProposer, PromptLookup
from tinyllama_hf.inference.options import Sampling
from tinyllama_hf.serving import scheduler as scheduler_module
from tinyllama_hf.serving.call import Refusal
from tinyllama_hf.serving.response_formats import grammar_of, grammar_tokenizer
from tinyllama_hf.serving.scheduler import Scheduler
from tinyllama_hf.text import decode_text


@pytest.fixture
def make(local):
    """Makes schedulers of the model, and ends them."""
    made = []

    def of(**options):
        made.append(Scheduler(*local, **options))
        return made[-1]

    yield of
    for each in made:
        each.close(0)
        each.join()


def requests(tokenizer):
    return [
        row(tokenizer, "def f(x):", 20),
        row(tokenizer, "class", 9, temperature=1.0, seed=1),
        row(tokenizer, "x = 1", 16, temperature=0.6, top_p=0.9, top_k=30, seed=2),
        row(tokenizer, "def f(x):", 20, presence_penalty=1.0, frequency_penalty=0.5),
        row(tokenizer, "return", 14, repetition_penalty=1.4),
        row(tokenizer, "import", 14, temperature=1.2, min_p=0.05, seed=3, logit_bias={5: 3.0}),
        row(tokenizer, " ".join(["word"] * 90), 14),
    ]


@pytest.mark.parametrize("kind", ["plain", "lookup", "model"])
def test_each_row_is_as_alone(local, make, kind):
    """Seven rows with settings of their own in four places, and one after the other."""
    model, tokenizer = local
    draft = {"plain": None, "lookup": PromptLookup(), "model": ModelProposer(near(model, 0.02, 1))}[kind]
    together, alone = make(draft=draft, max_rows=4), make(draft=draft, max_rows=1)
    at_once = [Delivered(together, request) for request in requests(tokenizer)]
    found = [delivered.text() for delivered in at_once]
    assert found == [Delivered(alone, request).text() for request in requests(tokenizer)]
    assert len(set(found)) == len(found)
    assert all(each.last().finish_reason == "length" for each in at_once)
    assert [each.last().counts.new for each in at_once] == [20, 9, 16, 20, 14, 14, 14]
    drafted = sum(each.last().counts.drafted for each in at_once)
    assert (drafted > 0) == (kind != "plain")
    assert together.running == together.waiting == 0


def test_a_row_without_the_draft(local, make):
    scheduler = make(draft=PromptLookup())
    requests = [row(local[1], "def f(x): return x def f(x):", 20, is_drafted=drafted) for drafted in (True, False)]
    with_draft, without = [Delivered(scheduler, request) for request in requests]
    assert with_draft.text() == without.text()
    assert with_draft.last().counts.drafted > 0 == without.last().counts.drafted


def test_replies_are_those_of_generate(local, make):
    """Of `generate --input`, also sampled with a seed."""
    model, tokenizer = local
    scheduler = make()
    ids = tokenizer("def f(x):")["input_ids"]
    for sampling, settings in ((Sampling(0, 1.0), {}), (Sampling(1.0, 0.9), {"temperature": 1.0, "top_p": 0.9})):
        (expected,) = generate_many(model, tokenizer, [Request(0, ids, 20)], sampling=sampling, seed=7)
        text = Delivered(scheduler, row(tokenizer, "def f(x):", 20, seed=7, **settings)).text()
        assert decode_text(tokenizer, ids + expected.ids) == "def f(x):" + text


def test_without_a_seed_nothing_repeats(local, make):
    scheduler = make()
    texts = {Delivered(scheduler, row(local[1], "def", 20, temperature=1.0)).text() for _ in range(4)}
    assert len(texts) == 4


def test_the_rows_of_a_call_have_their_own_random_numbers(local, make):
    rows = [row(local[1], "def", 20, temperature=1.0, seed=5, place=place) for place in range(3)]
    first, again = Delivered(make(), *rows), Delivered(make(), *rows)
    assert [first.text(n) for n in range(3)] == [again.text(n) for n in range(3)]
    assert len({first.text(n) for n in range(3)}) == 3


def test_penalties_by_definition(local, make):
    """A greedy loop over the model with OpenAI's formula."""
    model, tokenizer = local
    ids, new = tokenizer("def f(x):")["input_ids"], []
    for _ in range(20):
        logits = model(torch.tensor([ids + new])).logits[0, -1].clone()
        for token in set(new):
            logits[token] -= 1.5 + 0.7 * new.count(token)
        logits[9] += 2.0
        new.append(int(logits.argmax()))
    request = row(tokenizer, "def f(x):", 20, presence_penalty=1.5, frequency_penalty=0.7, logit_bias={9: 2.0})
    assert "def f(x):" + Delivered(make(), request).text() == decode_text(tokenizer, ids + new)


def test_log_probabilities(local, make):
    """Of the prompt and the reply, by the model's own logits, whatever the sampling settings are."""
    model, tokenizer = local
    prompt = " ".join(f"word{n}" for n in range(40))
    settings = {"temperature": 0.5, "top_k": 3, "seed": 1, "presence_penalty": 1.0}
    request = row(tokenizer, prompt, 10, top_logprobs=3, scores_prompt=True, **settings)
    length = len(request.ids)
    assert length > 2 * scheduler_module._PIECE_ON_CPU, "more than one piece"
    scheduler = make()
    others = [Delivered(scheduler, row(tokenizer, "def", 60)) for _ in range(2)]
    delivered = Delivered(scheduler, request)
    scores = delivered.scores()
    assert [score.token for score in scores[:length]] == list(request.ids)
    new = [score.token for score in scores[length:]]
    assert len(new) == 10 and scores[0].logprob is None
    with torch.no_grad():
        expected = model(torch.tensor([[*request.ids, *new]])).logits[0].log_softmax(-1)
    for place, score in enumerate(scores[1:]):
        values, tokens = expected[place].topk(3)
        assert score.logprob == pytest.approx(float(expected[place, score.token]), abs=1e-4)
        assert [token for token, _ in score.top] == tokens.tolist()
        assert [value for _, value in score.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert all(other.text() and not other.scores() for other in others)
    assert scores[length].offset == 0


def test_only_the_prompt_is_scored(local, make):
    request = row(local[1], "def f(x):", 0, top_logprobs=0, scores_prompt=True)
    delivered = Delivered(make(), request)
    assert len(delivered.scores()) == len(request.ids) and delivered.text() == ""
    assert delivered.last().counts.new == 0
    one = row(local[1], "", 0, top_logprobs=0, scores_prompt=True)
    assert len(one.ids) == 1 and [score.logprob for score in Delivered(make(), one).scores()] == [None]


def test_stop_strings_cut_text_and_scores(local, make):
    scheduler = make()
    whole = Delivered(scheduler, row(local[1], "def f(x):", 40, top_logprobs=0))
    text = whole.text()
    stop = text[12:16]
    cut = Delivered(scheduler, row(local[1], "def f(x):", 40, stop_strings=(stop,), top_logprobs=0))
    assert cut.text() == text.partition(stop)[0] and cut.last().finish_reason == "stop"
    assert cut.last().counts.new < 40
    offsets = [score.offset for score in cut.scores()]
    assert offsets == [score.offset for score in whole.scores() if score.offset < len(cut.text())]


def test_a_long_prompt_does_not_stop_the_others(local, make, monkeypatch):
    """Between any two pieces of it, the others get a token."""
    tokenizer = local[1]
    scheduler, log = make(), []
    read = scheduler_module.Decoding.read_piece

    def noted(self, *arguments):
        log.append("piece")
        return read(self, *arguments)

    monkeypatch.setattr(scheduler_module.Decoding, "read_piece", noted)
    other = Delivered(scheduler, row(tokenizer, "def", 60))
    other.next()
    receive = other.rows[0].receive
    other.rows[0].receive = lambda *tokens: (log.append("token"), receive(*tokens))
    long = Delivered(scheduler, row(tokenizer, "word " * 120, 2))
    assert len(long.rows[0].request.ids) > 300
    long.wait()
    other.wait()
    places = [n for n, what in enumerate(log) if what == "piece"]
    assert len(places) >= 4
    assert all("token" in log[a:b] for a, b in itertools.pairwise(places))


def test_clients_that_leave(local, make):
    """While their row waits, while its prompt is read, and while it is generated; the others continue."""
    tokenizer = local[1]
    scheduler = make(max_rows=2)
    staying = Delivered(scheduler, row(tokenizer, "def f(x):", 200))
    leaving = Delivered(scheduler, row(tokenizer, "class", 300))
    waiting = Delivered(scheduler, row(tokenizer, "x", 5))
    leaving.next()
    scheduler.cancel([*leaving.rows, *waiting.rows])
    assert waiting.nothing_more()
    assert staying.last().counts.new == 200
    long = Delivered(scheduler, row(tokenizer, "word " * 120, 2))
    scheduler.cancel(long.rows)
    assert Delivered(scheduler, row(tokenizer, "def f(x):", 12)).text()
    assert scheduler.running == 0 and not any(piece.is_last for piece in long.pieces)


def test_a_full_queue(local, make):
    tokenizer = local[1]
    scheduler = make(max_rows=1, max_waiting=2)
    first = Delivered(scheduler, row(tokenizer, "def", 300))
    first.next()
    others = [Delivered(scheduler, row(tokenizer, "x", 2)) for _ in range(2)]
    with pytest.raises(Refusal, match="2 replies are waiting; try again in 5 seconds") as refused:
        scheduler.submit([row(tokenizer, "x", 2)], print)
    assert refused.value.status == 429 and refused.value.headers == {"Retry-After": "5"}
    assert all(other.text() is not None for other in (first, *others))
    assert Delivered(scheduler, row(tokenizer, "x", 2)).last().counts.new == 2


def test_the_time_of_a_row(local, make, monkeypatch):
    """What has been generated is delivered; a row that did not begin is refused."""
    model, tokenizer = local
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: time.sleep(0.01) or forward(**inputs))
    scheduler = make(max_rows=1, row_seconds=0.5)
    rows = [Delivered(scheduler, row(tokenizer, "def", CONTEXT - 5)) for _ in range(6)]
    ends = [delivered.last() for delivered in rows]
    assert ends[0].finish_reason == "length" and 0 < ends[0].counts.new < CONTEXT - 5
    assert ends[-1].error.status == 503 and "did not begin within" in ends[-1].error.message


def test_the_end_of_the_server(local, make):
    """Rows under way end by themselves; rows that wait and new ones are refused."""
    tokenizer = local[1]
    scheduler = make(max_rows=1)
    running = Delivered(scheduler, row(tokenizer, "def", 100))
    running.next()
    waiting = Delivered(scheduler, row(tokenizer, "x", 2))
    scheduler.close(60)
    assert waiting.last().error.status == 503
    with pytest.raises(Refusal, match="shutting down"):
        scheduler.submit([row(tokenizer, "x", 2)], print)
    assert running.last().counts.new == 100
    scheduler.join()
    late = make(max_rows=1)
    cut = Delivered(late, row(tokenizer, "def", CONTEXT - 5))
    cut.next()
    late.close(0)
    assert cut.last().error.message == "the server is shutting down"
    late.join()


def test_a_failure(local, make, monkeypatch):
    """Rows under way get an error, and the next ones a reply."""
    model, tokenizer = local
    scheduler = make()
    rows = [Delivered(scheduler, row(tokenizer, "def", 300)) for _ in range(2)]
    for each in rows:
        each.next()
    broken = threading.Event()
    forward = model.forward

    def failing(*arguments, **options):
        if broken.is_set():
            raise RuntimeError("out of\nmemory")
        return forward(*arguments, **options)

    monkeypatch.setattr(model, "forward", failing)
    broken.set()
    for each in rows:
        error = each.last().error
        assert (error.status, error.message) == (500, "generation failed: RuntimeError: out of memory")
    assert Delivered(scheduler, row(tokenizer, "def", 3)).last().error.status == 500
    broken.clear()
    assert Delivered(scheduler, row(tokenizer, "def", 3)).last().counts.new == 3


def test_nothing_is_kept_of_ended_rows(local, make):
    scheduler = make()
    for _ in range(3):
        for delivered in [Delivered(scheduler, row(local[1], "def", 4, top_logprobs=1)) for _ in range(4)]:
            delivered.wait()
    deadline = time.monotonic() + 10
    while scheduler._batch is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert scheduler._batch is None and not scheduler._rows and not scheduler._reading


def test_a_schema_that_cannot_be_followed(local):
    """The reply would look complete, and is refused; the others get theirs."""
    model, tokenizer = local
    scheduler = Scheduler(model, tokenizer, vocabulary=grammar_tokenizer(model, tokenizer))
    endless = grammar_of({"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}, "x")
    good = grammar_of({"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["a", 5]}}}, "x")
    bad, other = (Delivered(scheduler, row(tokenizer, "x", 30, grammar=each)) for each in (endless, good))
    assert bad.last().error.message.startswith("response_format: the schema cannot be followed any further (")
    assert other.text() in ('"a"', "5") and other.last().finish_reason == "stop"
    scheduler.close(0)
    scheduler.join()
