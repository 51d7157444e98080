"""Invalid requests and missing endpoints, tested on the application in this process."""

import re

import pytest

from tests.serving.served import GENERATING, ask, post, stream
from tests.serving.test_library import ROUTES
from tinyllama_hf.serving.app import PATHS


FIELDS = [
    ({"max_tokens": "ten"}, "max_tokens 'ten': must be a valid integer"),
    ({"max_tokens": 1.5}, "max_tokens 1.5: must be a valid integer"),
    ({"temperature": "x"}, "temperature 'x': must be a valid number"),
    ({"temperature": float("inf")}, "temperature inf: must be a finite number"),
    ({"temperature": 1e-40}, "temperature 1e-40: must be 0 (always the most likely token) or at least 1e-06"),
    ({"top_p": True}, "top_p True: must be a valid number"),
    ({"seed": "x"}, "seed 'x': must be a valid integer"),
    ({"seed": -1}, "seed -1: must be an integer from 0 to 18446744073709551615"),
    ({"seed": 2**64}, "seed 18446744073709551616: must be an integer from 0 to 18446744073709551615"),
    ({"stop": 5}, "stop 5: must be a non-empty string"),
    ({"stop": ""}, "stop '': must be a non-empty string"),
    ({"stop": ["a", ""]}, "stop ['a', '']: must be a non-empty string"),
    ({"stop": list("abcde")}, "must be at most 4 strings of at most 100 characters"),
    ({"stop": "a" * 101}, "must be at most 4 strings of at most 100 characters"),
    ({"n": 0}, "n: not supported by this server"),
    ({"logprobs": 0}, "logprobs: not supported by this server"),
    ({"stream": "yes"}, "stream 'yes': must be a valid boolean"),
    ({"suffix": 5}, "suffix 5: must be a valid string"),
    ({"frequency_penalty": -1}, "frequency_penalty -1: must be greater than -1"),
    ({"logit_bias": {"x": 1}}, "logit_bias {'x': 1}: 'x' must be a token id from 0 to 511"),
    ({"logit_bias": {"512": 1}}, "'512' must be a token id"),
    ({"logit_bias": {"5": "x"}}, "logit_bias.5 'x': must be a valid number"),
    ({"generation_config": "nojson"}, "generation_config 'nojson': "),
    ({"generation_config": 5}, "generation_config 5: "),
    ({"generation_config": "5"}, "generation_config 5: "),
    ({"generation_config": {"num_beams": 3}}, "generation_config.num_beams 3: "),
    ({"generation_config": {"top_k": "1"}}, "generation_config.top_k '1': "),
    ({"generation_config": '{"num_beams": 3}'},
     "generation_config.num_beams 3: not supported by this server; valid: do_sample"),
    ({"generation_config": '{"top_k": -1}'}, "generation_config.top_k -1: must be greater than or equal to 0"),
    ({"generation_config": '{"repetition_penalty": 1e-40}'},
     "repetition_penalty 1e-40: must be greater than or equal to 0.000001"),
    ({"prompt": "\ud83d"}, r"is '\ud83d', half of a surrogate pair"),
    ({"nonsense": 1}, "Unexpected fields in the request: {'nonsense'}"),
    ([1], "body: must be a JSON object"),
    (b'{"prompt": "x"', "body: not valid JSON (Expecting ',' delimiter)"),
    (b'{"prompt": "\xff"}', "There was an error parsing the body"),
    (b"[" * 100_000, "There was an error parsing the body"),
]  # fmt: skip
CONVERSATIONS = [
    ("chat/completions", {"messages": [{"role": "user", "content": 5}]}, "messages, message 0: content is int"),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "content part 0 (type None)"),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
     "content part 0 (type 'text')"),
    ("chat/completions", {"messages": [{"role": "assistant", "content": "x", "tool_calls": [5]}]},
     "messages, message 0: tool_calls"),
    ("chat/completions", {"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs: not supported"),
    ("chat/completions", {"max_completion_tokens": "x"}, "max_completion_tokens 'x': must be a valid integer"),
    ("chat/completions", {"tools": "x"}, "tools: not supported"),
    ("chat/completions", {"verbosity": "low"}, "verbosity: not supported"),
    ("responses", {"tools": [5]}, "tools: not supported"),
    ("responses", {"conversation": "x"}, "conversation: not supported"),
    ("responses", {"parallel_tool_calls": "x"}, "parallel_tool_calls 'x': must be a valid boolean"),
    ("responses", {"input": [{"type": "reasoning", "role": "user", "content": "x"}]},
     "input, message 0: type 'reasoning' not supported"),
    ("responses", {"max_output_tokens": 0}, "max_output_tokens 0: must be greater"),
    ("responses", {"input": 5}, "input: must be a list of"),
    ("responses", {"input": [5]}, "input: must be a list of"),
    ("responses", {"input": [{"type": "function_call"}]}, "input, message 0: type 'function_call'"),
    ("responses", {"instructions": 5}, "instructions 5: must be a valid string"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [*(("completions", body, message) for body, message in FIELDS), *CONVERSATIONS],
    ids=lambda value: str(value)[:40],
)
def test_bad_fields(client, path, body, message):
    """Status 400 in OpenAI's format; the message names field, value and rule."""
    status, error = ask(client, body, path)
    assert status == 400 and message in error["message"] and error["type"] == "invalid_request_error"


def test_what_is_nested_too_deeply(client):
    """The JSON reader or the checks refuse them."""
    for depth in (*range(900, 1000, 2), 5000):
        deep = b'{"prompt": "x", "max_tokens": ' + b"[" * depth + b"]" * depth + b"}"
        assert ask(client, deep)[0] == 400, depth


@pytest.mark.parametrize("path", GENERATING)
def test_long_texts(client, path):
    """They are refused before they are encoded, which takes seconds, and the message quotes only a part."""
    long = "Once " * 200_000
    body = {"chat/completions": {"messages": [{"role": "user", "content": [{"type": "text", "text": long}]}]}}
    status, error = ask(client, body.get(path, {"prompt": long} if path == "completions" else {"input": long}), path)
    assert status == 400 and error["message"].startswith("prompt: 1000000 characters; must be at most ")
    status, error = ask(client, {"temperature": long}, path)
    assert status == 400 and len(error["message"]) < 1100
    assert error["message"].startswith("temperature 'Once ") and error["message"].endswith("must be a valid number")


@pytest.mark.parametrize("path", sorted(ROUTES))
def test_routes(client, path):
    """The server has the endpoints for one model, and no others."""
    for method in ROUTES[path]:
        answer = client.request(method, path)
        assert (answer.status_code == 404) == (path not in PATHS), method
        if method != "HEAD" and path not in PATHS:
            error = answer.json()["error"]
            assert error["message"].startswith(f"{method} {path}: Not Found; the endpoints are /v1/chat/completions")
            assert error["type"] == "invalid_request_error"
    assert ask(client, {"max_tokens": 1})[0] == 200


def test_other_methods(client):
    answer = client.get("/v1/completions")
    assert answer.status_code == 405 and "GET /v1/completions: Method Not Allowed" in answer.json()["error"]["message"]
    assert client.post("/v1/completions/").status_code == 404


@pytest.fixture(params=["ending", "failing"])
def trouble(request, app, local, monkeypatch):
    """Status and message of a request during shutdown, or if the generation fails."""

    def fail(**_):
        raise RuntimeError('out of "memory"\n')

    if request.param == "failing":
        monkeypatch.setattr(local[0], "generate", fail)
        yield 500, 'out of "memory"\n'
    else:
        app.state.ending.set()
        yield 503, "the server is shutting down"
        app.state.ending.clear()


@pytest.mark.parametrize("path", GENERATING)
def test_trouble_has_an_error_of_the_same_form(client, path, trouble):
    """With and without streaming; a stream has already started with status 200."""
    status, message = trouble
    found, error = ask(client, {}, path)
    assert found == status and error["message"].endswith(message) and error["type"] == "server_error"
    events = stream(client, {}, path)
    if path == "responses":
        assert events[-2]["type"] == "error" and events[-2]["message"] == message
        assert events[-1]["type"] == "response.failed"
    else:
        assert events[-2]["error"] == {"message": message, "type": "server_error", "param": None, "code": None}
        assert events[-1] == "[DONE]"


def test_settings_of_a_generation_config(client):
    """They override the settings of the model, and fields of the request override them."""

    def text(**body):
        status, answer = ask(client, {"max_tokens": 20, "seed": 1, **body})
        assert status == 200
        return answer["choices"][0]["text"]

    greedy = text(temperature=0)
    assert text() != greedy == text(generation_config='{"top_k": 1}') == text(generation_config='{"temperature": 0}')
    assert text(generation_config={"top_k": 1}) == text(top_p=0) == text(generation_config={"top_p": 0}) == greedy
    assert text(generation_config='{"transformers_version": "5"}') == text()
    assert text(generation_config='{"temperature": 0}', temperature=0.8) == text()
    status, answer = ask(client, {"max_tokens": None, "temperature": 0, "generation_config": '{"max_new_tokens": 7}'})
    assert (status, answer["usage"]["completion_tokens"]) == (200, 7)


@pytest.mark.parametrize("path", GENERATING)
def test_a_seed(client, path):
    length = {"max_output_tokens" if path == "responses" else "max_tokens": 10}

    def streamed(seed):
        """Removes id and time, which differ between answers."""
        text = post(client, {"stream": True, "seed": seed, **length}, path).text
        return re.findall(r'"(?:text|content|delta)":("[^"]*")', text)

    assert [] != streamed(1) == streamed(1) != streamed(2)


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
