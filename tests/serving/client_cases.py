"""Requests as clients of OpenAI's API send them, each with its right value: what is generated, or the refusal.

A case is a body and what it must give: the start of the error message, or what differs from the defaults: settings of
each row, `prompts` (conversations or texts, one per row), `status` of a refusal, and fields of the call.
"""

from typing import Any, NamedTuple


USER = {"role": "user", "content": "Hello"}
BRIEF = {"role": "system", "content": "Be brief."}
FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


class Case(NamedTuple):
    """A request of one endpoint, `"chat"`, `"completion"` or `"response"`.

    Attributes:
        kind (`str`): the endpoint.
        body (`dict`): the request.
        message (`str`, *optional*): start of the message of a refusal; `None` if the request is accepted.
        rows (`dict`): attributes of each row that differ from a request without settings.
        prompts (`list`, *optional*): messages, text or ids of the prompt of each row.
        call (`dict`): attributes of the call that differ from a request without settings.
        status (`int`): of the answer.
    """

    kind: str
    body: dict[str, Any]
    message: str | None = None
    rows: dict[str, Any] = {}
    prompts: list[Any] | None = None
    call: dict[str, Any] = {}
    status: int = 200


def chat(
    message: str | None = None, *, status: int = 0, prompt: Any = None, call: Any = None, rows: Any = None, **body
):
    """A case of `/v1/chat/completions`."""
    status = status or (400 if message else 200)
    prompts = None if message else [[USER] if prompt is None else prompt]
    whole = {"messages": [USER], "max_tokens": 6, "temperature": 0, **body}
    settled = {"max_new_tokens": 6, "temperature": 0, **(rows or {})}
    return Case("chat", whole, message, settled, prompts, call or {}, status)


def replied(**fields):
    """The messages of a conversation whose reply has these fields."""
    return [USER, {"role": "assistant", **fields}, USER]


