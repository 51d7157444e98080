"""Requests over HTTP to the application in this process: cases of clients, endpoints, errors, access and limits."""

import asyncio
import json
import threading
import time

import pytest

from tests.serving.client_cases import SHARED_CASES
from tests.serving.served import CONTEXT, GENERATING, ask, post, stream, text_of
from tinyllama_hf.serving import prompt_reading
from tinyllama_hf.serving.app import ServerOptions, build_app
from tinyllama_hf.serving.scheduler import Scheduler


testclient = pytest.importorskip("starlette.testclient")

PATHS = {"chat": "chat/completions", "completion": "completions", "response": "responses"}
BODY = {"Content-Type": "application/json"}


@pytest.mark.parametrize("name", SHARED_CASES)
def test_a_case_of_a_client(client, name):
    """The reply has the text of every row, or the message of the refusal."""
    case = SHARED_CASES[name]
    body = {"prompt": None, **case.body} if case.kind == "completion" else case.body
    if body.get("stream"):
        *events, end = stream(client, body, PATHS[case.kind])
        assert end == "[DONE]" and ("usage" in events[-1]) == case.call.get("has_usage", False)
        return
    status, answer = ask(client, body, PATHS[case.kind])
    assert status == case.status
    if case.message is not None:
        assert answer["message"].startswith(case.message) and answer["type"] == "invalid_request_error"
        return
    choices = answer["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(case.prompts)))
    assert all(choice["finish_reason"] in ("stop", "length") for choice in choices)
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    if isinstance(limit := case.rows.get("max_new_tokens"), int):
        assert usage["completion_tokens"] <= limit * len(choices)


def test_endpoints(client):
    """There are those for one model, and no others."""
    assert client.get("/health").json() == {"status": "ok"}
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "my-model" and model["max_model_len"] == CONTEXT and model["quantization"] == "none"
    assert model["is_chat"] and client.get("/v1/models/my-model").json() == model
    for method, path in (("GET", "/docs"), ("GET", "/openapi.json"), ("POST", "/load_model"), ("POST", "/v1/x")):
        answer = client.request(method, path)
        error = answer.json()["error"]
        assert answer.status_code == 404 and error["type"] == "invalid_request_error"
        assert error["message"].startswith(f"{method} {path}: Not Found; the endpoints are /v1/chat/completions")
    answer = client.get("/v1/completions")
    assert answer.status_code == 405 and "GET /v1/completions: Method Not Allowed" in answer.json()["error"]["message"]
    assert client.post("/v1/completions/").status_code == 404
    answer = client.get("/v1/models/a/b")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "text/plain"}], ids=["none", "text"])
def test_the_type_of_a_body(client, headers):
    """A form of another site cannot send JSON without the browser asking first."""
    answer = client.post("/v1/completions", content=b'{"prompt": "x"}', headers=headers)
    assert answer.status_code == 400 and "Content-Type: application/json" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", GENERATING)
def test_a_server_that_shuts_down_refuses_requests(local, path):
    app = build_app("my-model", *local)
    app.state.service.scheduler.close(0)
    ending = testclient.TestClient(app, "http://127.0.0.1")
    status, error = ask(ending, {}, path)
    assert status == 503 and error["message"] == "the server is shutting down" and error["type"] == "server_error"
    assert post(ending, {"stream": True}, path).status_code == 503


@pytest.mark.parametrize("path", GENERATING)
def test_a_failure_of_the_generation_has_an_error_of_the_same_form(client, path, local, monkeypatch):
    """With and without streaming; a stream has started with status 200."""

    def fail(**_):
        raise RuntimeError('out of "memory"\n')

    monkeypatch.setattr(local[0], "forward", fail)
    message = 'out of "memory"'
    status, error = ask(client, {}, path)
    assert status == 500 and error["message"].endswith(message) and error["type"] == "server_error"
    last = stream(client, {}, path)[-1]
    error = last if path == "responses" else last["error"]
    assert error["message"].endswith(message)
    assert last.get("type") == ("error" if path == "responses" else None)


