"""The load scripts find every reply of a real server, and what a server with planted errors does wrong."""

import asyncio
import json
import socketserver
import sys
import threading

import pytest

from tests.conftest import ROOT, run_here


pytest.importorskip("aiohttp")

SCRIPTS = ROOT / "benchmarks"
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "temperature": 0}
USAGE = {"completion_tokens": 2}


@pytest.fixture
def scripts(monkeypatch):
    """The modules of the benchmarks, which import each other by their bare names."""
    monkeypatch.syspath_prepend(SCRIPTS)
    import server_process
    import serving_clients
    import serving_hours
    import serving_ledger
    import serving_load
    import serving_mix

    modules = (server_process, serving_clients, serving_hours, serving_ledger, serving_load, serving_mix)
    return type("Scripts", (), {module.__name__: module for module in modules})


@pytest.fixture
def canned():
    """An HTTP server that answers every request with the same bytes, and closes the connection."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            length = 0
            while (line := self.rfile.readline()).strip():
                name, _, value = line.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            self.rfile.read(length)
            self.wfile.write(self.server.answer)
            if self.server.waits_for_client:
                self.rfile.read(1)
                self.server.was_left.set()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.answer, server.waits_for_client, server.was_left = b"", False, threading.Event()
        server.url = f"http://127.0.0.1:{server.server_address[1]}/v1/chat/completions"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def answer(value, status=200, *headers):
    """The bytes of an answer in JSON."""
    body = json.dumps(value).encode()
    lines = [f"HTTP/1.1 {status} Text", "Content-Type: application/json", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def events(*values, end=b"data: [DONE]\n\n"):
    """The bytes of a stream."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    return head + b"".join(b"data: " + json.dumps(value).encode() + b"\n\n" for value in values) + end


def reply_of(text="Hi", finish_reason="stop", usage=USAGE, **fields):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return {"choices": [choice | fields], "usage": usage}


def chunk(text="", finish_reason=None):
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}]}


def ask(scripts, server, body=CHAT, **options):
    """Sends a request of a chat and enters it in a new ledger; returns its outcome and the ledger."""

    async def send():
        async with scripts.serving_clients.session(5) as client:
            return await scripts.serving_clients.send(client, server.url, body, options.get("leave_after"))

    is_ending, ledger = options.pop("is_ending", False), options.pop("ledger", scripts.serving_ledger.Ledger())
    before = ledger.outcomes.copy()
    planned = scripts.serving_mix.Planned("chat", "response" if "input" in body else "chat", body, **options)
    ledger.add(planned, asyncio.run(send()), is_ending)
    ((_, outcome),) = ledger.outcomes - before
    return outcome, ledger


ERROR = {"error": {"message": "no", "type": "invalid_request_error", "param": None, "code": None}}
STREAM = CHAT | {"stream": True, "stream_options": {"include_usage": True}}
LAST = {"choices": [], "usage": USAGE}


