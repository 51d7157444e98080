"""A real server process, asked by the `openai` client."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.serving.served import CONTEXT, Server, chat, complete
from tests.test_docs import commands
from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load, load_tokenizer
from tinyllama_hf.batch.generate_many import Request, generate_many
from tinyllama_hf.inference.chat import ChatSession
from tinyllama_hf.inference.generation import generate_text
from tinyllama_hf.inference.options import Sampling
from tinyllama_hf.serving.app import ServerOptions
from tinyllama_hf.text import decode_text


openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def server(served_folder, tmp_path_factory):
    started = Server(served_folder, tmp_path_factory.mktemp("cwd"), "--template", "llama2")
    yield started
    if started.process.poll() is None:
        started.stop()


@pytest.fixture(scope="module")
def client(server):
    return server.client


def test_the_model_is_listed(client):
    """Also without a Hub cache, which transformers lists."""
    (model,) = client.models.list()
    assert model.id == "my-model" and client.models.retrieve("my-model") == model
    with urllib.request.urlopen(str(client.base_url).replace("/v1/", "/health")) as answer:
        assert json.load(answer) == {"status": "ok"}


@pytest.mark.parametrize("prompt", ["def f(x):", "x = 1", "a </s> b", "class", "", "  return"])
def test_completions_are_what_generate_gives(client, local, prompt):
    """With and without streaming; control tokens in a prompt are text."""
    whole = complete(client, prompt, max_tokens=20)
    text = whole.choices[0].text
    assert generate_text(*local, prompt, 20, temperature=0).strip() == (prompt + text).strip()
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 20
    assert whole.usage.prompt_tokens == len(local[1](prompt, split_special_tokens=True)["input_ids"])
    parts = [chunk.choices[0].text for chunk in complete(client, prompt, max_tokens=20, stream=True)]
    assert len(parts) > 5 and "".join(parts).rstrip("\ufffd") == text.rstrip("\ufffd")


def test_chat_completions_are_what_chat_gives(client, local):
    """Two exchanges, with and without streaming, with a control token in a message."""
    session = ChatSession(*local, system="Be </s> brief.", sampling=Sampling(0, 1.0, 20), write=lambda text: None)
    messages = [{"role": "system", "content": "Be </s> brief."}]
    for question in ("One?", "Two <s>?"):
        expected = session.say(question)
        messages.append({"role": "user", "content": question})
        whole = client.chat.completions.create(model="my-model", messages=messages, temperature=0, max_tokens=20)
        reply = whole.choices[0].message.content
        assert reply.strip() == expected and whole.choices[0].finish_reason == "length"
        chunks = client.chat.completions.create(
            model="my-model", messages=messages, temperature=0, max_completion_tokens=20, stream=True
        )
        parts = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert len(parts) > 5 and "".join(parts).strip() == expected
        messages.append({"role": "assistant", "content": expected})


def test_responses(client, local):
    session = ChatSession(*local, sampling=Sampling(0, 1.0, 20), write=lambda text: None)
    response = client.responses.create(model="my-model", input="One?", temperature=0, max_output_tokens=20)
    expected = session.say("One?")
    assert response.output_text.strip() == expected
    events = client.responses.create(model="my-model", input="One?", temperature=0, max_output_tokens=20, stream=True)
    parts = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(parts).strip() == expected


def test_sampling_is_that_of_generate_until_a_request_says_otherwise(client):
    texts = {
        complete(client, "def", max_tokens=20, temperature=t, seed=s).choices[0].text
        for t, s in ((1.0, 1), (1.0, 2), (0.3, 1), (openai.omit, 1), (0, 1))
    }
    assert len(texts) == 5
    again = [complete(client, "def", max_tokens=20, temperature=1.0, seed=1).choices[0].text for _ in range(2)]
    assert again[0] == again[1] and again[0] in texts


def test_a_reply_ends_where_the_context_is_full(client, local):
    whole = complete(client, "x " * 50)
    assert whole.usage.total_tokens == CONTEXT and whole.choices[0].finish_reason == "length"


def test_stop_strings(client, local):
    """They are not in the reply, streamed or not."""
    whole = complete(client, "def f(x):", max_tokens=40)
    text = whole.choices[0].text
    stop = text.strip()[10:16]
    before, _, _ = text.partition(stop)
    for stops in ([stop], ["never", stop], stop):
        ended = complete(client, "def f(x):", max_tokens=40, stop=stops)
        assert ended.choices[0].text == before and ended.choices[0].finish_reason == "stop"
        assert ended.usage.completion_tokens < whole.usage.completion_tokens
        chunks = list(complete(client, "def f(x):", max_tokens=40, stop=stops, stream=True))
        assert "".join(chunk.choices[0].text or "" for chunk in chunks) == before and len(chunks) > 2
        assert chunks[-1].choices[0].finish_reason == "stop"
    reply = chat(client, "What?", max_tokens=40).choices[0].message.content
    stop = reply.strip()[5:8]
    assert chat(client, "What?", max_tokens=40, stop=stop).choices[0].message.content == reply.partition(stop)[0]
    streamed = chat(client, "What?", max_tokens=40, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == reply.partition(stop)[0]


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda c: complete(c, "x " * 500), f"exceed the context of {CONTEXT}"),
        (lambda c: complete(c, "x " * 500, stream=True), f"exceed the context of {CONTEXT}"),
        (lambda c: chat(c, "x " * 500), f"exceed the context of {CONTEXT}"),
        (lambda c: complete(c, "x", max_tokens=0), "max_tokens 0: "),
        (lambda c: complete(c, "x", temperature=-1), "temperature -1: must be greater than or equal to 0"),
        (lambda c: complete(c, "x", temperature=1, top_p=-1), "top_p -1: "),
        (lambda c: complete(c, "x", n=9), "n 9: must be"),
        (lambda c: complete(c, "x", suffix="y"), "suffix: not supported by this server"),
        (lambda c: chat(c, "x", response_format={"type": "xml"}), "response_format: its type must be"),
        (lambda c: chat(c, "x", tools=[{"type": "function", "function": {"name": "f"}}]), "tools: not supported"),
        (lambda c: complete(c, [["x"], "y"]), "prompt"),
        (lambda c: c.post("/chat/completions", body={"model": "my-model"}, cast_to=object), "messages: missing"),
        (lambda c: c.chat.completions.create(model="my-model", messages=["x"]), "messages: must be a list of"),
        (lambda c: c.chat.completions.create(model="my-model", messages=[{"role": "user", "content": [
            {"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "data:"}}]}]),
         "content part 1 (type 'image_url')"),
        (lambda c: chat(c, "x", "y"), "messages end with the role 'assistant'"),
        (lambda c: chat(c), "messages: empty"),
        (lambda c: c.chat.completions.create(model="my-model", messages=[{"role": "tool", "content": "x"}]),
         "role 'tool'; must be one of"),
    ],
)  # fmt: skip
def test_bad_requests(client, ask, message):
    with pytest.raises(openai.BadRequestError) as error:
        ask(client)
    assert message in error.value.message


@pytest.mark.parametrize(
    "ask",
    [
        lambda c: complete(c, "x", model="another"),
        lambda c: chat(c, "x", model="a/b"),
        lambda c: c.models.retrieve("a/b"),
        lambda c: c.responses.create(model="another", input="x"),
    ],
)
def test_another_model(client, ask):
    with pytest.raises(openai.NotFoundError) as error:
        ask(client)
    assert error.value.code == "model_not_found" and "'my-model'" in error.value.message


def test_a_body_above_the_limit(client):
    """The client receives the message although it had not sent the whole body."""
    limit = ServerOptions().max_body_bytes
    for size in (limit + 1, 5 * limit):
        with pytest.raises(openai.APIStatusError) as error:
            complete(client, "x" * size)
        assert error.value.status_code == 413 and str(limit) in error.value.message
    assert complete(client, "x", max_tokens=1).choices[0].text


@pytest.mark.parametrize("ask", [complete, chat], ids=["completions", "chat"])
def test_the_usage_of_a_stream(client, ask):
    """Sent on request, in a separate last chunk."""
    whole = ask(client, "x", max_tokens=5)
    *chunks, last = ask(client, "x", max_tokens=5, stream=True, stream_options={"include_usage": True})
    assert last.choices == [] and last.usage == whole.usage and last.usage.completion_tokens == 5
    assert all(
        "usage" in chunk.model_fields_set and chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks
    )
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["length"]
    for options in ({}, {"stream_options": {"include_usage": False}}, {"stream_options": None}):
        chunks = list(ask(client, "x", max_tokens=5, stream=True, **options))
        assert all("usage" not in chunk.model_fields_set and len(chunk.choices) == 1 for chunk in chunks)


def test_harmless_fields_are_let_through(client):
    assert chat(client, "x", max_tokens=2, n=1, user="me", stream_options=None).choices[0].message.content


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_seed_repeats_with_other_requests_in_parallel(client, local, stream):
    """Five clients in parallel with different seeds and temperatures, then one after the other."""
    requests = [(7, 1.0, stream), (1, 0.3, False), (2, 1.0, True), (3, 1.3, True), (4, 0, False)]

    def ask(seed, temperature, stream):
        answer = complete(client, "def", max_tokens=12, seed=seed, temperature=temperature, stream=stream)
        texts[seed] = "".join(part.choices[0].text for part in answer) if stream else answer.choices[0].text

    texts = {}
    threads = [threading.Thread(target=ask, args=request) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together, texts = texts, {}
    for request in requests:
        ask(*request)
    assert together == texts and len(set(texts.values())) == 5
    request = Request(0, local[1]("def")["input_ids"], 12)
    (expected,) = generate_many(*local, [request], sampling=Sampling(1.0, 0.95), seed=7)
    assert "def" + texts[7] == decode_text(local[1], [*request.ids, *expected.ids])


def test_without_a_seed_nothing_repeats(client):
    """Also after a request with a seed."""
    texts = set()
    for _ in range(2):
        complete(client, "def", max_tokens=1, temperature=1.0, seed=1)
        texts.add(complete(client, "def", max_tokens=20, temperature=1.0).choices[0].text)
    assert len(texts) == 2


def read_metrics(server) -> dict[str, float]:
    with urllib.request.urlopen(server.url.replace("/v1", "/metrics")) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_client_that_leaves_frees_its_place(endless, stream):
    """Also one that waits for a whole reply, and only closes the connection."""
    body = {"prompt": "x", "max_tokens": 190_000, "stream": stream}
    with socket.create_connection(("127.0.0.1", int(endless.url.split(":")[-1].removesuffix("/v1")))) as connection:
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + data)
        while not read_metrics(endless)["tinyllama_hf_rows_running"]:
            time.sleep(0.05)
    deadline = time.monotonic() + 20
    while read_metrics(endless)["tinyllama_hf_rows_running"]:
        assert time.monotonic() < deadline, "it is still generated"
        time.sleep(0.05)
    assert complete(endless.client, "x", model="base", max_tokens=1).choices[0].text is not None


@pytest.fixture(scope="module")
def endless(tmp_path_factory, tokenizer_folder):
    """A server with a base model that never stops, in a long context."""
    folder = tmp_path_factory.mktemp("endless")
    torch.manual_seed(0)
    config = TinyLlamaConfig.preset("micro", vocab_size=512, max_position_embeddings=200_000)
    model = TinyLlamaForCausalLM(config)
    model.lm_head.weight.data[2] = 0.0
    model.save_pretrained(folder / "base")
    load_tokenizer(tokenizer_folder).save_pretrained(folder / "base")
    started = Server(folder / "base", folder, "--shutdown-seconds", "3")
    assert "/completions -H" in started.process.stdout.readline()
    yield started
    if started.process.poll() is None:
        started.stop()


def test_a_base_model_has_no_chat(endless):
    with pytest.raises(openai.BadRequestError, match="no chat template, so this is a base model"):
        chat(endless.client, "One?", model="base")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_replies_under_way_end_before_the_server(served_folder, tmp_path, number):
    """New requests are refused meanwhile; the status is 0."""
    server, found = Server(served_folder, tmp_path, "--template", "llama2"), []
    stream = complete(server.client, "x", max_tokens=300, stream=True)
    next(stream)
    whole = threading.Thread(target=lambda: found.append(complete(server.client, "y", max_tokens=300)))
    whole.start()
    while read_metrics(server)["tinyllama_hf_rows_running"] < 2 and whole.is_alive():
        time.sleep(0.01)
    server.process.send_signal(number)
    chunks = list(stream)
    whole.join(timeout=60)
    assert chunks[-1].choices[0].finish_reason == "length" and found[0].usage.completion_tokens == 300
    printed = server.process.communicate(timeout=60)[0]
    assert server.process.returncode == 0 and "Traceback" not in printed, printed
    with pytest.raises(openai.APIConnectionError):
        complete(server.client, "x", max_tokens=1)


def test_replies_that_do_not_end_are_cut(endless):
    """After the time that the option gives them; each client gets an error. The last test of this server."""
    ended = []

    def ask(stream):
        try:
            answer = complete(endless.client, "x", model="base", max_tokens=190_000, stream=stream)
            ended.extend(answer if stream else [answer])
        except openai.APIError as error:
            ended.append(error)

    threads = [threading.Thread(target=ask, args=[stream]) for stream in (False, True)]
    for thread in threads:
        thread.start()
    while read_metrics(endless)["tinyllama_hf_rows_running"] < 2:
        time.sleep(0.01)
    began = time.monotonic()
    printed = endless.stop(signal.SIGTERM)
    assert 2 < time.monotonic() - began < 20
    for thread in threads:
        thread.join(timeout=10)
    errors = [each for each in ended if isinstance(each, openai.APIError)]
    assert len(errors) == 2 and all("the server is shutting down" in str(error) for error in errors)
    assert endless.process.returncode == 0 and "Traceback" not in printed, printed


def test_several_replies_and_prompts(client):
    """In the order of the prompts; the first of several sampled replies is that of `n: 1`."""
    one = complete(client, "def", max_tokens=8, temperature=1.0, seed=3)
    answer = complete(client, ["def", "class"], n=2, max_tokens=8, temperature=1.0, seed=3)
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3] and len(set(texts)) == 4
    assert texts[0] == one.choices[0].text and 4 < answer.usage.completion_tokens <= 32
    streamed = {}
    for chunk in complete(client, ["def", "class"], n=2, max_tokens=8, temperature=1.0, seed=3, stream=True):
        choice = chunk.choices[0]
        streamed[choice.index] = streamed.get(choice.index, "") + choice.text
    assert [streamed[place] for place in range(4)] == texts
    reply = chat(client, "x", n=2, max_tokens=5, temperature=1.0, seed=3)
    assert len({choice.message.content for choice in reply.choices}) == 2


def test_log_probabilities(client, local):
    """Equal to the model's own, in the forms of both endpoints."""
    model, tokenizer = local
    prompt = "def f(x):"
    answer = complete(client, prompt, max_tokens=6, echo=True, logprobs=2).choices[0]
    found, length = answer.logprobs, len(tokenizer(prompt)["input_ids"])
    assert answer.text.startswith(prompt) and len(found.tokens) == length + 6 == len(found.text_offset)
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    ids = tokenizer(answer.text)["input_ids"]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    for place in range(1, length):
        value = float(expected[place - 1, ids[place]])
        assert found.token_logprobs[place] == pytest.approx(value, abs=1e-4)
        best = float(expected[place - 1].max())
        assert max(found.top_logprobs[place].values()) == pytest.approx(best, abs=1e-4)
    assert [
        found.token_logprobs[place] == max(found.top_logprobs[place].values()) for place in range(length, length + 6)
    ]
    scored = complete(client, prompt, max_tokens=0, echo=True, logprobs=0).choices[0]
    assert scored.text == prompt and scored.logprobs.token_logprobs[1:] == pytest.approx(
        found.token_logprobs[1:length], abs=1e-4
    )
    reply = chat(client, "x", max_tokens=4, logprobs=True, top_logprobs=3).choices[0]
    assert len(reply.logprobs.content) == 4
    for token in reply.logprobs.content:
        assert len(token.top_logprobs) == 3 and token.top_logprobs[0].logprob == token.logprob
    assert b"".join(bytes(token.bytes) for token in reply.logprobs.content).decode(errors="replace")
    plain = chat(client, "x", max_tokens=4).choices[0]
    assert plain.logprobs is None and plain.message.content == reply.message.content