@pytest.mark.parametrize("chunks", [None, 7], ids=["declared", "chunked"])
def test_the_size_of_a_body(client, chunks):
    """One byte above the limit is refused, whether the size is declared or not; a body at the limit is read."""
    limit = ServerOptions().max_body_bytes

    def send(size):
        body = json.dumps({"prompt": "x", "nonsense": ""}).encode()
        body = body.replace(b'""', b'"' + b"x" * (size - len(body)) + b'"')
        parts = body if chunks is None else (body[i : i + 2**20] for i in range(0, len(body), 2**20))
        return client.post("/v1/completions", content=parts, headers=BODY)

    answer = send(limit + 1)
    assert answer.status_code == 413
    error = answer.json()["error"]
    assert str(limit) in error["message"] and error["type"] == "invalid_request_error"
    answer = send(limit)
    assert answer.status_code == 400 and "nonsense" in answer.json()["error"]["message"]


def test_a_body_without_end(app):
    """The rest of a large body is discarded before the answer; reading stops in a body without an end."""
    limit, taken = ServerOptions().max_body_bytes, 0

    def endless():
        nonlocal taken
        while True:
            taken += 2**16
            assert taken < 16 * limit
            yield b" " * 2**16

    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}
    parts, sent = endless(), []

    async def receive():
        more = {"type": "http.request", "body": next(parts), "more_body": True}
        return {"type": "http.disconnect"} if sent else more

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 413 and taken > 4 * limit


class TestAccess:
    @pytest.fixture
    def make(self, local):
        made = []

        def of(address="http://127.0.0.1", **options):
            app = build_app("my-model", *local, options=ServerOptions(page=True, **options))
            made.append(app)
            return testclient.TestClient(app, address, follow_redirects=False)

        yield of
        for app in made:
            app.state.service.scheduler.close(0)

    def test_the_key(self, make):
        """Needed for everything but `/health` and the page."""
        client = make(api_key="secret")
        for path in ("/v1/models", "/metrics"):
            for header in (None, "Bearer wrong", "Bearer ", "Basic secret", "Bearer secrets", "Bearer s\u00e9cret"):
                headers = {} if header is None else {"Authorization": header.encode("latin-1")}
                answer = client.get(path, headers=headers)
                assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
                assert answer.json()["error"]["code"] == "invalid_api_key"
            assert client.get(path, headers={"Authorization": "Bearer secret"}).is_success
        assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 401
        assert client.get("/health").is_success and client.get("/").is_success

    @pytest.mark.parametrize(
        ("address", "allowed"),
        [("http://127.0.0.1:8000", True), ("http://[::1]:8000", True), ("http://192.168.1.5", True),
         ("http://localhost:5", True), ("http://my-box", True), ("http://evil.example", False),
         ("http://localhost.evil.example", False), ("http://127.0.0.1.evil.example", False)],
    )  # fmt: skip
    def test_names_of_this_machine(self, make, address, allowed):
        """A page of another site may point its own name here, and must not read answers."""
        answer = make(address, allow_hosts=["my-box"]).get("/v1/models")
        assert answer.is_success == allowed
        if not allowed:
            assert answer.status_code == 403 and "--allow-host" in answer.json()["error"]["message"]

    def test_other_origins(self, make):
        """Browsers may not hand answers to other pages, unless their origin is allowed."""
        asked = {"Origin": "http://other.example", "Access-Control-Request-Method": "POST"}
        closed, open_ = make(api_key="k"), make(api_key="k", allow_origins=["http://other.example"])
        for client, allowed in ((closed, None), (open_, "http://other.example")):
            assert client.get("/health", headers=asked).headers.get("Access-Control-Allow-Origin") == allowed
            preflight = client.options("/v1/chat/completions", headers=asked)
            assert preflight.headers.get("Access-Control-Allow-Origin") == allowed
        strange = open_.get("/health", headers={"Origin": "http://third.example"})
        assert "Access-Control-Allow-Origin" not in strange.headers

    def test_the_page_is_sent_only_when_asked_for(self, make, local):
        client = make()
        for path, kind in (
            ("/", "text/html"),
            ("/page.css", "text/css"),
            ("/page.js", "javascript"),
            ("/markdown.js", "javascript"),
        ):
            answer = client.get(path)
            assert answer.is_success and kind in answer.headers["Content-Type"], path
            assert "script-src 'self'" in answer.headers["Content-Security-Policy"]
        without = build_app("my-model", *local)
        assert testclient.TestClient(without, "http://127.0.0.1").get("/").status_code == 404
        without.state.service.scheduler.close(0)


