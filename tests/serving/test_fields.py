"""Each field of OpenAI's API: it reaches the rows, is accepted with its default, or is refused by name."""

import dataclasses
import json

import pytest

from tests.serving.client_cases import ALL_NULL, BRIEF, FUNCTION, SCHEMA, USER, replied
from tinyllama_hf.batch.prompts import chat_ids
from tinyllama_hf.decoding.proposals import Proposer
from tinyllama_hf.serving import prompt_reading, request_fields
from tinyllama_hf.serving.call import Refusal
from tinyllama_hf.serving.request_fields import Limits, RequestReader


CONTEXT = 400
PROMPTS = {"chat": {"messages": [USER]}, "completion": {"prompt": "x"}, "response": {"input": "x"}}
LENGTH = {"chat": "max_tokens", "completion": "max_tokens", "response": "max_output_tokens"}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}


def read(reader, kind, body):
    """Reads a body, with the prompt of the endpoint if the body is an object without one."""
    whole = {**PROMPTS[kind], **body} if isinstance(body, dict) else body
    return reader.read(kind, whole if isinstance(whole, bytes) else json.dumps(whole).encode())


def row(reader, kind="completion", **body):
    """The attributes of the only row."""
    (found,) = read(reader, kind, body).rows
    return dataclasses.asdict(found)


def refusal(reader, kind, body):
    with pytest.raises(Refusal) as found:
        read(reader, kind, body)
    assert found.value.status == 400 and len(found.value.message) < 1100
    return found.value