@pytest.mark.parametrize(
    ("outcome", "given", "body"),
    [
        ("answered", answer(reply_of()), CHAT),
        ("answered", events(chunk("H"), chunk("i"), chunk(finish_reason="length"), LAST), STREAM),
        ("refused", answer(ERROR, 429, "Retry-After: 2"), CHAT),
        ("lost", b"", CHAT),
        ("lost", b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n{", CHAT),
        ("lost", events(chunk("H"), chunk(finish_reason="length"), LAST, end=b""), STREAM),
        ("lost", events(chunk("H"), {"error": "no"}, chunk(finish_reason="length"), LAST), STREAM),
        ("wrong", answer(ERROR, 429), CHAT),
        ("wrong", answer(ERROR, 429, "Retry-After: soon"), CHAT),
        ("wrong", answer(ERROR, 400), CHAT),
        ("wrong", answer(ERROR, 500), CHAT),
        ("wrong", events(chunk("H"), ERROR), STREAM),
        ("wrong", events(chunk("H"), LAST), STREAM),
        ("wrong", events(chunk("H"), chunk(finish_reason="length")), STREAM),
        ("wrong", answer(reply_of(finish_reason="error")), CHAT),
        ("wrong", answer(reply_of(usage={"completion_tokens": 5})), CHAT),
        ("wrong", answer(reply_of()), CHAT | {"n": 2}),
        ("wrong", answer(reply_of(text="the end.")), CHAT | {"stop": ["x", "."]}),
        ("wrong", answer(reply_of()), CHAT | {"logprobs": True}),
        ("wrong", answer(reply_of(logprobs={"content": [{"logprob": 0.5}]})), CHAT | {"logprobs": True}),
    ],
)
def test_the_outcome_of_a_valid_request(scripts, canned, outcome, given, body):
    canned.answer = given
    found, ledger = ask(scripts, canned, body)
    assert found == outcome, ledger.problems
    assert len(ledger.problems) == (outcome in ("lost", "wrong"))


def test_a_client_that_leaves_closes_the_connection(scripts, canned):
    canned.answer, canned.waits_for_client = events(chunk("H"), chunk("i"), chunk("!"), end=b""), True
    assert ask(scripts, canned, STREAM, leave_after=2)[0] == "left"
    assert canned.was_left.wait(5)
    canned.waits_for_client = False
    assert ask(scripts, canned, STREAM, leave_after=4)[0] == "lost", "the server closed it first"


def test_a_bad_body_must_be_refused_in_the_form_of_the_api(scripts, canned):
    for given, outcome in (
        (answer(ERROR, 400), "refused"),
        (answer({"detail": "no"}, 400), "wrong"),
        (answer(ERROR, 500), "wrong"),
        (answer(reply_of()), "wrong"),
    ):
        canned.answer = given
        assert ask(scripts, canned, {"nonsense": 1}, is_bad=True)[0] == outcome


def test_a_server_that_ends_may_refuse_but_not_lose(scripts, canned):
    for given, outcome in (
        (answer(ERROR, 503), "refused"),
        (events(chunk("H"), ERROR), "refused"),
        (events({"type": "error", "message": "no"}), "refused"),
        (events({"type": "response.failed", "response": ERROR}), "refused"),
        (answer(ERROR, 400), "wrong"),
        (events(chunk("H"), end=b""), "lost"),
        (b"", "lost"),
    ):
        canned.answer = given
        assert ask(scripts, canned, STREAM, is_ending=True)[0] == outcome
    canned.shutdown()
    canned.server_close()
    assert ask(scripts, canned, STREAM, is_ending=True)[0] == "refused", "the connection"
    assert ask(scripts, canned, STREAM)[0] == "lost"


def test_greedy_replies_are_compared_with_the_first(scripts, canned):
    canned.answer = answer(reply_of("Hi"))
    _, ledger = ask(scripts, canned)
    canned.answer = events(chunk("H"), chunk("i", "stop"), LAST)
    assert ask(scripts, canned, STREAM, ledger=ledger)[0] == "answered"
    canned.answer = answer(reply_of("Ho"))
    assert ask(scripts, canned, CHAT | {"max_tokens": 3}, ledger=ledger)[0] == "answered", "another request"
    assert ask(scripts, canned, CHAT | {"temperature": 1.0}, ledger=ledger)[0] == "answered", "sampled"
    assert ask(scripts, canned, ledger=ledger)[0] == "wrong"
    assert "'Hi'" in ledger.problems[0]["problem"] and ledger.compared == 4


def test_a_stream_of_responses(scripts, canned):
    """The deltas must be the text of the last event; a reply may be empty."""
    body = {"input": "Hello", "max_output_tokens": 4, "stream": True}

    def stream(whole, *deltas):
        output = [{"type": "message", "content": [{"type": "output_text", "text": whole}]}]
        last = {"status": "incomplete", "output": output, "usage": {"output_tokens": 2}}
        parts = [{"type": "response.output_text.delta", "delta": delta} for delta in deltas]
        return events(*parts, {"type": "response.incomplete", "response": last}, end=b"")

    for given, outcome in (
        (stream("Hi", "H", "i"), "answered"),
        (stream(""), "answered"),
        (stream("Hi", "H"), "wrong"),
        (events({"type": "response.output_text.delta", "delta": "H"}, end=b""), "lost"),
    ):
        canned.answer = given
        assert ask(scripts, canned, body)[0] == outcome


def test_growth_of_memory(scripts):
    grows = [(second, 0.0, 100.0 + second) for second in range(120)]
    figures = scripts.serving_hours.growth(grows)
    assert figures["memory_before"] == 122.5 and figures["memory_after"] == 216.5 and figures["growth"] == 0.7673
    assert scripts.serving_hours.growth([(0, 0, 900.0)] * 20 + [(0, 0, 100.0)] * 100)["growth"] == 0


def test_times_and_tokens_of_a_round(scripts):
    reply = scripts.serving_clients.Reply
    pieces = reply(200, {0: "abc"}, {0: "stop"}, tokens=5, arrivals=[0.5, 0.6, 0.9], is_complete=True)
    without_usage = reply(200, {0: "ab"}, {0: "stop"}, arrivals=[1.0, 1.2])
    row = scripts.serving_load.summary([pieces, without_usage, reply(500)], 2.0, ["abc", "xy", ""])
    assert row["tokens_per_second"] == 3.5 and row["requests_per_second"] == 1.0 and row["errors"] == 1
    assert row["differing"] == 1 and row["without_usage"] == row["without_done"] == 1
    assert row["first_p50"] == 500 and row["first_p95"] == 1000
    assert row["token_p50"] == pytest.approx(100) and row["token_p95"] == pytest.approx(200)
    assert row["wait_p95"] == pytest.approx(300)


@pytest.fixture
def results(scripts, tmp_path, monkeypatch):
    """The folder to which scripts of this process write."""
    import common

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    return tmp_path


def command_of(folder, port, options=""):
    code = "from tinyllama_hf_cli import main; main()"
    return f"{sys.executable} -c '{code}' serve {folder} --template llama2 --dtype fp32 --port {port} {options}"


def free_port():
    with socketserver.TCPServer(("127.0.0.1", 0), None) as server:
        return server.server_address[1]


def test_a_server_that_does_not_start(scripts):
    with pytest.raises(SystemExit, match=r"did not answer at http://127\.0\.0\.1:1/v1\n.*no model here"):
        scripts.server_process.ServerProcess(f"{sys.executable} -c 'exit(\"no model here\")'", "http://127.0.0.1:1/v1")


def test_load_on_a_real_server(served_folder, results):
    pytest.importorskip("uvicorn")
    port, prompts = free_port(), results / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"def f{i}(x):"}) + "\n" for i in range(3)))
    done = run_here(
        *(SCRIPTS / "serving_load.py", f"ours=http://127.0.0.1:{port}/v1", "--api", "completion", "--check"),
        *(served_folder, "--start", f"ours={command_of(served_folder, port)}", "--prompts", prompts),
        *("--clients", 1, 3, "--requests", 6, "--max-tokens", 5, "--rounds", 2),
        cwd=results,
    )
    assert done.returncode == 0, done.stdout
    record = json.loads((results / "serving_load.json").read_text())
    one, three = record["figures"]["rows"]
    assert (one["clients"], three["clients"], one["ratio"]) == (1, 3, 1.0)
    for row in (one, three):
        assert row["errors"] == row["differing"] == row["without_usage"] == row["without_done"] == 0
        assert row["tokens"] == 6 * 5 and row["first_p50"] > 0
    server = record["figures"]["servers"]["ours"]
    assert server["peak_megabytes"] > 100 and record["provenance"]["command"]