@pytest.mark.parametrize("path", ["chat/completions", "responses"])
def test_others_are_answered_while_a_conversation_is_rendered(app, path, monkeypatch):
    begun, resume, found = threading.Event(), threading.Event(), []
    render = prompt_reading.chat_ids

    def slow(*arguments):
        begun.set()
        assert resume.wait(timeout=10), "no other request was answered"
        return render(*arguments)

    monkeypatch.setattr(prompt_reading, "chat_ids", slow)
    length = {"max_output_tokens" if path == "responses" else "max_tokens": 1}
    with testclient.TestClient(app, "http://127.0.0.1") as alone:  # one event loop, as in a server
        thread = threading.Thread(target=lambda: found.append(post(alone, length, path).status_code))
        thread.start()
        assert begun.wait(timeout=10)
        assert alone.get("/health").json() == {"status": "ok"} and alone.get("/v1/models").is_success
        resume.set()
        thread.join()
    assert found == [200]


def test_a_full_queue(local, monkeypatch):
    """The next request gets status 429 on every endpoint; refused requests take no place."""
    forward, resume = local[0].forward, threading.Event()
    monkeypatch.setattr(local[0], "forward", lambda **inputs: resume.wait(timeout=60) and forward(**inputs))
    app = build_app("my-model", *local, options=ServerOptions(rows=1, waiting=1))
    scheduler: Scheduler = app.state.service.scheduler
    with testclient.TestClient(app, "http://127.0.0.1") as client:
        found = []
        for number in range(2):
            threading.Thread(target=lambda: found.append(post(client, {"max_tokens": 2}, "completions"))).start()
            while scheduler.running + scheduler.waiting <= number:
                time.sleep(0.001)
        for path in GENERATING:
            answer = post(client, {}, path)
            error = answer.json()["error"]
            assert answer.status_code == 429 and int(answer.headers["Retry-After"]) > 0
            assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        resume.set()
        while len(found) < 2:
            time.sleep(0.01)
        assert [answer.status_code for answer in found] == [200, 200]
        assert ask(client, {"max_tokens": 1})[0] == 200
    scheduler.close(0)


def test_many_bodies_at_once(local, monkeypatch):
    """Those that wait to be read are counted, too."""
    app, resume, found = build_app("my-model", *local, options=ServerOptions(rows=1, waiting=2)), threading.Event(), []
    service = app.state.service
    read = service._reader.read
    monkeypatch.setattr(service._reader, "read", lambda *request: resume.wait(timeout=20) and read(*request))
    with testclient.TestClient(app, "http://127.0.0.1") as client:
        body = {"max_tokens": 1}
        threads = [threading.Thread(target=lambda: found.append(post(client, body, "completions"))) for _ in range(3)]
        for thread in threads:
            thread.start()
        while service._num_reading < 3:
            time.sleep(0.001)
        assert post(client, body, "completions").status_code == 429
        resume.set()
        for thread in threads:
            thread.join()
        assert {answer.status_code for answer in found} <= {200, 429} and service._num_reading == 0
        assert ask(client, body)[0] == 200
    service.scheduler.close(0)


def test_a_body_that_does_not_arrive(app, monkeypatch):
    monkeypatch.setattr("tinyllama_hf.serving.app._BODY_SECONDS", 0.05)
    sent = []

    async def receive():
        await asyncio.sleep(30)

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 408 and b"was not complete after" in sent[1]["body"]


def test_metrics(local):
    app = build_app("my-model", *local)
    client = testclient.TestClient(app, "http://127.0.0.1")
    for path in GENERATING:
        limit = {"max_output_tokens" if path == "responses" else "max_tokens": 3}
        assert text_of(ask(client, {"temperature": 0, **limit}, path)[1]) is not None
    assert ask(client, {"max_tokens": "wrong"})[0] == 400
    while app.state.service.scheduler.running:  # the last row leaves after its reply
        time.sleep(0.01)
    lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#")
    assert [lines[f'tinyllama_hf_answers_total{{endpoint="{kind}"}}'] for kind in PATHS] == ["1.0"] * 3
    assert lines['tinyllama_hf_tokens_total{kind="new"}'] == "9.0"
    assert lines["tinyllama_hf_rows_running"] == lines["tinyllama_hf_rows_waiting"] == "0.0"
    assert lines["tinyllama_hf_answer_seconds_count"] == "3.0"
    app.state.service.scheduler.close(0)
