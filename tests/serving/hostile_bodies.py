"""Bodies that no friendly client sends: large, deep, of wrong types, cut, or with schemas that are hard to follow."""

import json
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple


KINDS = {"chat": "messages", "completion": "prompt", "response": "input"}
FIELDS = (
    "model stream stream_options temperature top_p top_k min_p n best_of echo logprobs top_logprobs stop max_tokens "
    "max_completion_tokens max_output_tokens presence_penalty frequency_penalty logit_bias seed response_format text "
    "metadata instructions tools tool_choice functions user store suffix prompt messages input generation_config "
    "repetition_penalty min_tokens parallel_tool_calls previous_response_id modalities reasoning"
).split()
LARGE = 4_000_000  # bytes, below the largest body that a server reads


class HostileBody(NamedTuple):
    """A body, its endpoint, and what it tries."""

    name: str
    kind: str
    body: bytes


def hostile_bodies(number: int, seed: int = 0) -> Iterator[HostileBody]:
    """Yields bodies, always the same ones for a seed: first one of each large form, then random ones."""
    rng = random.Random(seed)
    forms = [(name, kind, make) for name, make in LARGE_FORMS.items() for kind in KINDS]
    for name, kind, make in forms[:number]:
        yield HostileBody(name, kind, make(kind))
    for _ in range(number - len(forms)):
        kind = rng.choice(list(KINDS))
        name, make = rng.choice(list(RANDOM_FORMS.items()))
        yield HostileBody(name, kind, make(rng, kind))


def body_of(kind: str, **fields: object) -> bytes:
    """Returns a valid body with other fields."""
    prompt = [{"role": "user", "content": "Hello"}] if kind == "chat" else "Hello"
    return json.dumps(
        {KINDS[kind]: prompt, "max_tokens" if kind != "response" else "max_output_tokens": 4} | fields
    ).encode()


def with_schema(kind: str, schema: object) -> bytes:
    """Returns a body that asks for JSON."""
    if kind == "response":
        return body_of(kind, text={"format": {"type": "json_schema", "name": "x", "schema": schema}})
    return body_of(kind, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})


def nested_schema(depth: int) -> object:
    """Returns a schema of objects in objects."""
    schema: object = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def _prompt(kind: str, prompt: object) -> bytes:
    return body_of(kind, **{KINDS[kind]: prompt})


def _raw(kind: str, field: str, value: bytes) -> bytes:
    return body_of(kind)[:-1] + b', "' + field.encode() + b'": ' + value + b"}"


def _text(kind: str, text: str) -> bytes:
    return _prompt(kind, [{"role": "user", "content": text}] if kind == "chat" else text)