# A body, and the start of the message of its refusal.
OF_ALL = [
    ({"temperature": "x"}, "temperature 'x': must be a valid number"),
    ({"temperature": 1e-40}, "temperature 1e-40: must be 0 (always the most likely token) or at least 1e-06"),
    ({"temperature": -0.1}, "temperature -0.1: must be greater than or equal to 0"),
    (b'{"temperature": 1e999}', "temperature inf: must be a finite number"),
    ({"top_p": True}, "top_p True: must be a valid number"),
    ({"top_p": 1.1}, "top_p 1.1: "),
    ({"top_k": -2}, "top_k -2: must be greater than or equal to -1"),
    ({"top_k": "1"}, "top_k '1': "),
    ({"min_p": 1.5}, "min_p 1.5: "),
    ({"repetition_penalty": 1e-40}, "repetition_penalty 1e-40: must be greater than or equal to 0.000001"),
    ({"min_tokens": -1}, "min_tokens -1: "),
    ({"seed": "x"}, "seed 'x': must be a valid integer"),
    ({"seed": -1}, "seed -1: must be an integer from 0 to 18446744073709551615"),
    ({"seed": 2**64}, "seed 18446744073709551616: must be an integer from 0 to 18446744073709551615"),
    ({"stream": "yes"}, "stream 'yes': must be a valid boolean"),
    ({"stream_options": {"include_usage": True}}, "stream_options.include_usage True: only valid with stream"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage True: not supported by this server"),
    ({"parallel_tool_calls": "x"}, "parallel_tool_calls 'x': must be a valid boolean"),
    ({"model": 5}, "model 5: must be a valid string"),
    ({"nonsense": 1}, "nonsense: not supported by this server; leave it out"),
    ({"tools": [FUNCTION]}, "tools: not supported by this server; leave it out"),
    ({"tools": "x"}, "tools: not supported by this server"),
    ({"tool_choice": "required"}, "tool_choice: "),
    ({"verbosity": "low"}, "verbosity: not supported"),
    ({"modalities": ["text", "audio"]}, "modalities: "),
    ({"reasoning_effort": "high"}, "reasoning_effort: "),
    ({"generation_config": {"top_k": 5}}, "generation_config: not supported by this server; send top_k, min_p"),
    ({"generation_config": "5"}, "generation_config: "),
    ([1], "body: must be a JSON object"),
    (b"", "body: not valid JSON (EOF"),
    (b'{"prompt": "x"', "body: not valid JSON (EOF"),
    (b'{"prompt": "\xff"}', "body: not valid JSON (invalid unicode"),
    (b'{"prompt": NaN}', "body: not valid JSON ("),
    (b'{"prompt": "\\ud83d"}', "body: not valid JSON (unexpected end of hex escape at line 1 column 19; unpaired"),
    (b"[" * 100_000, "body: nested too deeply"),
    (b'{"seed": ' + b"9" * 5000 + b"}", "body: not valid JSON (number out of range"),
]
OF_SAMPLED = [
    ({"max_tokens": "ten"}, "max_tokens 'ten': must be a valid integer"),
    ({"max_tokens": 1.5}, "max_tokens 1.5: must be a valid integer"),
    ({"n": 0}, "n 0: must be from 1 to 8"),
    ({"n": 9}, "n 9: must be from 1 to 8"),
    ({"n": True}, "n True: "),
    ({"stop": 5}, "stop 5: must be a non-empty string"),
    ({"stop": ""}, "stop '': must be a non-empty string"),
    ({"stop": ["a", ""]}, "stop ['a', '']: must be a non-empty string"),
    ({"stop": list("abcde")}, "stop ['a', 'b', 'c', 'd', 'e']: must be at most 4 strings of at most 100 characters"),
    ({"stop": "a" * 101}, "stop 'aaa"),
    ({"frequency_penalty": -2.1}, "frequency_penalty -2.1: must be greater than or equal to -2"),
    ({"presence_penalty": 2.1}, "presence_penalty 2.1: must be less than or equal to 2"),
    ({"logit_bias": {"x": 1}}, "logit_bias {'x': 1}: 'x' must be a token id from 0 to 511"),
    ({"logit_bias": {"512": 1}}, "logit_bias {'512': 1}: '512' must be a token id"),
    ({"logit_bias": {"-1": 1}}, "logit_bias {'-1': 1}: '-1' must be a token id"),
    ({"logit_bias": {"5": "x"}}, "logit_bias {'5': 'x'}: the bias of token 5 must be a number from -100 to 100"),
    ({"logit_bias": {"5": 101}}, "logit_bias {'5': 101}: the bias of token 5"),
    ({"logit_bias": {"5": True}}, "logit_bias {'5': True}: the bias of token 5"),
    ({"logit_bias": [1]}, "logit_bias [1]: must be a valid dictionary"),
]
OF_CHAT = [
    ({"max_tokens": 3, "max_completion_tokens": 3}, "max_tokens, max_completion_tokens: both"),
    ({"max_tokens": 0}, "max_tokens 0: "),
    ({"max_completion_tokens": "x"}, "max_completion_tokens 'x': must be a valid integer"),
    ({"logprobs": 1}, "logprobs 1: must be a valid boolean"),
    ({"top_logprobs": 2}, "top_logprobs 2: only valid with logprobs: true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs 21: must be less than or equal to 20"),
    ({"echo": True}, "echo: not supported by this endpoint; leave it out"),
    ({"best_of": 2}, "best_of: not supported by this endpoint"),
    ({"prompt": "x"}, "prompt: not supported by this endpoint"),
    ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs: not supported"),
    ({"response_format": 5}, 'response_format: its type must be "text", "json_object" or "json_schema"'),
    ({"response_format": {"type": "xml"}}, "response_format: its type must be"),
    ({"response_format": {"type": ["text"]}}, "response_format: its type must be"),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}},
     "response_format.schema: not supported with type 'json_object'"),
    ({"response_format": {"type": "json_schema"}}, "response_format: has no schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": "x"}}}, "response_format: has no schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "word"}}}},
     "response_format: the JSON schema cannot be enforced (Invalid type: word)"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {"type": "string"}}}}},
     'response_format: the JSON schema cannot be enforced (Unimplemented keys: ["not"])'),
    ({"response_format": {"type": "json_schema",
                          "json_schema": {"schema": {"not": {}, "x-guidance": {"lenient": True}}}}},
     "response_format: the JSON schema cannot be enforced (Unimplemented keys"),
    ({"response_format": JSON_SCHEMA, "min_tokens": 3}, "min_tokens: not valid with a JSON format"),
    ({"messages": None}, "messages: missing"),
    ({"messages": []}, "messages: empty"),
    ({"messages": "x"}, "messages: must be a list of"),
    ({"messages": [5]}, "messages: must be a list of"),
    ({"messages": [{"content": "x"}]}, "messages, message 0: has no role"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages, message 0: role 'tool'; must be one of developer"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages, message 0: role ['user']"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages, message 0: content is int"),
    ({"messages": [{"role": "user", "content": [{"text": "x"}]}]},
     "messages, message 0: content part 0 (type None)"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]},
     "messages, message 0: content part 0 (type 'text')"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages, message 0: content part 0 (type 'image_url')"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [5]}]}, "messages, message 0: tool_calls"),
    ({"messages": replied(content="", refusal="No")}, "messages, message 1: refusal "),
    ({"messages": replied(content="Yes", weight=1)}, "messages, message 1: weight "),
]  # fmt: skip
OF_COMPLETIONS = [
    ({"max_tokens": -1}, "max_tokens -1: must be greater than or equal to 0"),
    ({"max_tokens": 0}, "max_tokens 0: only valid with echo: true"),
    ({"best_of": 2}, "best_of 2: must be equal to n, 1"),
    ({"best_of": 1, "n": 2}, "best_of 1: must be equal to n, 2"),
    ({"logprobs": True}, "logprobs True: must be a valid integer"),
    ({"logprobs": 21}, "logprobs 21: must be less than or equal to 20"),
    ({"suffix": "x"}, "suffix: not supported by this server; leave it out"),
    ({"response_format": {"type": "json_object"}}, "response_format: not supported by this endpoint"),
    ({"prompt": None}, "prompt: missing"),
    ({"prompt": []}, "prompt []: must be a string, a list of token ids, or a list of up to 128 of these"),
    ({"prompt": ["x"] * 129}, "prompt ['x', 'x'"),
    ({"prompt": 5}, "prompt 5: must be a string"),
    ({"prompt": [1, 512]}, "prompt [1, 512]: must be a string or a list of token ids from 0 to 511"),
    ({"prompt": [1, True]}, "prompt [1, True]: "),
    ({"prompt": [[1], []]}, "prompt []: "),
    ({"prompt": ["x", None]}, "prompt None: "),
    ({"prompt": [1] * CONTEXT}, "prompt: 400 tokens plus 1 new tokens exceed the context of 400"),
    ({"prompt": [1] * (CONTEXT + 1), "max_tokens": 0, "echo": True}, "prompt: 401 tokens plus 0 new tokens"),
]
OF_RESPONSES = [
    ({"max_output_tokens": 0}, "max_output_tokens 0: must be greater"),
    ({"max_tokens": 3}, "max_tokens: not supported by this endpoint"),
    ({"stop": "x"}, "stop: not supported by this endpoint"),
    ({"n": 2}, "n: not supported by this endpoint"),
    ({"instructions": 5}, "instructions 5: must be a valid string"),
    ({"previous_response_id": "x"}, "previous_response_id: not supported by this server"),
    ({"conversation": "x"}, "conversation: not supported by this server"),
    ({"background": True}, "background: not supported by this server"),
    ({"include": ["x"]}, "include: not supported by this server"),
    ({"prompt": {"id": "x"}}, "prompt: not supported by this endpoint"),
    ({"truncation": "auto"}, "truncation: "),
    ({"top_logprobs": 2}, "top_logprobs: "),
    ({"reasoning": {"effort": "low"}}, "reasoning: "),
    ({"metadata": {"a": 5}}, "metadata.a 5: must be a valid string"),
    ({"metadata": {"a": "x" * 513}}, "metadata.a 'x"),
    ({"metadata": dict.fromkeys(map(str, range(17)), "x")}, "metadata {'0'"),
    ({"text": {"format": {"type": "json_schema"}}}, "text.format: has no schema"),
    ({"text": {"verbosity": "low"}}, "text.verbosity 'low': must be 'medium'"),
    ({"text": {"foo": 1}}, "text.foo 1: not supported by this server"),
    ({"input": None}, "input: missing"),
    ({"input": 5}, "input: must be a list of"),
    ({"input": [5]}, "input: must be a list of"),
    ({"input": [{"type": "function_call"}]}, "input, message 0: type 'function_call'"),
    ({"input": [{"type": "reasoning", "role": "user", "content": "x"}]}, "input, message 0: type 'reasoning' not"),
    ({"instructions": "A", "input": [{"role": "system", "content": "B"}, USER]},
     "messages: turn 0 has the role 'system'"),
]  # fmt: skip
REFUSED = [
    *((kind, *case) for kind in PROMPTS for case in OF_ALL),
    *((kind, *case) for kind in ("chat", "completion") for case in OF_SAMPLED),
    *(("chat", *case) for case in OF_CHAT),
    *(("completion", *case) for case in OF_COMPLETIONS),
    *(("response", *case) for case in OF_RESPONSES),
]


