"""Keys of messages in data files: their effect, and errors for keys without one."""

import pytest

from tinyllama_hf.chat.messages import is_learned, read_messages
from tinyllama_hf.errors import InputError


USER = {"role": "user", "content": "Hi"}


def replies(**keys) -> list[dict]:
    return [USER, {"role": "assistant", "content": "Hello", **keys}]


@pytest.mark.parametrize(
    ("keys", "learned"),
    [
        ({}, True), ({"weight": 1}, True), ({"weight": 1.0}, True), ({"train": True}, True), ({"weight": None}, True),
        ({"weight": 0}, False), ({"weight": 0.0}, False), ({"train": False}, False), ({"training": False}, False),
        ({"weight": 0, "train": False}, False), ({"tool_calls": [], "name": ""}, True),
    ],
)  # fmt: skip
def test_keys_that_mark_replies_to_train_on(keys, learned):
    messages = read_messages(replies(**keys), "row 1")
    assert messages == [USER, {"role": "assistant", "content": "Hello", **({} if learned else {"weight": 0})}]
    assert [is_learned(message) for message in messages] == [False, learned]


def test_parts_of_text_are_joined_as_by_the_server():
    parts = [{"type": "text", "text": "one"}, {"type": "input_text", "text": "two"}]
    assert read_messages([{"role": "user", "content": parts}], "row 1") == [{"role": "user", "content": "one two"}]


REFUSED = {
    "an unknown key": (replies(name="Ann"), "row 1, message 1: key 'name' not supported"),
    "a misspelt key": (replies(wieght=0), "did you mean 'weight'"),
    "calls of tools": (replies(tool_calls=[{"id": "1"}]), "message 1: key 'tool_calls'"),
    "half a weight": (replies(weight=0.5), "message 1: 'weight' is 0.5; must be 0 or 1"),
    "a weight of another type": (replies(weight=False), "'weight' is False; must be 0 or 1"),
    "train of another type": (replies(train=0), "'train' is 0; must be false or true"),
    "a contradiction": (replies(weight=1, train=False), "'weight' and 'train' contradict"),
    "a question to learn": ([{**USER, "train": True}], "message 0: 'train' is True for the role 'user'"),
    "no content": ([{"role": "assistant", "content": None}], "message 0: content is null"),
    "content of another type": ([{"role": "user", "content": 3}], "message 0: content is int"),
    "a picture": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
        "message 0: content part 0 .*'image_url'",
    ),
    "a list of texts": ([{"role": "user", "content": ["a"]}], "content part 0 .*'str'"),
    "a string": ("x", "row 1: not a list of messages"),
    "an object": ({"messages": []}, "row 1: not a list of messages"),
    "a list of strings": (["a"], "row 1: not a list of messages"),
}


@pytest.mark.parametrize(("messages", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(messages, message):
    with pytest.raises(InputError, match=message):
        read_messages(messages, "row 1")


def test_a_question_that_is_not_learned_is_as_any_other():
    assert read_messages([{**USER, "weight": 0}], "row 1") == [USER]
