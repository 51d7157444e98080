"""A real server process, asked by the `openai` client."""

import json
import os
import re
import signal
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
from tinyllama_hf.inference.chat import ChatSession
from tinyllama_hf.inference.generation import generate_text
from tinyllama_hf.inference.options import Sampling
from tinyllama_hf.serving.app import MAX_BODY_BYTES


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
        (lambda c: complete(c, "x " * 500), f"exceed the model's context of {CONTEXT}"),
        (lambda c: complete(c, "x " * 500, stream=True), f"exceed the model's context of {CONTEXT}"),
        (lambda c: chat(c, "x " * 500), f"exceed the model's context of {CONTEXT}"),
        (lambda c: complete(c, "x", max_tokens=0), "max_tokens 0: must be greater than or equal to 1"),
        (lambda c: complete(c, "x", temperature=-1), "temperature -1: must be greater than or equal to 0"),
        (lambda c: complete(c, "x", temperature=1, top_p=-1), "top_p -1: "),
        (lambda c: complete(c, "x", n=2), "n: not supported by this server"),
        (lambda c: complete(c, "x", logprobs=3), "logprobs: not supported by this server"),
        (lambda c: chat(c, "x", response_format={"type": "json_object"}), "response_format: not supported"),
        (lambda c: chat(c, "x", tools=[{"type": "function", "function": {"name": "f"}}]), "tools: not supported"),
        (lambda c: complete(c, ["x", "y"]), "prompt: "),
        (lambda c: c.post("/chat/completions", body={"model": "my-model"}, cast_to=object), "messages: missing"),
        (lambda c: c.chat.completions.create(model="my-model", messages=["x"]), "messages: must be a list of"),
        (lambda c: c.chat.completions.create(model="my-model", messages=[{"role": "user", "content": [
            {"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "data:"}}]}]),
         "content part 1 (type 'image_url')"),
        (lambda c: chat(c, "x", "y"), "messages end with the role 'assistant'"),
        (lambda c: chat(c), "messages: empty"),
        (lambda c: c.chat.completions.create(model="my-model", messages=[{"role": "tool", "content": "x"}]),
         "unknown role 'tool'"),
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
    for size in (MAX_BODY_BYTES + 1, 5 * MAX_BODY_BYTES):
        with pytest.raises(openai.APIStatusError) as error:
            complete(client, "x" * size)
        assert error.value.status_code == 413 and str(MAX_BODY_BYTES) in error.value.message
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
    assert ("def" + texts[7]).rstrip("\ufffd") == generate_text(*local, "def", 12, 1.0, seed=7).rstrip("\ufffd")


def test_without_a_seed_nothing_repeats(client):
    """Also after a request with a seed."""
    texts = set()
    for _ in range(2):
        complete(client, "def", max_tokens=1, temperature=1.0, seed=1)
        texts.add(complete(client, "def", max_tokens=20, temperature=1.0).choices[0].text)
    assert len(texts) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("number", "stream"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_it_ends_in_the_middle_of_a_request(tmp_path, tokenizer_folder, number, stream):
    """A base model that never stops; the server ends within a few seconds, without a traceback."""
    torch.manual_seed(0)
    config = TinyLlamaConfig.preset("micro", vocab_size=512, max_position_embeddings=200_000)
    model = TinyLlamaForCausalLM(config)
    model.lm_head.weight.data[2] = 0.0
    model.save_pretrained(tmp_path / "base")
    load_tokenizer(tokenizer_folder).save_pretrained(tmp_path / "base")
    server = Server(tmp_path / "base", tmp_path)
    assert "/completions -H" in server.process.stdout.readline()
    answer = complete(server.client, "x", model="base", max_tokens=190_000, stream=True)
    next(answer)
    answer.close()  # ends the generation, which would block the next request
    complete(server.client, "x", model="base", max_tokens=1)
    ended = []

    def ask():
        try:
            answer = complete(server.client, "x", model="base", max_tokens=190_000, stream=stream)
            ended.extend(answer if stream else [answer])
        except openai.APIError as error:
            ended.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(2)
    with pytest.raises(openai.BadRequestError, match="no chat template, so this is a base model"):
        chat(server.client, "One?", model="base")
    began = time.monotonic()
    printed = server.stop(number)
    assert time.monotonic() - began < 20
    thread.join(timeout=10)
    assert "the server is shutting down" in str(ended[-1])
    assert server.process.returncode == (0 if number == signal.SIGINT else -signal.SIGTERM), printed
    assert "Traceback" not in printed


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