@pytest.mark.parametrize(("kind", "body", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_refused(reader, kind, body, message):
    """The message and `param` name the field; of a body that is not an object, `param` is null."""
    found = refusal(reader, kind, body)
    assert found.message.startswith(message)
    if message.startswith("body: "):
        assert found.param is None
    else:
        assert found.param in PROMPTS[kind] or message.startswith(found.param)


ACCEPTED = [
    *((kind, dict.fromkeys(ALL_NULL.split())) for kind in PROMPTS),
    ("chat", {"modalities": ["text"], "verbosity": "medium", "reasoning_effort": "none"}),
    ("chat", {"functions": [], "function_call": "none", "response_format": {"type": "text"}}),
    ("chat", {"stream_options": {}, "top_k": -1, "min_tokens": 0, "store": True, "metadata": {"a": "b"}}),
    ("completion", {"suffix": "", "presence_penalty": 0.0, "stop": [], "logit_bias": {}}),
    ("response", {"tools": [], "tool_choice": "auto", "truncation": "disabled", "background": False, "store": True,
                  "parallel_tool_calls": True, "text": {"format": {"type": "text"}}, "include": [], "top_logprobs": 0,
                  "previous_response_id": None, "reasoning": None, "max_tool_calls": None, "n": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "body"), ACCEPTED, ids=lambda value: str(value)[:40])
def test_defaults_that_are_spelled_out(reader, kind, body):
    """They give the same row as a request without them."""
    assert row(reader, kind, **body) == row(reader, kind)


# Each field that changes a row, with what it changes.
SETTINGS = {
    "temperature": (1.7, {"temperature": 1.7}),
    "top_p": (0.1, {"top_p": 0.1}),
    "top_k": (3, {"top_k": 3}),
    "min_p": (0.2, {"min_p": 0.2}),
    "repetition_penalty": (1.4, {"repetition_penalty": 1.4}),
    "presence_penalty": (-2, {"presence_penalty": -2}),
    "frequency_penalty": (0.5, {"frequency_penalty": 0.5}),
    "logit_bias": ({"7": 3.5, "9": -100}, {"logit_bias": {7: 3.5, 9: -100.0}}),
    "min_tokens": (2, {"min_new_tokens": 2}),
    "draft": (False, {"is_drafted": False}),
    "seed": (2**64 - 1, {"seed": 2**64 - 1}),
    "stop": (["the", "q"], {"stop_strings": ("the", "q")}),
    "max_tokens": (2, {"max_new_tokens": 2}),
    "max_completion_tokens": (2, {"max_new_tokens": 2}),
    "max_output_tokens": (2, {"max_new_tokens": 2}),
}
ABSENT = {
    "chat": {"max_output_tokens"},
    "completion": {"max_completion_tokens", "max_output_tokens"},
    "response": {"max_tokens", "max_completion_tokens", "stop", "presence_penalty", "frequency_penalty", "logit_bias"},
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_each_field_reaches_the_row(reader, kind):
    plain = row(reader, kind)
    assert plain["temperature"] == 0.8 and plain["top_p"] == 0.95 and plain["seed"] is None
    for name, (value, wanted) in SETTINGS.items():
        if name not in ABSENT[kind]:
            assert row(reader, kind, **{name: value}) == {**plain, **wanted}, name
        else:
            found = refusal(reader, kind, {name: value})
            assert found.message.startswith(f"{name}: not supported") and found.param == name


def test_the_tables_have_all_fields():
    """Those that are not in `SETTINGS` have tests of their own below."""
    others = {
        *("model", "stream", "stream_options", "parallel_tool_calls", "n", "best_of", "echo", "logprobs"),
        *("top_logprobs", "response_format", "text", "instructions", "metadata"),
    }
    assert SETTINGS.keys() | others == set().union(*(each.model_fields for each in request_fields._FIELDS.values()))


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_stream(reader, kind):
    for usage in (True, False, None):
        call = read(reader, kind, {"stream": True, "stream_options": {"include_usage": usage}})
        assert call.is_streamed and call.has_usage == bool(usage) and call.kind == kind
    assert not read(reader, kind, {"stream": False}).is_streamed


def test_the_model(reader):
    for kind in PROMPTS:
        assert read(reader, kind, {"model": "my-model"}) == read(reader, kind, {"model": None})
        for other in ("gpt", ""):
            with pytest.raises(Refusal) as found:
                read(reader, kind, {"model": other})
            assert (found.value.status, found.value.code, found.value.param) == (404, "model_not_found", "model")
            assert repr(other) in found.value.message and "'my-model'" in found.value.message


def test_log_probabilities(reader):
    def asked(kind, **body):
        found = row(reader, kind, **body)
        return found["top_logprobs"], found["scores_prompt"]

    assert asked("chat") == asked("chat", logprobs=False) == asked("completion", echo=True) == (None, False)
    assert asked("chat", logprobs=True) == asked("completion", logprobs=0) == (0, False)
    assert asked("chat", logprobs=True, top_logprobs=20) == asked("completion", logprobs=20) == (20, False)
    assert asked("completion", logprobs=0, echo=True) == (0, True)
    assert asked("completion", logprobs=1, echo=True, max_tokens=0) == (1, True)


def test_what_lm_eval_sends(reader, local):
    """Prompts as token ids, of which only the log-probabilities matter, even where they fill the context."""
    prompts = [[1, 403, 407], [1] * CONTEXT]
    body = {"model": "my-model", "prompt": prompts, "max_tokens": 0, "logprobs": 1, "seed": 1234, "echo": True}
    call = read(reader, "completion", {**body, "temperature": 0})
    assert [list(each.ids) for each in call.rows] == prompts and call.prompt_tokens == 3 + CONTEXT
    assert [each.max_new_tokens for each in call.rows] == [0, 0] and all(each.scores_prompt for each in call.rows)
    assert call.prompt_texts[0] == local[1].decode(prompts[0], skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_several_replies(reader, kind):
    """`n` replies to each prompt in turn; each prompt is counted once."""
    one, call = read(reader, kind, {}), read(reader, kind, {"n": 3, "seed": 5})
    assert [each.place for each in call.rows] == [0, 1, 2] and {each.seed for each in call.rows} == {5}
    assert {each.ids for each in call.rows} == {one.rows[0].ids} and call.prompt_tokens == one.prompt_tokens
    assert len(read(reader, kind, {"n": 8}).rows) == 8
    if kind == "completion":
        call = read(reader, kind, {"prompt": ["a", "b c"], "n": 2, "best_of": 2, "echo": True})
        assert call.prompt_texts == ["a", "a", "b c", "b c"] and [each.place for each in call.rows] == [0, 1, 2, 3]
        ids = [each.ids for each in call.rows]
        assert ids[0] == ids[1] != ids[2] == ids[3] and call.prompt_tokens == len(ids[0]) + len(ids[2])


def test_the_length_of_a_reply(reader, local):
    """All that is left of the context, or less; a request for more is cut, and so ends with `length`."""
    for kind, name in LENGTH.items():
        plain = row(reader, kind)
        room = CONTEXT - len(plain["ids"])
        assert plain["max_new_tokens"] == row(reader, kind, **{name: 10_000})["max_new_tokens"] == room
        short = RequestReader("my-model", local[1], Limits.of(*local, new_tokens=7))
        assert row(short, kind)["max_new_tokens"] == row(short, kind, **{name: 9})["max_new_tokens"] == 7
        assert row(short, kind, **{name: 5})["max_new_tokens"] == 5
    assert row(reader, prompt=[1] * (CONTEXT - 1), max_tokens=5)["max_new_tokens"] == 1
    assert refusal(reader, "completion", {"prompt": [1] * CONTEXT}).code == "context_length_exceeded"


def test_messages_quote_a_part_of_a_long_value(reader):
    for body in ({"temperature": "Once " * 9_999}, {"stop": ["x"] * 9_999}, {"k" * 9_999: 1}):
        found = refusal(reader, "completion", body)
        assert len(found.message) < (1_100 if "k" * 99 in found.message else 400) and "..." in found.message
        assert found.message.startswith(found.param[:100])
    assert refusal(reader, "completion", {"logit_bias": {"9" * 5_000: 1}}).param == "logit_bias"


def test_limits(local):
    """`options` replace the limits that follow from the context; a draft may have a shorter one."""
    draft = Proposer()
    draft.context = 100
    limits = Limits.of(*local)
    assert (limits.context, limits.messages, limits.new_tokens, limits.vocab_size) == (CONTEXT, CONTEXT, CONTEXT, 512)
    assert limits.characters == CONTEXT * max(map(len, local[1].get_vocab()))
    assert Limits.of(*local, draft).context == 100
    small = RequestReader("my-model", local[1], Limits.of(*local, prompts=2, n=1, messages=3, characters=20))
    assert len(read(small, "completion", {"prompt": ["a", "b"]}).rows) == 2
    assert refusal(small, "completion", {"prompt": ["a", "b", "c"]}).param == "prompt"
    assert refusal(small, "completion", {"n": 2}).param == "n"
    assert refusal(small, "completion", {"prompt": "a" * 21}).code == "context_length_exceeded"
    assert refusal(small, "chat", {"messages": [USER] * 4}).message == "messages: 4 messages; must be at most 3"


def test_what_is_too_long_is_refused_before_it_is_encoded(reader, monkeypatch):
    """Megabytes take seconds."""
    monkeypatch.setattr(prompt_reading, "chat_ids", None)
    monkeypatch.setattr(reader, "_tokenizer", None)
    long, part = "Once " * 200_000, {"type": "text", "text": ""}
    for kind, body in (
        ("completion", {"prompt": long}),
        ("completion", {"prompt": [long, "x"]}),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "text", "text": long}]}]}),
        ("response", {"input": long}),
        ("response", {"input": "x", "instructions": long}),
        ("chat", {"messages": [{"role": "user", "content": [part] * 100_000}]}),
    ):
        found = refusal(reader, kind, body)
        assert " characters; must be at most " in found.message and found.code == "context_length_exceeded"
        assert found.param in body
    for number in (CONTEXT + 1, 100_000):
        found = refusal(reader, "chat", {"messages": [USER] * number})
        assert f"{number} messages; must be at most {CONTEXT}" in found.message
        assert refusal(reader, "response", {"input": [part] * number}).param == "input"


