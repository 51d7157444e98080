"""The formats of rows: each gives the messages that a person would write by hand, and others are refused."""

import json

import pytest
import yaml

from tests.conftest import ROOT
from tinyllama_hf.chat.messages import is_learned
from tinyllama_hf.errors import InputError
from tinyllama_hf.finetune.config import ConversationSource, load_finetune_config
from tinyllama_hf.finetune.conversations import read_conversations, read_sources


def talk(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def jsonl(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


SYSTEM = {"role": "system", "content": "Be brief."}
ROWS = {
    "messages": ({"messages": [SYSTEM, *talk("Q", "A")], "id": 3}, [SYSTEM, *talk("Q", "A")]),
    "messages, as in UltraChat": ({"prompt": "Q", "prompt_id": "7", "messages": talk("Q", "A")}, talk("Q", "A")),
    "messages, as in UltraFeedback": (
        {"prompt": "Q", "chosen": talk("Q", "A"), "rejected": talk("Q", "B"), "messages": talk("Q", "A")},
        talk("Q", "A"),
    ),
    "prompt/completion": ({"prompt": "Q", "completion": "A"}, talk("Q", "A")),
    "prompt/completion, lists": (
        {"prompt": [SYSTEM, *talk("Q", "A", "R")], "completion": [{"role": "assistant", "content": "B"}]},
        [SYSTEM, *talk("Q"), {"role": "assistant", "content": "A", "weight": 0}, *talk("R", "B")],
    ),
    "ShareGPT": (
        {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Q"},
                           {"from": "gpt", "value": "A", "weight": 0}, {"from": "user", "value": "R"},
                           {"from": "bing", "value": "B"}], "system": ""},
        [SYSTEM, *talk("Q"), {"role": "assistant", "content": "A", "weight": 0}, *talk("R", "B")],
    ),
    "Alpaca": ({"instruction": "Add.", "input": "1, 2", "output": "3", "text": "Below is"}, talk("Add.\n\n1, 2", "3")),
    "Alpaca, empty input": ({"instruction": "Greet.", "input": "", "output": "Hi"}, talk("Greet.", "Hi")),
    "Alpaca, no input": ({"instruction": "Greet.", "output": "Hi"}, talk("Greet.", "Hi")),
}  # fmt: skip


@pytest.mark.parametrize(("name", "row", "messages"), [(k, *v) for k, v in ROWS.items()], ids=ROWS)
def test_each_format_gives_the_messages(tmp_path, name, row, messages):
    data = read_sources([ConversationSource(path=jsonl(tmp_path / "a.jsonl", row))])
    assert data.conversations[0].messages == messages
    assert data.sources[0].format == name.split(",")[0] and data.sources[0].num_rows == 1


@pytest.mark.parametrize("role", ["gpt", "assistant", "chatgpt", "bing", "model"])
def test_the_names_of_the_assistant(tmp_path, role):
    row = {"conversations": [{"from": "human", "value": "Q"}, {"from": role, "value": "A"}]}
    assert read_conversations(jsonl(tmp_path / "a.jsonl", row))[0].messages == talk("Q", "A")


def test_only_the_completion_is_learned(tmp_path):
    """As in TRL: replies in the prompt are context."""
    row = {"prompt": talk("Q", "A", "R"), "completion": talk("R", "B")[1:]}
    (conversation,) = read_conversations(jsonl(tmp_path / "a.jsonl", row))
    assert [message["content"] for message in conversation.messages if is_learned(message)] == ["B"]


MAPPED = {
    "a conversation under another name": ({"messages": "dialog"}, {"dialog": talk("Q", "A")}),
    "questions and answers": ({"prompt": "question", "completion": "answer"}, {"question": "Q", "answer": "A"}),
    "exchanged names": ({"prompt": "completion", "completion": "prompt"}, {"completion": "Q", "prompt": "A"}),
    "one name of several": ({"completion": "reply"}, {"prompt": "Q", "reply": "A"}),
    "a choice between two formats": (
        {"prompt": "prompt"},
        {"prompt": "Q", "completion": "A", "messages": talk("Other", "format")},
    ),
    "messages of ShareGPT's column": ({"messages": "conversations"}, {"conversations": talk("Q", "A")}),
    "a column that is refused under its own name": (
        {"prompt": "system", "completion": "a"},
        {"system": "Q", "a": "A"},
    ),
}


@pytest.mark.parametrize(("columns", "row"), MAPPED.values(), ids=MAPPED)
def test_columns_of_other_names(tmp_path, columns, row):
    source = ConversationSource(path=jsonl(tmp_path / "a.jsonl", row), columns=columns)
    assert read_sources([source]).conversations[0].messages == talk("Q", "A")


REFUSED = {
    "no format": ({"text": "a", "id": None}, "row 1: no known format: the columns with a value are text.*ShareGPT"),
    "not an object": (["a"], "row 1: type list; must be an object"),
    "two formats": (
        {"messages": talk("Q", "A"), "prompt": "Q", "completion": "A"},
        "row 1: has the columns of messages and of prompt/completion",
    ),
    "preferences": (
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        r"row 1: has the columns of preferences \(chosen, rejected\), which recipes/dpo.py reads, not recipes/sft.py",
    ),
    "messages as a string": ({"messages": "x"}, "row 1: not a list of messages"),
    "turns as a string": ({"conversations": "x"}, "row 1: conversations is not a list"),
    "a role of a tool": (
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "tool", "value": "A"}]},
        "row 1, message 1: unknown 'from' 'tool'; valid: human",
    ),
    "a role of another type": ({"conversations": [{"from": ["human"], "value": "Q"}]}, "message 0: unknown 'from'"),
    "messages in ShareGPT's column": (
        {"conversations": talk("Q", "A")},
        "row 1, message 0: no 'from' and 'value', only: role, content.*columns: {messages: conversations}",
    ),
    "a turn without text": (
        {"conversations": [{"from": "human", "value": None}]}, "row 1, message 0: content is null"),
    "another key of a turn": (
        {"conversations": [{"from": "human", "value": "Q", "name": "Ann"}]}, "row 1, message 0: key 'name'"),
    "an answer that is a number": ({"instruction": "Q", "output": 3}, "row 1, output: content is int"),
    "an empty answer": ({"instruction": "Q", "output": " "}, "row 1, message 1: the reply is empty"),
    "a prompt that is a number": ({"prompt": 3, "completion": "A"}, "row 1, prompt: not a list of messages"),
    "an earlier conversation": (
        {"instruction": "Q", "output": "A", "history": [["a", "b"]]}, "row 1: field 'history' is not supported"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        read_conversations(jsonl(tmp_path / "a.jsonl", row))


def test_a_mapped_column_that_a_row_lacks(tmp_path):
    source = ConversationSource(path=jsonl(tmp_path / "a.jsonl", {"messages": []}), columns={"messages": "talk"})
    with pytest.raises(
        InputError, match=r"row 1: no column 'talk' \(columns.messages of the recipe\), only: messages"
    ):
        read_sources([source])


@pytest.fixture
def load(tmp_path):
    values = yaml.safe_load((ROOT / "recipes" / "sft" / "full.yaml").read_text())

    def load(conversations):
        values["data"]["conversations"] = conversations
        (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
        return load_finetune_config(tmp_path / "a.yaml").data.conversations

    return load


def test_sources_in_a_recipe(load):
    first = ConversationSource(path="a.jsonl")
    second = ConversationSource(path="b.csv", weight=2.0, columns={"prompt": "question"})
    assert load("a.jsonl") == load(["a.jsonl"]) == load({"path": "a.jsonl"}) == [first]
    assert load(["a.jsonl", {"path": "b.csv", "weight": 2, "columns": {"prompt": "question"}}]) == [first, second]


BAD_SOURCES = {
    "none": ([], r"data.conversations: \[\]: list should have at least 1 item"),
    "a weight of 0": ([{"path": "a", "weight": 0}], r"conversations.0.weight: 0: input should be greater than 0"),
    "another key": ([{"path": "a", "wieght": 1}], r"conversations.0.wieght: unknown key; did you mean 'weight'"),
    "a typo": ([{"path": "a", "columns": {"messagez": "b"}}], "columns: .*'messagez'; did you mean 'messages'"),
    "columns of two formats": (
        [{"path": "a", "columns": {"messages": "b", "prompt": "c"}}], "columns: .*messages and prompt are columns of"),
    "no path": ([{"weight": 1}], "conversations.0.path: is required"),
}  # fmt: skip


@pytest.mark.parametrize(("conversations", "message"), BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_sources_that_a_recipe_cannot_have(load, conversations, message):
    with pytest.raises(InputError, match=message):
        load(conversations)
