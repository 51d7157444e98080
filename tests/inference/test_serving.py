"""A real server process, asked by the `openai` client."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from huggingface_hub import CacheNotFound
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, GenerationConfig
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import BaseHandler, GenerateManager, GenerationState

import tinyllama_hf_cli
from tests.conftest import ROOT
from tests.test_docs import commands
from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load, load_tokenizer
from tinyllama_hf.chat.templates import load_template
from tinyllama_hf.errors import InputError
from tinyllama_hf.inference.chat import ChatSession
from tinyllama_hf.inference.generation import Sampling, generate_text
from tinyllama_hf.inference.serving import bind


openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

CONTEXT = 400


@pytest.fixture(scope="module")
def folder(tokenizer_folder, tmp_path_factory):
    """A random model that goes on for ever, as a base model whose tokenizer lies in SentencePiece's form alone."""
    torch.manual_seed(0)
    model = TinyLlamaForCausalLM(TinyLlamaConfig.preset("micro", vocab_size=512, max_position_embeddings=CONTEXT))
    model.lm_head.weight.data[2] = 0.0
    folder = tmp_path_factory.mktemp("served") / "my-model"
    model.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes((tokenizer_folder / "tokenizer.model").read_bytes())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    return folder


class Server:
    """`tinyllama-hf serve` on a free port; no cache of the Hub is there."""

    def __init__(self, folder: Path, cwd: Path, *options: str):
        command = [Path(sys.executable).parent / "tinyllama-hf", "serve", folder, "--port", "0", *options]
        self.process = subprocess.Popen(
            [str(word) for word in command], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"HF_HOME": str(cwd / "nowhere"), "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        self.greeting = self.process.stdout.readline()
        assert self.greeting.startswith("serving "), self.greeting + self.process.communicate(timeout=60)[0]
        self.url = self.greeting.split()[3].rstrip(";")
        self.client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=120)

    def stop(self, number: int = signal.SIGINT) -> str:
        """What it printed, once it has ended."""
        self.process.send_signal(number)
        return self.process.communicate(timeout=60)[0]


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    started = Server(folder, tmp_path_factory.mktemp("cwd"), "--template", "llama2")
    yield started
    if started.process.poll() is None:
        started.stop()


@pytest.fixture(scope="module")
def client(server):
    return server.client


@pytest.fixture(scope="module")
def local(folder):
    """The same model and tokenizer in this process."""
    model, tokenizer = load(folder)
    tokenizer.chat_template = load_template("llama2")
    return model, tokenizer


def chat(client, *contents, **options):
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return client.chat.completions.create(**{"model": "my-model", "messages": messages, "temperature": 0, **options})


def complete(client, prompt, **options):
    return client.completions.create(**{"model": "my-model", "prompt": prompt, "temperature": 0, **options})


def test_the_model_is_listed(client):
    """Although there is no cache of the Hub, which the library looks into."""
    assert [model.id for model in client.models.list()] == ["my-model"]
    with urllib.request.urlopen(str(client.base_url).replace("/v1/", "/health")) as answer:
        assert json.load(answer) == {"status": "ok"}


@pytest.mark.parametrize("prompt", ["def f(x):", "x = 1", "a </s> b", "class", "", "  return"])
def test_completions_are_what_generate_gives(client, local, prompt):
    """Whole and streamed; control tokens in a prompt are text."""
    whole = complete(client, prompt, max_tokens=20)
    text = whole.choices[0].text
    assert generate_text(*local, prompt, 20, temperature=0).strip() == (prompt + text).strip()
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 20
    assert whole.usage.prompt_tokens == len(local[1](prompt, split_special_tokens=True)["input_ids"])
    parts = [chunk.choices[0].text for chunk in complete(client, prompt, max_tokens=20, stream=True)]
    assert len(parts) > 5 and "".join(parts).rstrip("\ufffd") == text.rstrip("\ufffd")