def test_equivalent_forms_of_a_prompt(reader, local):
    def ids(kind="chat", **body):
        return list(row(reader, kind, **body)["ids"])

    hello = chat_ids([USER], local[1])
    assert ids(messages=[USER]) == ids("response", input="Hello") == ids("response", input=[USER]) == hello
    assert ids("response", input=[{"type": "input_text", "text": "Hello"}]) == hello
    brief = chat_ids([BRIEF, USER], local[1])
    assert ids("response", instructions="Be brief.", input="Hello") == brief != hello
    assert ids("response", input=[{**BRIEF, "role": "developer"}, USER]) == brief
    sent_back = {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
                 "content": [{"type": "output_text", "text": "Yes", "annotations": []}]}  # fmt: skip
    assert ids("response", input=[USER, sent_back, USER]) == chat_ids(replied(content="Yes"), local[1])
    text = local[1]("def f</s>", split_special_tokens=True)["input_ids"]
    assert ids("completion", prompt="def f</s>") == ids("completion", prompt=["def f</s>"]) == text
    assert ids("completion", prompt=text) == ids("completion", prompt=[text]) == text and 2 not in text


def test_a_prompt_without_tokens(local):
    """A tokenizer without a begin-of-sequence token gives none for an empty text."""
    reader = RequestReader("my-model", lambda text, **_: {"input_ids": []}, Limits.of(*local))
    assert refusal(reader, "completion", {"prompt": ""}).message.startswith("prompt: empty, and this tokenizer has no")


