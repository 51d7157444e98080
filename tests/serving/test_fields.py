"""Each field of OpenAI's API: it reaches generation, is accepted with its default, or is refused."""

import pytest

from tests.serving.served import GENERATING, ask, stream, text_of
from tinyllama_hf.serving.request_fields import _Fields, _GenerationConfig


pytest.importorskip("starlette.testclient")

USER = {"role": "user", "content": "Hello"}
SHORT = {"max_tokens": 3, "temperature": 0}


def assistant(**fields):
    return {"messages": [USER, {"role": "assistant", **fields}, USER]}


def messages(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


ALL_NULL = (
    "stop temperature top_p n seed logit_bias tools tool_choice response_format stream stream_options user "
    "presence_penalty frequency_penalty logprobs top_logprobs parallel_tool_calls reasoning_effort metadata store "
    "modalities prediction audio service_tier max_completion_tokens functions function_call "
    "web_search_options generation_config"
)
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {}}}
# A body, and the start of the message of status 400, or `None` if it is valid.
CHAT = {
    "nulls": (dict.fromkeys(ALL_NULL.split()), None),
    "parts": ({"messages": [{"role": "user",
              "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]}, None),
    "parts of the system": (messages(("system", [{"type": "text", "text": "Be brief."}]), ("user", "Hello")), None),
    "developer": (messages(("developer", "Be brief."), ("user", "Hello")), None),
    "max_completion_tokens": ({"max_tokens": None, "max_completion_tokens": 3}, None),
    "both lengths": ({"max_completion_tokens": 3}, "max_tokens, max_completion_tokens: "),
    "max_tokens 0": ({"max_tokens": 0}, "max_tokens 0: "),
    "max_tokens -1": ({"max_tokens": -1}, "max_tokens -1: "),
    "stop, none": ({"stop": []}, None),
    "stop, empty": ({"stop": ""}, "stop '': "),
    "stop": ({"stop": "h"}, None),
    "logit_bias": ({"logit_bias": {"50": 100}}, None),
    "logit_bias, a number with a point": ({"logit_bias": {"50": -100.0}}, None),
    "stream_options without a stream": ({"stream_options": {"include_usage": True}},
                                        "stream_options {'include_usage': True}: "),
    "an unknown stream option": ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage True: "),
    "n 1": ({"n": 1}, None),
    "n 2": ({"n": 2}, "n: "),
    "n true": ({"n": True}, "n: "),
    "presence_penalty 0": ({"presence_penalty": 0.0}, None),
    "presence_penalty": ({"presence_penalty": 0.5}, "presence_penalty: "),
    "top_p 0": ({"temperature": 1, "top_p": 0}, None),
    "top_p": ({"top_p": 1.1}, "top_p 1.1: "),
    "temperature in a text": ({"temperature": "0.5"}, "temperature '0.5': "),
    "tool_choice none": ({"tool_choice": "none"}, None),
    "tool_choice auto, no tools": ({"tool_choice": "auto", "tools": [], "parallel_tool_calls": True}, None),
    "tool_choice required": ({"tool_choice": "required"}, "tool_choice: "),
    "tools": ({"tools": [FUNCTION]}, "tools: "),
    "functions": ({"functions": [], "function_call": "none"}, None),
    "response_format text": ({"response_format": {"type": "text"}}, None),
    "response_format json": ({"response_format": {"type": "json_object"}}, "response_format: "),
    "modalities": ({"modalities": ["text"], "verbosity": "medium", "reasoning_effort": "none"}, None),
    "audio": ({"modalities": ["text", "audio"]}, "modalities: "),
    "no content": (assistant(content=None, tool_calls=None), "messages, message 1: content"),
    "an answer sent back": (assistant(content="Yes", refusal=None, annotations=[], audio=None, function_call=None,
                            tool_calls=None), None),
    "an answer of another server": (assistant(content="Yes", refusal=None, reasoning_content=""), None),
    "a refusal": (assistant(content="", refusal="No"), "messages, message 1: refusal "),
    "an unknown field of a message": (assistant(content="Yes", weight=1), "messages, message 1: weight "),
    "a name": ({"messages": [{**USER, "name": "bob"}]}, None),
    "the user twice": ({"messages": [USER, USER]}, "messages: turn 1 has the role 'user'"),
    "a reply to continue": (messages(("user", "Hello"), ("assistant", "Well")),
                            "messages end with the role 'assistant'"),
    "the system twice": (messages(("system", "A"), ("system", "B"), ("user", "x")),
                         "messages: turn 0 has the role 'system'"),
    "an empty content": (messages(("user", "")), None),
    "logprobs false": ({"logprobs": False}, None),
    "logprobs": ({"logprobs": True, "top_logprobs": 2}, "logprobs: "),
    "vLLM's": ({"repetition_penalty": 1.1, "top_k": 5}, "Unexpected fields in the request: "),
    "min_p": ({"min_p": 0.1}, "Unexpected fields in the request: {'min_p'}"),
    "chat_template_kwargs": ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs: "),
    "ignore_eos": ({"ignore_eos": True}, "Unexpected fields in the request: {'ignore_eos'}"),
    "generation_config": ({"generation_config": {"top_k": 5, "repetition_penalty": 1.1}}, None),
}  # fmt: skip
COMPLETIONS = {
    "a list of one": ({"prompt": ["Once upon"]}, None),
    "a list of two": ({"prompt": ["Once", "Two"]}, "prompt: "),
    "ids": ({"prompt": [1, 403, 407]}, None),
    "ids in a list": ({"prompt": [[1, 403, 407]]}, None),
    "ids of none": ({"prompt": [1, 512]}, "prompt: "),
    "an empty list": ({"prompt": []}, "prompt: "),
    "echo": ({"echo": True}, "echo: "),
    "echo false": ({"echo": False}, None),
    "nulls": ({**dict.fromkeys("suffix best_of logprobs n echo max_tokens stream_options user".split()),
               "generation_config": {"max_new_tokens": 3}}, None),
    "best_of 1": ({"best_of": 1, "n": 1}, None),
    "max_completion_tokens": ({"max_completion_tokens": 3},
                              "Unexpected fields in the request: {'max_completion_tokens'}"),
    "an empty prompt": ({"prompt": ""}, None),
    "no prompt": ({"prompt": None}, "prompt: "),
    "logprobs 0": ({"logprobs": 0}, "logprobs: "),
}  # fmt: skip
RESPONSES = {
    "spelled out": ({"tools": [], "tool_choice": "auto", "truncation": "disabled", "background": False, "store": True,
                     "parallel_tool_calls": True, "text": {"format": {"type": "text"}}, "include": [],
                     "top_logprobs": 0,
                     "previous_response_id": None, "reasoning": None, "max_tool_calls": None}, None),
    "truncation": ({"truncation": "auto"}, "truncation: "),
    "a format": ({"text": {"format": {"type": "json_object"}}}, "text: "),
    "developer": ({"input": [{"role": "developer", "content": "A"}, USER]}, None),
    "an answer sent back": ({"input": [USER,
                            {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
                             "content": [{"type": "output_text", "text": "Yes", "annotations": []}]}, USER]}, None),
    "instructions and a system message": ({"instructions": "A", "input": [{"role": "system", "content": "B"}, USER]},
                                          "messages: turn 0 has the role 'system'"),
}  # fmt: skip
CASES = {"chat/completions": CHAT, "completions": COMPLETIONS, "responses": RESPONSES}


@pytest.mark.parametrize(
    ("path", "name"), [(path, name) for path, cases in CASES.items() for name in cases], ids=lambda value: value
)
def test_each_field(client, path, name):
    body, message = CASES[path][name]
    short = {"max_output_tokens": 3, "temperature": 0} if path == "responses" else SHORT
    status, answer = ask(client, {**short, **body}, path)
    if message is None:
        assert status == 200, answer
    else:
        assert status == 400 and answer["message"].startswith(message), answer
        assert answer["type"] == "invalid_request_error"


def test_equivalent_forms_of_a_request(client):
    def text(path="chat/completions", **body):
        return text_of(ask(client, {**SHORT, "max_tokens": 8, **body}, path)[1])

    def text_after(*turns):
        return text(**messages(*turns))

    assert text_after(("developer", "Be brief."), USER.values()) == text_after(("system", "Be brief."), USER.values())
    assert text_after(("developer", "Be brief."), USER.values()) != text_after(USER.values())
    assert text(**CHAT["parts"][0]) == text_after(("user", "Hel lo"))
    assert text("completions", prompt=["def f"]) == text("completions", prompt="def f")


def test_a_prompt_of_ids(client, local):
    ids = local[1]("def f", split_special_tokens=True)["input_ids"]
    by_ids, by_text = (ask(client, {"prompt": prompt, **SHORT})[1] for prompt in (ids, "def f"))
    assert text_of(by_ids) == text_of(by_text) and by_ids["usage"] == by_text["usage"]


# Each field that affects the generation, with its settings of `generate` in transformers.
SETTINGS = {
    "temperature": (1.7, {"do_sample": True, "temperature": 1.7}),
    "top_p": (0.1, {"do_sample": True, "top_p": 0.1}),
    "seed": (2**64 - 1, {"seed": 2**64 - 1}),
    "max_tokens": (2, {"max_new_tokens": 2}),
    "max_completion_tokens": (2, {"max_new_tokens": 2}),
    "max_output_tokens": (2, {"max_new_tokens": 2}),
    "stop": (["the", "q"], {"stops": ("the", "q")}),
    "frequency_penalty": (0.5, {"repetition_penalty": 1.5}),
    "logit_bias": ({"7": 3.5, "9": -100}, {"sequence_bias": {(7,): 3.5, (9,): -100}}),
}
OTHER_SETTINGS = {
    "do_sample": (False, {"do_sample": False}),
    "temperature": (1.7, {"do_sample": True, "temperature": 1.7}),
    "top_p": (0.1, {"do_sample": True, "top_p": 0.1}),
    "top_k": (3, {"top_k": 3}),
    "min_p": (0.2, {"min_p": 0.2}),
    "typical_p": (0.3, {"typical_p": 0.3}),
    "repetition_penalty": (1.4, {"repetition_penalty": 1.4}),
    "no_repeat_ngram_size": (2, {"no_repeat_ngram_size": 2}),
    "min_new_tokens": (1, {"min_new_tokens": 1}),
    "max_new_tokens": (2, {"max_new_tokens": 2}),
}
ABSENT = {
    "completions": {"max_completion_tokens", "max_output_tokens"},
    "chat/completions": {"max_output_tokens"},
    "responses": {"max_tokens", "max_completion_tokens", "stop", "frequency_penalty", "logit_bias"},
}
LENGTH = {"completions": "max_tokens", "chat/completions": "max_tokens", "responses": "max_output_tokens"}


@pytest.fixture
def used(local, monkeypatch):
    """The settings of each call of `generate`."""
    model, found = local[0], []
    generate = model.generate

    def spy(generation_config, **arguments):
        found.append(generation_config.to_dict() | {"stops": arguments["stopping_criteria"][-1].stops.texts})
        return generate(generation_config=generation_config, **arguments)

    monkeypatch.setattr(model, "generate", spy)
    return found


def bodies(path):
    """Yields bodies, each with the settings that it makes."""
    for name, (value, wanted) in SETTINGS.items():
        if name not in ABSENT[path]:
            yield {name: value}, wanted
    for name, (value, wanted) in OTHER_SETTINGS.items():
        yield {"generation_config": {name: value}}, wanted


@pytest.mark.parametrize("path", GENERATING)
def test_each_field_reaches_generation(client, used, path):
    """With and without streaming."""
    for body, wanted in bodies(path):
        whole = body if "max_new_tokens" in wanted else {LENGTH[path]: 1, **body}
        assert ask(client, whole, path)[0] == 200
        if "generation_config" not in body:
            assert stream(client, whole, path)
        for settings in used:
            assert {name: settings.get(name) for name in wanted} == wanted, body
        used.clear()


@pytest.mark.parametrize("path", GENERATING)
def test_a_field_of_another_path_is_refused_by_name(client, path):
    for name in ABSENT[path]:
        status, error = ask(client, {name: SETTINGS[name][0]}, path)
        assert status == 400 and name in error["message"]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("stop", ["a a", ["never", "a a"]], ids=["text", "list"])
def test_a_stop_string_ends_a_reply(client, local, path, stop):
    body = {"temperature": 0, "max_tokens": 8, "logit_bias": {local[1].convert_tokens_to_ids("\u2581a"): 100}}
    whole, ended = (ask(client, body | changes, path)[1] for changes in ({}, {"stop": stop}))
    assert text_of(whole).split() == ["a"] * 8 and text_of(ended).strip() == ""
    assert [answer["choices"][0]["finish_reason"] for answer in (whole, ended)] == ["length", "stop"]
    assert ended["usage"]["completion_tokens"] == 2
    last = ask(client, body | {"stop": stop, "max_tokens": 2}, path)[1]
    assert last["choices"][0]["finish_reason"] == "stop", "not length, although the limit is reached as well"


def test_a_line_break_ends_a_reply_at_once(client, local):
    """It is a byte token, the text of which may depend on the next token."""
    ids = local[1].convert_tokens_to_ids(["<0x0A>", "\u2581a"])
    body = {"temperature": 0, "max_tokens": 8, "logit_bias": dict.fromkeys(map(str, ids), 100), "stop": "\n"}
    body["generation_config"] = {"no_repeat_ngram_size": 1}  # both tokens once
    answer = ask(client, body)[1]
    assert answer["usage"]["completion_tokens"] <= 2 and text_of(answer).strip() in ("", "a")
    assert answer["choices"][0]["finish_reason"] == "stop" and "\n" not in text_of(answer)


def test_a_small_top_p_leaves_the_most_likely_token(client):
    """A temperature alone does not."""
    texts = [
        [text_of(ask(client, {LENGTH[path]: 8, "seed": 1, **body}, path)[1]) for path in GENERATING]
        for body in ({"temperature": 0}, {"temperature": 1.5, "top_p": 1e-6}, {"temperature": 1.5, "top_p": 1.0})
    ]
    assert texts[0] == texts[1] and all(map(str.__ne__, texts[1], texts[2]))


def test_the_tables_have_all_fields():
    shape = {"model", "stream", "stream_options", "parallel_tool_calls", "generation_config", "instructions", "suffix"}
    assert SETTINGS.keys() | shape == _Fields.model_fields.keys()
    assert OTHER_SETTINGS.keys() | {"transformers_version"} == _GenerationConfig.model_fields.keys()


@pytest.mark.parametrize("path", GENERATING)
def test_how_a_stream_ends(client, path):
    """/v1/responses has its own last event."""
    events = stream(client, {LENGTH[path]: 3, "temperature": 0}, path)
    if path == "responses":
        assert events[-1]["type"] == "response.completed" and "[DONE]" not in events
    else:
        assert events[-1] == "[DONE]" and events.count("[DONE]") == 1
        reasons = [event["choices"][0]["finish_reason"] for event in events[:-1]]
        assert reasons == [None] * (len(reasons) - 1) + ["length"]