class TestTheLibrary:
    """Why `transformers serve` is not handed the folder (5.23); where one of these fails, something of ours can go."""

    def test_reads_prompts_otherwise(self, folder):
        ours, stock = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
        texts = ["def f(x):\n    return x", " x", "a </s> b"]
        assert all(stock(text)["input_ids"] != ours(text, split_special_tokens=True)["input_ids"] for text in texts)

    def test_joins_words_and_leaves_the_context(self, local):
        model, tokenizer = local
        token = tokenizer.convert_tokens_to_ids("\u2581a")
        config = GenerationConfig(max_new_tokens=CONTEXT, pad_token_id=0, sequence_bias={(token,): 100.0})
        inputs = tokenizer("x", return_tensors="pt")
        text, length, new = asyncio.run(
            GenerateManager().generate_non_streaming(model, tokenizer, inputs, config, "1")
        )
        assert length + len(new) > CONTEXT
        assert tokenizer.decode([*inputs["input_ids"][0], *new], skip_special_tokens=True).startswith("x a a a")
        assert text.startswith("a a a")

    def test_cannot_stream_bytes_that_are_no_text(self, local):
        """A line break is a byte for Llama."""
        _, tokenizer = local
        stream = DecodeStream([], skip_special_tokens=True)
        with pytest.raises(Exception, match="Invalid prefix encountered"):
            for token in tokenizer.convert_tokens_to_ids(["<0x0A>", "<0xE2>", "\u2581a"]):
                stream.step(tokenizer._tokenizer, token)

    def test_ignores_a_temperature(self):
        handler = BaseHandler(None, GenerationState())
        config = handler._build_generation_config({"temperature": 0.7}, GenerationConfig(do_sample=False))
        assert config.temperature == 0.7 and not config.do_sample

    def test_fails_at_values(self):
        handler = CompletionHandler(None, GenerationState())
        for body in ({"max_tokens": "ten"}, {"seed": "x"}, {"generation_config": "nojson"}):
            with pytest.raises(ValueError, match=r"invalid literal|Expecting value"):
                handler._build_generation_config(body, GenerationConfig())

    def test_leaves_the_models_settings_out_beside_those_of_a_request(self):
        body = {"generation_config": '{"top_k": 5}', "logit_bias": {"1": 1.0}}
        config = CompletionHandler(None, GenerationState())._build_generation_config(body, GenerationConfig(min_p=0.5))
        assert config.min_p is None and config.sequence_bias is None

    def test_needs_a_cache_of_the_hub(self, tmp_path):
        with pytest.raises(CacheNotFound):
            ModelManager.get_gen_models(str(tmp_path / "nowhere"))


def test_chat_completions_are_what_chat_gives(client, local):
    """Two exchanges, whole and streamed, with a control token in a message."""
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
    texts = {complete(client, "def", max_tokens=20, temperature=t, seed=s).choices[0].text
             for t, s in ((1.0, 1), (1.0, 2), (0.3, 1), (openai.omit, 1), (0, 1))}  # fmt: skip
    assert len(texts) == 5
    again = [complete(client, "def", max_tokens=20, temperature=1.0, seed=1).choices[0].text for _ in range(2)]
    assert again[0] == again[1] and again[0] in texts


def test_a_reply_ends_where_the_context_is_full(client, local):
    whole = complete(client, "x " * 50)
    assert whole.usage.total_tokens == CONTEXT and whole.choices[0].finish_reason == "length"