def test_replies_to_a_schema(client):
    schema = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 10, "maximum": 99},
              "b": {"enum": ["x", "y"]}}, "required": ["a", "b"], "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    reply = chat(client, "x", max_tokens=100, temperature=1.0, seed=1, response_format=form, n=4)
    for choice in reply.choices:
        value = json.loads(choice.message.content)
        assert 10 <= value["a"] <= 99 and value["b"] in ("x", "y") and choice.finish_reason == "stop"


@pytest.mark.parametrize("draft", ["lookup", "layers:1"])
def test_a_draft(served_folder, tmp_path, client, draft):
    """Greedy replies are the same, and the usage tells how many drafted tokens were accepted."""
    server = Server(served_folder, tmp_path, "--template", "llama2", "--draft", draft)
    try:
        assert server.client.models.list().data[0].draft == draft
        prompts = ["def f(x): return x def f(x): return", "x = 1"]
        answers = [complete(each, prompts, max_tokens=30) for each in (client, server.client)]
        assert [choice.text for choice in answers[0].choices] == [choice.text for choice in answers[1].choices]
        details = answers[1].usage.completion_tokens_details
        assert details.accepted_prediction_tokens + details.rejected_prediction_tokens > 0
        assert answers[0].usage.completion_tokens_details is None
    finally:
        server.stop()