def test_hours_on_a_real_server(served_folder, results):
    """A few seconds: every kind of request, more than the queue takes, and Ctrl-C with requests under way."""
    pytest.importorskip("uvicorn")
    port = free_port()
    done = run_here(
        *(SCRIPTS / "serving_hours.py", f"http://127.0.0.1:{port}/v1", "--start"),
        *(command_of(served_folder, port, "--rows 4 --waiting 8"), "--minutes", 0.12, "--clients", 4, "--burst", 16),
        *("--bodies", 9, "--long-words", 60),
        cwd=results,
    )
    figures = json.loads((results / "serving_hours.json").read_text())["figures"]
    outcomes = {(row["kind"], row["outcome"]): row["requests"] for row in figures["outcomes"]}
    wrong = [line for line in figures["wrong"] if not line.startswith("memory grew")]  # in so short a time
    assert not wrong, done.stdout
    assert not {outcome for _, outcome in outcomes} & {"lost", "wrong"}
    assert figures["load"]["status_429"] and outcomes["burst", "answered"] and outcomes["bad body", "refused"]
    assert figures["load"]["greedy_replies"] > figures["load"]["greedy_requests"]
    answered = {part for kind, outcome in outcomes if outcome == "answered" for part in kind.split(", ")}
    assert answered >= {"chat", "completion", "response", "stream", "whole"}
    assert any("leaves" in kind and outcome == "left" for kind, outcome in outcomes)
    assert sum(number for (kind, _), number in outcomes.items() if kind == "hostile body") == 9
    assert figures["end"]["requests_under_way"] > 0 and figures["end"]["exit_status"] == 0