ALL_NULL = (
    "stop temperature top_p n seed logit_bias tools tool_choice response_format stream stream_options user logprobs "
    "presence_penalty frequency_penalty top_logprobs parallel_tool_calls reasoning_effort metadata store modalities "
    "prediction audio service_tier max_completion_tokens functions function_call web_search_options top_k min_p "
    "generation_config repetition_penalty min_tokens model"
)
YES = [USER, {"role": "assistant", "content": "Yes"}, USER]
CHAT = {
    "nulls": chat(**dict.fromkeys(ALL_NULL.split()), rows={"temperature": 0.8}),
    "list content": chat(
        messages=[{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}],
        prompt=[{"role": "user", "content": "Hel lo"}],
    ),
    "string content": chat(),
    "system list": chat(
        messages=[{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, USER], prompt=[BRIEF, USER]
    ),
    "developer": chat(messages=[{**BRIEF, "role": "developer"}, USER], prompt=[BRIEF, USER]),
    "system": chat(messages=[BRIEF, USER], prompt=[BRIEF, USER]),
    "max_completion_tokens": chat(max_tokens=None, max_completion_tokens=3, rows={"max_new_tokens": 3}),
    "both max": chat("max_tokens, max_completion_tokens: both limit the reply", max_completion_tokens=3),
    "max_tokens 0": chat("max_tokens 0: must be greater than or equal to 1", max_tokens=0),
    "max_tokens -1": chat("max_tokens -1: ", max_tokens=-1),
    "stop empty list": chat(stop=[]),
    "stop empty str": chat("stop '': must be a non-empty string", stop=""),
    "stop str": chat(stop="h", rows={"stop_strings": ("h",)}),
    "logit_bias": chat(logit_bias={"50": 100}, rows={"logit_bias": {50: 100.0}}),
    "logit_bias int keys float": chat(logit_bias={"50": -100.0}, rows={"logit_bias": {50: -100.0}}),
    "stream_options no stream": chat("stream_options.include_usage True: ", stream_options={"include_usage": True}),
    "n1": chat(n=1),
    "top_p 0": chat(top_p=0, rows={"top_p": 0}),
    "temperature int str": chat("temperature '0.5': must be a valid number", temperature="0.5"),
    "tool_choice none": chat(tool_choice="none"),
    "tool_choice auto tools []": chat(tool_choice="auto", tools=[], parallel_tool_calls=True),
    "response_format text": chat(response_format={"type": "text"}),
    "assistant null content": chat(
        "messages, message 1: content is null", messages=replied(content=None, tool_calls=None)
    ),
    "assistant refusal null": chat(
        messages=replied(content="Yes", refusal=None, annotations=[], audio=None, function_call=None, tool_calls=None),
        prompt=YES,
    ),
    "assistant extra": chat(messages=replied(content="Yes", refusal=None, reasoning_content=""), prompt=YES),
    "name": chat(messages=[{**USER, "name": "bob"}]),
    "two user": chat("messages: turn 1 has the role 'user'", messages=[USER, USER]),
    "last assistant prefix": chat(
        "messages end with the role 'assistant'", messages=[USER, {"role": "assistant", "content": "Well"}]
    ),
    "two system": chat(
        "messages: turn 0 has the role 'system'",
        messages=[{"role": "system", "content": "A"}, {"role": "system", "content": "B"}, USER],
    ),
    "empty content": chat(messages=[{"role": "user", "content": ""}], prompt=[{"role": "user", "content": ""}]),
    "other model": chat("model 'gpt-3.5-turbo': not served here", model="gpt-3.5-turbo", status=404),
    "tools": chat("tools: not supported by this server; leave it out", tools=[FUNCTION]),
    "logprobs false": chat(logprobs=False, top_logprobs=0),
    "logprobs true": chat(logprobs=True, top_logprobs=2, rows={"top_logprobs": 2}),
    "unknown vllm": chat(repetition_penalty=1.1, top_k=5, rows={"repetition_penalty": 1.1, "top_k": 5}),
    "min_p": chat(min_p=0.1, rows={"min_p": 0.1}),
    "chat_template_kwargs": chat("chat_template_kwargs: ", chat_template_kwargs={"enable_thinking": False}),
    "ignore_eos": chat("ignore_eos: not supported by this server", ignore_eos=True),
    "stream usage": chat(
        stream=True, stream_options={"include_usage": True}, call={"is_streamed": True, "has_usage": True}
    ),
    "stream no usage": chat(stream=True, call={"is_streamed": True}),
}


def completion(message: str | None = None, *, prompts: Any = None, call: Any = None, rows: Any = None, **body):
    """A case of `/v1/completions`."""
    whole = {"prompt": "Once", "max_tokens": 6, "temperature": 0, **body}
    settled = {"max_new_tokens": 6, "temperature": 0, **(rows or {})}
    prompts = None if message else prompts or ["Once"]
    return Case("completion", whole, message, settled, prompts, call or {}, 400 if message else 200)


COMPLETIONS = {
    "list one": completion(prompt=["Once upon"], prompts=["Once upon"]),
    "list two": completion(prompt=["Once", "Two"], prompts=["Once", "Two"]),
    "ids": completion(prompt=[1, 403, 407], prompts=[[1, 403, 407]]),
    "echo": completion(echo=True, call={"prompt_texts": ["Once"]}),
    "echo false": completion(echo=False),
    "suffix null": completion(suffix=None, best_of=None, logprobs=None),
    "best_of 1": completion(best_of=1, n=1),
    "max_tokens null": completion(max_tokens=None, rows={"max_new_tokens": "room"}),
    "max_completion_tokens": completion("max_completion_tokens: not supported by this", max_completion_tokens=3),
    "empty": completion(prompt="", prompts=[""]),
    "none": completion("prompt: missing", prompt=None),
    "logprobs 0": completion(logprobs=0, rows={"top_logprobs": 0}),
    "default max": completion(max_tokens=None, rows={"max_new_tokens": "room"}),
}
SHARED_CASES = {**CHAT, **{f"completion, {name}": case for name, case in COMPLETIONS.items()}}