@pytest.mark.slow
def test_the_page(served_folder, tmp_path):
    """Runs every command of docs/serving.md, starting with the server, and then its Python code."""
    (tmp_path / "my-model").symlink_to(served_folder)
    found = commands(ROOT / "docs" / "serving.md")
    served = next(command for command, _ in found if " serve " in command)
    server = Server(tmp_path / "my-model", tmp_path, *served.split()[3:])
    port = server.url.split(":")[-1].removesuffix("/v1")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command, wanted in found:
        if command in (served, "pip install 'tinyllama_hf[serving]'"):
            continue
        done = subprocess.run(
            command.replace("8000", port),
            shell=True,
            cwd=tmp_path,
            env=os.environ | {"PATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and wanted in done.stdout, f"{command}\n{done.stdout}{done.stderr}"
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    code = "".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)).replace("8000", port)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "def f(x):" in done.stdout, done.stderr
    assert "Traceback" not in server.stop()


@pytest.mark.slow
def test_quantized(nano_folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    command = [
        Path(sys.executable).parent / "tinyllama-hf",
        "serve",
        nano_folder,
        "--port",
        "0",
        "--quantization",
        "nf4",
    ]
    process = subprocess.Popen(
        [str(word) for word in command], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    url = process.stdout.readline().split()[3].rstrip(";")
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    text = complete(client, "class", model=nano_folder.name, max_tokens=20).choices[0].text
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and errors.startswith("nf4: ")
    assert "class" + text == generate_text(*load(nano_folder, quantization="nf4"), "class", 20, temperature=0)