def test_stop_strings(client, local):
    """The library's server leaves the stop string in the text; docs/serving.md says so."""
    text = complete(client, "def f(x):", max_tokens=40).choices[0].text
    stop = text.strip()[10:12]
    ended = complete(client, "def f(x):", max_tokens=40, stop=[stop]).choices[0]
    assert text.startswith(ended.text) and ended.text.index(stop) and ended.finish_reason == "stop"
    assert len(ended.text) < len(text)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda c: complete(c, "x " * 500), f"by the model's context of {CONTEXT}"),
        (lambda c: complete(c, "x " * 500, stream=True), f"by the model's context of {CONTEXT}"),
        (lambda c: chat(c, "x " * 500), f"by the model's context of {CONTEXT}"),
        (lambda c: complete(c, "x", max_tokens=0), "max_tokens 0: must be greater than or equal to 1"),
        (lambda c: complete(c, "x", temperature=-1), "temperature -1: must be greater than or equal to 0"),
        (lambda c: complete(c, "x", temperature=1, top_p=0), "top_p 0: must be greater than 0"),
        (lambda c: complete(c, "x", n=2), "n: is not supported by this server"),
        (lambda c: complete(c, "x", logprobs=3), "logprobs: is not supported by this server"),
        (lambda c: chat(c, "x", response_format={"type": "json_object"}), "response_format: is not supported"),
        (lambda c: chat(c, "x", tools=[{"type": "function", "function": {"name": "f"}}]), "tools: are not supported"),
        (lambda c: complete(c, "x", model="another"), "Server is pinned to 'my-model'; requested 'another'"),
        (lambda c: complete(c, ["x", "y"]), "prompt must be a string"),
        (lambda c: c.post("/chat/completions", body={"model": "my-model"}, cast_to=object), "messages: is missing"),
        (lambda c: c.chat.completions.create(model="my-model", messages=["x"]), "messages: must be a list of"),
        (lambda c: c.chat.completions.create(model="my-model", messages=[{"role": "user", "content": [
            {"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "data:"}}]}]),
         "holds a part of type 'image_url', and this model reads text alone"),
        (lambda c: chat(c, "x", "y"), "messages end with the role 'assistant'"),
        (lambda c: chat(c), "messages: is empty"),
        (lambda c: c.chat.completions.create(model="my-model", messages=[{"role": "tool", "content": "x"}]),
         "role 'tool' is not known"),
    ],
)  # fmt: skip
def test_bad_requests(client, ask, message):
    with pytest.raises(openai.BadRequestError) as error:
        ask(client)
    assert message in error.value.message


def ask(client, body, path="completions"):
    """Status and error of a request that the `openai` client would not make, or would not let through."""
    prompt = {"chat/completions": {"messages": [{"role": "user", "content": "x"}]}, "responses": {"input": "x"}}
    whole = {**prompt.get(path, {"prompt": "x"}), **body} if isinstance(body, dict) else body
    data = whole if isinstance(whole, bytes) else json.dumps(whole).encode()
    request = urllib.request.Request(f"{client.base_url}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]


FIELDS = [
    ({"max_tokens": "ten"}, "max_tokens 'ten': must be a valid integer"),
    ({"max_tokens": 1.5}, "max_tokens 1.5: must be a valid integer"),
    ({"temperature": "x"}, "temperature 'x': must be a valid number"),
    ({"temperature": float("inf")}, "temperature inf: must be a finite number"),
    ({"top_p": True}, "top_p True: must be a valid number"),
    ({"seed": "x"}, "seed 'x': must be a valid integer"),
    ({"seed": -1}, "seed -1: must be greater than or equal to 0"),
    ({"seed": 2**63}, "seed 9223372036854775808: must be less than"),
    ({"stop": 5}, "stop 5: must be a text or a list of texts, none of them empty"),
    ({"stop": ""}, "stop '': must be a text"),
    ({"stop": ["a", ""]}, "stop ['a', '']: must be a text"),
    ({"stream": "yes"}, "stream 'yes': must be a valid boolean"),
    ({"suffix": 5}, "suffix 5: must be a valid string"),
    ({"frequency_penalty": -1}, "frequency_penalty -1: must be greater than -1"),
    ({"logit_bias": {"x": 1}}, "logit_bias {'x': 1}: 'x' must be the id of a token, 0 to 511"),
    ({"logit_bias": {"512": 1}}, "'512' must be the id of a token"),
    ({"logit_bias": {"5": "x"}}, "logit_bias.5 'x': must be a valid number"),
    ({"generation_config": "nojson"}, "generation_config 'nojson': Invalid JSON"),
    ({"generation_config": {"top_k": 1}}, "generation_config {'top_k': 1}: JSON must be string"),
    ({"generation_config": '{"num_beams": 3}'}, "generation_config.num_beams 3: is not supported by this server; valid: do_sample"),
    ({"generation_config": '{"top_k": -1}'}, "generation_config.top_k -1: must be greater than or equal to 0"),
    ({"prompt": "\ud83d"}, "body: holds half of a surrogate pair"),
    ({"nonsense": 1}, "Unexpected fields in the request: {'nonsense'}"),
    ([1], "body: must be a JSON object"),
    (b'{"prompt": "x"', "body: is no JSON (Expecting ',' delimiter)"),
]  # fmt: skip
CONVERSATIONS = [
    ("chat/completions", {"messages": [{"role": "user", "content": 5}]}, "messages, message 0: content must be a text, or a list"),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "content must be a text, or a list"),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content must be a text, or a list"),
    ("chat/completions", {"messages": [{"role": "assistant", "content": "x", "tool_calls": [5]}]}, "calls of tools are not supported"),
    ("chat/completions", {"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs: is not supported"),
    ("chat/completions", {"max_completion_tokens": "x"}, "max_completion_tokens 'x': must be a valid integer"),
    ("responses", {"max_output_tokens": 0}, "max_output_tokens 0: must be greater"),
    ("responses", {"input": 5}, "input: must be a list of"),
    ("responses", {"input": [5]}, "input: must be a list of"),
    ("responses", {"input": [{"type": "function_call"}]}, "calls of tools are not supported"),
    ("responses", {"instructions": 5}, "instructions 5: must be a valid string"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [*(("completions", body, message) for body, message in FIELDS), *CONVERSATIONS],
    ids=lambda value: str(value)[:40],
)
def test_bad_fields(client, path, body, message):
    """Status 400 in OpenAI's form, naming field, value and rule."""
    status, error = ask(client, body, path)
    assert status == 400 and message in error["message"] and error["type"] == "invalid_request_error"


def test_a_path_that_is_not_there_has_an_error_of_the_same_form(client):
    assert ask(client, {}, "audio/transcriptions") == (404, {"message": "Not Found", "type": "invalid_request_error"})


def test_settings_of_a_generation_config(client):
    """They come on top of the model's, and fields of the request on top of them."""

    def text(**body):
        status, answer = ask(client, {"max_tokens": 20, "seed": 1, **body})
        assert status == 200
        return answer["choices"][0]["text"]

    greedy = text(temperature=0)
    assert text() != greedy == text(generation_config='{"top_k": 1}') == text(generation_config='{"temperature": 0}')
    assert text(generation_config='{"transformers_version": "5"}') == text()
    assert text(generation_config='{"temperature": 0}', temperature=0.8) == text()
    status, answer = ask(client, {"max_tokens": None, "generation_config": '{"max_new_tokens": 7}'})
    assert (status, answer["usage"]["completion_tokens"]) == (200, 7)


def test_a_bias(client, local):
    token = local[1].convert_tokens_to_ids("\u2581a")
    answer = ask(client, {"logit_bias": {str(token): 100}, "max_tokens": 3, "temperature": 0})[1]
    assert answer["choices"][0]["text"] == " a a a"
    assert ask(client, {"logit_bias": {}, "stop": [], "max_tokens": 3})[0] == 200


def test_messages_as_clients_send_them_back(client):
    message = {"role": "assistant", "content": "y", "tool_calls": None}
    turns = [{"role": "user", "content": [{"type": "text", "text": "x"}]}, message, {"role": "user", "content": "z"}]
    assert ask(client, {"messages": turns, "max_tokens": 2}, "chat/completions")[0] == 200
    parts = [{"type": "input_text", "text": "x"}]
    assert ask(client, {"input": parts, "max_output_tokens": 2}, "responses")[0] == 200


def test_harmless_fields_are_let_through(client):
    assert chat(client, "x", max_tokens=2, n=1, user="me", stream_options=None).choices[0].message.content


def test_two_at_a_time(client):
    """Requests queue; each gets its own."""
    texts = {}

    def ask(prompt):
        texts[prompt] = complete(client, prompt, max_tokens=30).choices[0].text

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in ("def", "class", "import")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {prompt: complete(client, prompt, max_tokens=30).choices[0].text for prompt in texts}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "stream"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_it_ends_in_the_middle_of_a_request(tmp_path, tokenizer_folder, number, stream):
    """A base model with much to say; within a few seconds, without a traceback."""
    torch.manual_seed(0)
    config = TinyLlamaConfig.preset("micro", vocab_size=512, max_position_embeddings=200_000)
    model = TinyLlamaForCausalLM(config)
    model.lm_head.weight.data[2] = 0.0
    model.save_pretrained(tmp_path / "base")
    load_tokenizer(tokenizer_folder).save_pretrained(tmp_path / "base")
    server = Server(tmp_path / "base", tmp_path)
    assert "/completions -H" in server.process.stdout.readline()
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
    assert ended
    assert server.process.returncode == (0 if number == signal.SIGINT else -signal.SIGTERM), printed
    assert "Traceback" not in printed


class TestRefusals:
    @pytest.fixture
    def refuse(self, monkeypatch, capsys, tmp_path):
        """Runs the command in this process; returns its message."""

        def run(*words):
            monkeypatch.setattr(sys, "argv", ["tinyllama-hf", "serve", *map(str, words)])
            monkeypatch.chdir(tmp_path)
            with pytest.raises(SystemExit) as stop:
                tinyllama_hf_cli.main()
            output, errors = capsys.readouterr()
            assert stop.value.code == 2 and not output and errors.startswith("error: ") and errors.count("\n") == 1
            return errors

        return run

    def test_a_port_in_use(self, folder, refuse):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            errors = refuse(folder, "--port", port)
        assert f"--host 127.0.0.1 --port {port}: cannot be had (Address already in use)" in errors

    def test_addresses(self):
        with pytest.raises(InputError, match="--port 70000: must lie between 0"):
            bind("127.0.0.1", 70000)
        with pytest.raises(InputError, match=r"--host nowhere\.invalid: no address of this machine"):
            bind("nowhere.invalid", 0)
        with pytest.raises(InputError, match=r"--host 192\.0\.2\.1 --port 0: cannot be had"):
            bind("192.0.2.1", 0)

    def test_models_and_templates(self, folder, refuse):
        assert "model 'nowhere': no such folder" in refuse("nowhere", "--port", 0)
        errors = refuse(folder, "--template", "lama2")
        assert "chat template 'lama2' does not exist; did you mean 'llama2'?" in errors

    def test_without_the_packages(self, folder, monkeypatch, refuse):
        monkeypatch.setitem(sys.modules, "uvicorn", None)
        assert "serve needs the package uvicorn: pip install 'tinyllama_hf[serving]'" in refuse(folder)


@pytest.mark.slow
def test_the_page(folder, tmp_path):
    """Every command of docs/serving.md is run, the server's first, then its Python."""
    (tmp_path / "my-model").symlink_to(folder)
    found = commands(ROOT / "docs" / "serving.md")
    served = next(command for command, _ in found if " serve " in command)
    server = Server(tmp_path / "my-model", tmp_path, *served.split()[3:])
    port = server.url.split(":")[-1].removesuffix("/v1")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command, wanted in found:
        if command in (served, "pip install 'tinyllama_hf[serving]'"):
            continue
        done = subprocess.run(
            command.replace("8000", port), shell=True, cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True
        )  # fmt: skip
        assert done.returncode == 0 and wanted in done.stdout, f"{command}\n{done.stdout}{done.stderr}"
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    code = "".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)).replace("8000", port)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "def f(x):" in done.stdout, done.stderr
    assert "Traceback" not in server.stop()


@pytest.mark.slow
def test_quantised(nano_folder, tmp_path):
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
        [str(c) for c in command], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    url = process.stdout.readline().split()[3].rstrip(";")
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    text = complete(client, "class", model=nano_folder.name, max_tokens=20).choices[0].text
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and errors.startswith("nf4: ")
    assert "class" + text == generate_text(*load(nano_folder, quantization="nf4"), "class", 20, temperature=0)