EMPTY = {"role": "user", "content": ""}
LARGE_FORMS: dict[str, Callable[[str], bytes]] = {
    "empty messages": lambda kind: _prompt(kind, [EMPTY] * 100_000),
    "alternating messages": lambda kind: _prompt(kind, [EMPTY, {**EMPTY, "role": "assistant"}] * 50_000),
    "empty parts": lambda kind: _prompt(kind, [{"role": "user", "content": [{"type": "text", "text": ""}] * 90_000}]),
    "one letter": lambda kind: _text(kind, "a" * LARGE),
    "words": lambda kind: _text(kind, "Once upon " * (LARGE // 10)),
    "control tokens": lambda kind: _text(kind, "</s><|im_end|>" * (LARGE // 14)),
    "characters of four bytes": lambda kind: _text(kind, "\U0001f600" * (LARGE // 12)),
    "a long role": lambda kind: _prompt(kind, [{"role": "x" * LARGE, "content": "x"}]),
    "a long key of a message": lambda kind: _prompt(kind, [{"role": "user", "content": "x", "k" * LARGE: 1}]),
    "a long key": lambda kind: body_of(kind, **{"k" * LARGE: 1}),
    "many keys": lambda kind: body_of(kind, **{f"k{i}": 1 for i in range(200_000)}),
    "many nulls": lambda kind: body_of(kind, **{f"k{i}": None for i in range(200_000)}),
    "many ids": lambda kind: _prompt(kind, [1] * 1_000_000),
    "many wrong ids": lambda kind: _prompt(kind, [-1] * 900_000),
    "many prompts": lambda kind: _prompt(kind, ["x"] * 700_000),
    "many lists": lambda kind: _prompt(kind, [[]] * 900_000),
    "many biases": lambda kind: body_of(kind, logit_bias={str(i): 1 for i in range(300_000)}),
    "many wrong biases": lambda kind: body_of(kind, logit_bias={str(i): "x" for i in range(300_000)}),
    "many stops": lambda kind: body_of(kind, stop=["x"] * 700_000),
    "a long stop": lambda kind: body_of(kind, stop="x" * LARGE),
    "many stream options": lambda kind: body_of(kind, stream_options={f"k{i}": 1 for i in range(250_000)}),
    "much metadata": lambda kind: body_of(kind, metadata={f"k{i}": 1 for i in range(250_000)}),
    "a long option": lambda kind: body_of(kind, stream_options={"k" * LARGE: 1}),
    "a long model": lambda kind: body_of(kind, model="m" * LARGE),
    "long instructions": lambda kind: body_of(kind, instructions="x " * (LARGE // 2)),
    "a long number": lambda kind: _raw(kind, "seed", b"9" * LARGE),
    "4,000 digits": lambda kind: _raw(kind, "max_tokens", b"9" * 4_000),
    "4,000 digits of a bias": lambda kind: body_of(kind, logit_bias={"9" * 4_000: 1}),
    "brackets": lambda kind: _raw(kind, "stop", b"[" * LARGE),
    "closed brackets": lambda kind: _raw(kind, "stop", b"[" * 100_000 + b"]" * 100_000),
    "objects in objects": lambda kind: _raw(kind, "metadata", b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "white space": lambda kind: b" " * LARGE + body_of(kind),
    "a zero byte per byte": lambda kind: body_of(kind).decode().encode("utf-16"),
    "duplicate keys": lambda kind: body_of(kind)[:-1] + b', "n": 1' * 300_000 + b"}",
    "a schema with many properties": lambda kind: with_schema(
        kind, {"type": "object", "properties": {f"k{i}": {"type": "integer"} for i in range(100_000)}}
    ),
    "a schema with many values": lambda kind: with_schema(kind, {"enum": [f"value {i}" for i in range(200_000)]}),
    "a deep schema": lambda kind: with_schema(kind, nested_schema(80)),
    "a schema of choices": lambda kind: with_schema(
        kind, {"anyOf": [{"type": "object", "properties": {f"k{i}": {}}, "required": [f"k{i}"]} for i in range(9_999)]}
    ),
    "a schema with products of choices": lambda kind: with_schema(
        kind,
        {"allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {}}, "required": [f"a{i}{j}"]} for j in range(10)]}
                   for i in range(10)]},
    ),
    "a schema that refers to itself": lambda kind: with_schema(kind, {"$ref": "#"}),
    "a schema without end": lambda kind: with_schema(
        kind, {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
    ),
    "a schema elsewhere": lambda kind: with_schema(kind, {"$ref": "http://127.0.0.1:1/x.json"}),
    "a schema with a large number": lambda kind: with_schema(kind, {"type": "string", "maxLength": 10**30}),
    "a schema with infinity": lambda kind: with_schema(kind, {"minimum": 1}).replace(b": 1}", b": 1e999}"),
    "a schema of powers": lambda kind: with_schema(
        kind, {"type": "string", "pattern": "^((((a{1,1000}){1,1000}){1,1000}){1,1000})$"}
    ),
    "a schema with an exponential pattern": lambda kind: with_schema(
        kind, {"type": "string", "pattern": "^(a|b)*a(a|b){2000}$"}
    ),
    "a schema with a long pattern": lambda kind: with_schema(kind, {"type": "string", "pattern": "(" * 1_000_000}),
    "a schema of patterns": lambda kind: with_schema(
        kind, {"allOf": [{"type": "string", "pattern": f"^.*{chr(97 + i % 26)}.*$"} for i in range(1_000)]}
    ),
    "a schema with own options": lambda kind: with_schema(
        kind, {"type": "object", "x-guidance": {"whitespace_pattern": "(" * 1000, "lenient": True}}
    ),
}  # fmt: skip


def _value(rng: random.Random, depth: int = 0) -> object:
    """Returns a random value of JSON."""
    kind = rng.randrange(14 if depth < 6 else 11)
    if kind >= 11:
        size = rng.choice((0, 1, 1, 2, 3, 40))
        if kind == 11:
            return [_value(rng, depth + 1) for _ in range(size)]
        return {_word(rng): _value(rng, depth + 1) for _ in range(size)}
    numbers = (0, 1, -1, 2, 20, 2**31, 2**63, 2**64, -(2**70), 0.5, 1e-9, 1e308, -0.0)
    texts = ("", "a", "\0", "</s>", "\u202e", "x" * rng.randrange(300), "text", "user", "json_object", "5", "\ufffd")
    return (None, True, False, rng.choice(numbers), rng.choice(numbers), rng.random() * 3, rng.choice(texts),
            rng.choice(texts), _word(rng), [], {})[kind]  # fmt: skip


def _word(rng: random.Random) -> str:
    words = (*FIELDS, "role", "content", "type", "text", "format", "json_schema", "schema", "strict", "include_usage")
    return rng.choice(words) if rng.random() < 0.8 else "".join(rng.choices("ab_1\u00e9 \0", k=rng.randrange(6)))


def _schema(rng: random.Random, depth: int = 0) -> object:
    """Returns a random JSON schema, often an invalid one."""
    if rng.random() < 0.1:
        return _value(rng, 4)
    if depth > 4 or rng.random() < 0.4:
        return rng.choice([
            {"type": "string", "maxLength": rng.choice((0, 3, 10**9, -1, 1.5))},
            {"type": "integer", "minimum": rng.randrange(-5, 5), "maximum": rng.randrange(-5, 99)},
            {"type": "number", "exclusiveMinimum": rng.choice((0, 0.1, 1e-9)), "multipleOf": rng.choice((1, 0.1, 0))},
            {"enum": [_value(rng, 5) for _ in range(rng.randrange(4))]},
            {"const": _value(rng, 4)},
            {"type": "string", "pattern": rng.choice(("^a+$", "(", r"\d{3,}", "(?=a)", "a{999}", "^$", r"\p{L}"))},
            {"type": "string", "format": rng.choice(("date", "uuid", "foo", "email", "ipv6"))},
            {"$ref": rng.choice(("#", "#/$defs/a", "#/properties/text", "x.json", ""))},
            {"type": rng.choice(("null", "boolean", "word", ["string", "null"], [], 5))},
            True, False, {},
        ])  # fmt: skip
    inner = [_schema(rng, depth + 1) for _ in range(rng.randrange(1, 4))]
    return rng.choice([
        {"type": "object", "properties": dict(zip(("a", "text", ""), inner, strict=False)),
         "required": rng.choice(([], ["a"], ["b"], "a")), "additionalProperties": rng.choice((False, True, inner[0]))},
        {"type": "array", "items": inner[0], "minItems": rng.choice((0, 2, 10**6)), "maxItems": rng.choice((3, 99))},
        {"prefixItems": inner},
        {rng.choice(("anyOf", "oneOf", "allOf", "not", "$defs", "if")): inner},
        {"type": "object", "patternProperties": {rng.choice(("^a", "(", ".*")): inner[0]}},
    ])  # fmt: skip


def _fields(rng: random.Random, kind: str) -> bytes:
    return body_of(kind, **{rng.choice(FIELDS): _value(rng) for _ in range(rng.randrange(1, 4))})


def _conversation(rng: random.Random, kind: str) -> bytes:
    roles = ("user", "assistant", "system", "developer", "tool", 5, None)
    turns = [
        _value(rng)
        if rng.random() < 0.2
        else {"role": rng.choice(roles), "content": _value(rng, 3), _word(rng): _value(rng, 4)}
        for _ in range(rng.choice((0, 1, 2, 3, 399, 401)))
    ]
    return _prompt(kind, turns)


def _damaged(rng: random.Random, kind: str) -> bytes:
    body = bytearray(_fields(rng, kind))
    for _ in range(rng.randrange(1, 5)):
        place = rng.randrange(len(body))
        body[place : place + rng.randrange(3)] = rng.randbytes(rng.randrange(4))
    return bytes(body[: rng.randrange(len(body) + 1)]) if rng.random() < 0.3 else bytes(body)


def _noise(rng: random.Random, kind: str) -> bytes:
    return bytes(rng.choices(b'[]{}",:0123456789.eE-+ntfu\\ \xff\0', k=rng.randrange(2_000)))


RANDOM_FORMS: dict[str, Callable[[random.Random, str], bytes]] = {
    "random fields": _fields,
    "a random conversation": _conversation,
    "a random prompt": lambda rng, kind: _prompt(kind, _value(rng)),
    "a random schema": lambda rng, kind: with_schema(kind, _schema(rng)),
    "a random value": lambda rng, kind: json.dumps(_value(rng)).encode(),
    "nesting": lambda rng, kind: _raw(kind, rng.choice(FIELDS), b"[" * (d := rng.randrange(190, 210)) + b"]" * d),
    "a large random field": lambda rng, kind: body_of(kind, **{rng.choice(FIELDS): [_value(rng, 4)] * 2_000}),
    "a damaged body": _damaged,
    "noise": _noise,
}
