"""Random requests of many kinds, for serving_hours.py."""

import random
from typing import Any, NamedTuple


SUBJECTS = ("rivers", "bread", "the moon", "a small dog", "old maps", "rain", "two brothers", "a long winter")
STOPS = (".", "\n", " the", ["and", "?"])
LENGTHS = (1, 4, 16, 48)  # new tokens
LONG_PROMPTS = 1 / 8  # share
LENGTH_FIELDS = {"chat": "max_tokens", "completion": "max_tokens", "response": "max_output_tokens"}
# What no server may answer with text, and on which path.
BAD_BODIES: tuple[tuple[str, Any], ...] = (
    ("chat", b"{"),
    ("chat", []),
    ("chat", {}),
    ("chat", {"messages": []}),
    ("chat", {"messages": "Hello"}),
    ("chat", {"messages": [{"role": "user"}]}),
    ("chat", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": -1}),
    ("chat", {"messages": [{"role": "user", "content": "Hello"}], "temperature": -1}),
    ("chat", {"messages": [{"role": "user", "content": "Hello"}], "model": "another-model"}),
    ("completion", {"prompt": {"text": "Hello"}}),
    ("completion", {"prompt": "Hello", "n": 1000}),
    ("completion", {"prompt": "Hello", "stop": 5}),
    ("completion", {"prompt": "word " * 100_000}),
    ("completion", {"prompt": [-1]}),
    ("response", {"input": 5}),
    ("response", {"input": "Hello", "previous_response_id": "resp_1"}),
)


class Planned(NamedTuple):
    """A request, and what may happen to it.

    Attributes:
        kind (`str`): for the summary.
        path (`str`): key of `PATHS`.
        body (`Any`): a JSON value, or bytes.
        is_bad (`bool`): whether it must be refused.
        leave_after (`int`, *optional*): the client leaves after this number of pieces.
        leave_seconds (`float`, *optional*): the client leaves after this time.
    """

    kind: str
    path: str
    body: Any
    is_bad: bool = False
    leave_after: int | None = None
    leave_seconds: float | None = None


def plan(draw: random.Random, model: str, long_words: int) -> Planned:
    """Returns a random request."""
    if draw.random() < 0.1:
        path, body = draw.choice(BAD_BODIES)
        return Planned("bad body", path, body, is_bad=True)
    path = draw.choice(tuple(LENGTH_FIELDS))
    body = {"model": model, **prompt(draw, path, long_words), LENGTH_FIELDS[path]: draw.choice(LENGTHS)}
    body |= {"temperature": 0} if draw.random() < 0.5 else {"temperature": 0.9, "top_p": 0.9}
    is_streamed = draw.random() < 0.5
    if is_streamed:
        body |= streaming(path, has_usage=draw.random() < 0.5)
    if path != "response":
        body |= extras(draw, path)
    kind = f"{path}, {'stream' if is_streamed else 'whole'}"
    if draw.random() < 0.15:
        body |= {LENGTH_FIELDS[path]: LENGTHS[-1]}
        if is_streamed and draw.random() < 0.7:
            return Planned(f"{kind}, leaves after some tokens", path, body, leave_after=draw.randint(1, 10))
        return Planned(f"{kind}, leaves early", path, body, leave_seconds=draw.random() * 0.5)
    return Planned(kind, path, body)


def prompt(draw: random.Random, path: str, long_words: int) -> dict[str, Any]:
    """Returns the field with one of a few prompts, so that greedy requests repeat."""
    text = f"Tell me about {draw.choice(SUBJECTS)}"
    if draw.random() < LONG_PROMPTS:
        text += " and more" * (long_words // 2)
    field_values = {"chat": {"messages": [{"role": "user", "content": text}]}, "completion": {"prompt": text}}
    return field_values.get(path, {"input": text})


def extras(draw: random.Random, path: str) -> dict[str, Any]:
    """Returns optional fields of the two older endpoints."""
    fields: dict[str, Any] = {}
    if draw.random() < 0.2:
        fields["stop"] = draw.choice(STOPS)
    if draw.random() < 0.1:
        fields["n"] = 2
    if draw.random() < 0.15:
        fields |= {"logprobs": True, "top_logprobs": 2} if path == "chat" else {"logprobs": 2}
    return fields


def greedy(draw: random.Random, kind: str, model: str, tokens: int) -> Planned:
    """Returns a greedy request with a short prompt."""
    path = draw.choice(tuple(LENGTH_FIELDS))
    body = {"model": model, **prompt(draw, path, 0), "temperature": 0, LENGTH_FIELDS[path]: tokens}
    return Planned(kind, path, body | (streaming(path) if draw.random() < 0.5 else {}))


def streaming(path: str, has_usage: bool = True) -> dict[str, Any]:
    """Returns the fields of a stream; that of responses always has the usage."""
    options = {"stream_options": {"include_usage": True}} if has_usage and path != "response" else {}
    return {"stream": True, **options}
