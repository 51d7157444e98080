"""Bodies that are meant to cost a server time or memory, for serving_hours.py."""

import json
import random
from collections.abc import Iterator


def hostile_bodies(number: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yields the key of a path and a body."""
    draw = random.Random(seed)
    for _ in range(number):
        size = int(10 ** draw.uniform(0, 5))
        empty = {"role": "user", "content": ""}
        deep = draw.choice((b"[" * size + b"]" * size, b'{"a":' * size + b"1" + b"}" * size, b"9" * size))
        bodies = (
            ("chat", json.dumps({"messages": [empty] * size}).encode()),
            ("responses", json.dumps({"input": [empty] * size}).encode()),
            (
                "chat",
                json.dumps(
                    {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * size}]}
                ).encode(),
            ),
            ("completions", json.dumps({"prompt": "a " * size, "max_tokens": 1}).encode()),
            ("completions", json.dumps({"prompt": ["a"] * size, "max_tokens": 1}).encode()),
            ("completions", json.dumps({"prompt": "a", "max_tokens": 1, "stop": ["b"] * size}).encode()),
            (
                "completions",
                json.dumps({"prompt": "a", "logit_bias": {str(i): 1 for i in range(size)}, "max_tokens": 1}).encode(),
            ),
            ("completions", b'{"prompt": %s}' % deep),
            ("chat", b'{"messages": [{"role": "user", "content": %s}]}' % deep),
            ("chat", bytes(draw.randrange(256) for _ in range(min(size, 2000)))),
        )
        yield draw.choice(bodies)