def test_a_base_model_has_no_chat(local):
    model, tokenizer = local
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        reader = RequestReader("my-model", tokenizer, Limits.of(model, tokenizer))
        assert "has no chat template" in refusal(reader, "chat", {}).message
        assert read(reader, "completion", {}).rows
    finally:
        tokenizer.chat_template = template


def test_what_an_answer_repeats(reader):
    body = {"instructions": "A", "metadata": {"a": "b"}, "temperature": 0, "max_output_tokens": 3, "seed": 1}
    assert read(reader, "response", {**body, "top_p": None}).given == {k: body[k] for k in body if k != "seed"}
    assert read(reader, "chat", {"metadata": {"a": "b"}, "temperature": 0}).given == {}


def test_json_formats(reader):
    flat = {"type": "json_schema", "name": "x", "schema": SCHEMA}
    grammars = {
        row(reader, "chat", response_format=JSON_SCHEMA)["grammar"],
        row(reader, "chat", response_format={**JSON_SCHEMA, "json_schema": {"schema": SCHEMA, "strict": False}})[
            "grammar"
        ],
        row(reader, "response", text={"format": flat, "verbosity": "medium"})["grammar"],
    }
    assert len(grammars) == 1 and '"integer"' in grammars.pop()
    for kind, body in (("chat", {"response_format": {"type": "json_object"}}),
                       ("response", {"text": {"format": {"type": "json_object"}}})):  # fmt: skip
        assert '"object"' in row(reader, kind, **body)["grammar"]
    assert row(reader, "chat")["grammar"] is None
