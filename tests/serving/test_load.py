"""Bodies, messages and the queue of the server are bounded, and a long prompt does not delay other requests."""

import asyncio
import json
import threading

import pytest

from tests.serving.served import CONTEXT, GENERATING, ask, post
from tinyllama_hf.serving import request_fields, request_queue
from tinyllama_hf.serving.app import MAX_BODY_BYTES, build_app


testclient = pytest.importorskip("starlette.testclient")

EMPTY = {"role": "user", "content": ""}


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize("chunks", [None, 7], ids=["declared", "chunked"])
def test_the_size_of_a_body(client, path, chunks):
    """One byte above the limit is refused, whether the size is declared or not; a body at the limit is read."""

    def send(size):
        body = json.dumps({"prompt": "x", "nonsense": ""}).encode()
        body = body.replace(b'""', b'"' + b"x" * (size - len(body)) + b'"')
        parts = body if chunks is None else (body[i : i + 2**20] for i in range(0, len(body), 2**20))
        return client.post(f"/v1/{path}", content=parts, headers={"Content-Type": "application/json"})

    answer = send(MAX_BODY_BYTES + 1)
    assert answer.status_code == 413
    error = answer.json()["error"]
    assert str(MAX_BODY_BYTES) in error["message"] and error["type"] == "invalid_request_error"
    answer = send(MAX_BODY_BYTES)
    assert answer.status_code == 400 and "nonsense" in answer.json()["error"]["message"]


def test_a_body_without_end(app):
    """The rest of a large body is discarded before the answer; reading stops in a body without an end."""
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 2**16
            assert taken < 16 * MAX_BODY_BYTES
            yield b" " * 2**16

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
    parts, sent = endless(), []

    async def receive():
        return (
            {"type": "http.request", "body": next(parts), "more_body": True}
            if not sent
            else {"type": "http.disconnect"}
        )

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 413 and taken > 4 * MAX_BODY_BYTES


@pytest.mark.parametrize("path", ["chat/completions", "responses"])
def test_more_messages_than_the_context_has_tokens(client, path, monkeypatch):
    """They are refused before they are rendered."""
    monkeypatch.setattr(request_fields, "chat_ids", None)
    field = "messages" if path == "chat/completions" else "input"
    for number in (CONTEXT + 1, 100_000):
        status, error = ask(client, {field: [EMPTY] * number}, path)
        assert status == 400 and f"{number} messages; must be at most {CONTEXT}" in error["message"]


@pytest.mark.parametrize("path", ["chat/completions", "responses"])
def test_parts_count_like_messages(client, path):
    part = {"type": "text", "text": ""}
    body = {"messages": [{"role": "user", "content": [part] * 100_000}]}
    status, error = ask(client, body if path == "chat/completions" else {"input": [part] * 100_000}, path)
    assert status == 400 and "must be at most" in error["message"]


@pytest.mark.parametrize("where", ["prompt", "max_tokens", "logit_bias", "generation_config", "stop", "messages"])
def test_nested_and_large_values(client, where):
    """The JSON reader or the checks refuse them, with the same format of the error."""
    path = "chat/completions" if where == "messages" else "completions"
    deep = [b"[" * depth + b"]" * depth for depth in (900, 960, 990, 5000, 100_000)]
    for value in (
        *deep,
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b"9" * 4000,
        b"9" * 5000,
        b"1e999",
        b"[" + b"9," * 9999 + b"9]",
    ):
        status, error = ask(client, b'{"temperature": 0, "%s": %s}' % (where.encode(), value), path)
        assert status == 400 and len(error["message"]) < 1100, value[:20]


@pytest.fixture
def alone(local):
    """An application with one event loop for all requests, as in a server."""
    with testclient.TestClient(build_app("my-model", *local), raise_server_exceptions=False) as client:
        yield client


def in_threads(function, *arguments):
    """Calls a function in one thread per argument; returns a function that waits for the results."""
    results = {}
    threads = [threading.Thread(target=lambda a=a: results.update({a: function(a)})) for a in arguments]
    for thread in threads:
        thread.start()

    def join():
        for thread in threads:
            thread.join(timeout=30)
        return [results[a] for a in arguments]

    return join


@pytest.mark.parametrize("path", ["chat/completions", "responses"])
def test_others_are_answered_while_a_conversation_is_rendered(alone, path, monkeypatch):
    begun, resume = threading.Event(), threading.Event()
    render = request_fields.chat_ids

    def slow(*arguments):
        begun.set()
        assert resume.wait(timeout=10), "no other request was answered"
        return render(*arguments)

    monkeypatch.setattr(request_fields, "chat_ids", slow)
    length = {"max_output_tokens" if path == "responses" else "max_tokens": 1}
    join = in_threads(lambda path: post(alone, length, path).status_code, path)
    assert begun.wait(timeout=10)
    assert alone.get("/health").json() == {"status": "ok"} and alone.get("/v1/models").is_success
    resume.set()
    assert join() == [200]


@pytest.fixture
def held(local, monkeypatch):
    """Allows two waiting requests; generation waits for the event, and requests that enter the queue are counted."""
    monkeypatch.setattr(request_queue, "MAX_WAITING", 2)
    joined, resume = threading.Semaphore(0), threading.Event()
    limit, generate = request_queue._limit, local[0].generate

    def counted(*arguments):
        limit(*arguments)
        joined.release()

    def slow(**arguments):
        assert resume.wait(timeout=20)
        return generate(**arguments)

    monkeypatch.setattr(request_queue, "_limit", counted)
    monkeypatch.setattr(local[0], "generate", slow)
    return joined, resume


def test_a_full_queue(held, alone):
    """While one request is generated and two wait, the next gets status 429 on every endpoint."""
    joined, resume = held
    bodies = [{"max_tokens": 1, "stream": number == 1} for number in range(3)]
    join = in_threads(lambda number: post(alone, bodies[number], "completions").status_code, 0, 1, 2)
    assert all(joined.acquire(timeout=20) for _ in bodies)
    for path in GENERATING:
        answer = post(alone, {}, path)
        error = answer.json()["error"]
        assert answer.status_code == 429 and int(answer.headers["Retry-After"]) > 0
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert alone.get("/health").is_success
    resume.set()
    assert join() == [200, 200, 200]
    for _ in range(4):  # failed requests free their places too
        assert ask(alone, {"max_tokens": "wrong"})[0] == 400
        assert ask(alone, {"prompt": "x" * (2 * CONTEXT)})[0] == 400
        assert ask(alone, {"max_tokens": 1})[0] == 200
