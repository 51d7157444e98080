"""Preferences: every form gives the same pair, TRL renders it as we do, and pairs that teach nothing are refused."""

import json

import pytest

from tests.chat.test_masks import chatml_of
from tinyllama_hf.chat.render import render
from tinyllama_hf.errors import InputError
from tinyllama_hf.finetune.config import ConversationSource
from tinyllama_hf.finetune.preferences import PreferencePair, read_preferences


SYSTEM = {"role": "system", "content": "Be brief."}


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def reply(content: str, **keys) -> dict:
    return {"role": "assistant", "content": content, **keys}


def read(tmp_path, *rows, invalid="error", **source):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_preferences([ConversationSource(path=str(path), **source)], invalid)


START = [SYSTEM, user("Q"), reply("A"), user("R")]
FORMS = {
    "strings": ({"prompt": "Q", "chosen": "good", "rejected": "bad"}, [user("Q")]),
    "lists": ({"prompt": START, "chosen": [reply("good")], "rejected": [reply("bad")]}, START),
    "a list and strings": ({"prompt": START, "chosen": "good", "rejected": "bad"}, START),
    "whole conversations": ({"chosen": [*START, reply("good")], "rejected": [*START, reply("bad")]}, START),
    "whole conversations of one turn": (
        {"chosen": [user("Q"), reply("good")], "rejected": [user("Q"), reply("bad")]}, [user("Q")]),
    "whole conversations and their prompt": (
        {"prompt": "Q", "chosen": [user("Q"), reply("good")], "rejected": [user("Q"), reply("bad")],
         "messages": [user("Q"), reply("good")], "score_chosen": 8.0}, [user("Q")]),
}  # fmt: skip


@pytest.mark.parametrize(("row", "prompt"), FORMS.values(), ids=FORMS)
def test_every_form_gives_the_same_pair(tmp_path, row, prompt):
    data = read(tmp_path, row)
    where = f"{tmp_path / 'pairs.jsonl'}, row 1"
    assert data.pairs == [PreferencePair(where, prompt, [reply("good")], [reply("bad")], 0)]
    assert (data.sources[0].format, data.sources[0].num_rows) == ("preferences", 1)


def test_columns_of_other_names(tmp_path):
    row = {"question": "Q", "best": "good", "worst": "bad", "chosen": 1, "rejected": 0}
    columns = {"prompt": "question", "chosen": "best", "rejected": "worst"}
    assert read(tmp_path, row, columns=columns).pairs[0][1:4] == ([user("Q")], [reply("good")], [reply("bad")])


REFUSED = {
    "identical replies": ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "row 1: chosen and rejected are identical"),
    "identical conversations": (
        {"chosen": [user("Q"), reply("A")], "rejected": [user("Q"), reply("A")]}, "row 1: .* identical"),
    "no prompt": ({"chosen": "A", "rejected": "B"}, "row 1: .* there is no prompt"),
    "an empty reply": ({"prompt": "Q", "chosen": "A", "rejected": " "}, "row 1, rejected, message 1: .* empty"),
    "other questions": (
        {"chosen": [user("Q"), reply("A")], "rejected": [user("R"), reply("B")]},
        r"row 1, chosen: after the prompt.* \['user', 'assistant'\]",
    ),
    "replies that differ earlier": (
        {"chosen": [user("Q"), reply("A"), user("R"), reply("B")], "rejected": [user("Q"), reply("C"), user("R")]},
        r"row 1, chosen: .* \['assistant', 'user', 'assistant'\]",
    ),
    "a conversation that ends with the user": (
        {"chosen": [user("Q"), reply("A"), user("R")], "rejected": [user("Q"), reply("A"), user("S")]},
        r"row 1, chosen: .* \['user'\]",
    ),
    "a reply and a conversation": (
        {"prompt": "Q", "chosen": "A", "rejected": [user("Q"), reply("B")]}, "row 1: .* do not begin with the prompt"),
    "another prompt": (
        {"prompt": [SYSTEM, user("Q")], "chosen": [user("Q"), reply("A")], "rejected": [user("Q"), reply("B")]},
        "row 1: .* do not begin with the prompt",
    ),
    "a prompt that ends with the assistant": (
        {"prompt": [user("Q"), reply("A")], "chosen": "B", "rejected": "C"}, "row 1, chosen: turn 2 has the role"),
    "no replies": ({"prompt": "Q", "chosen": [], "rejected": []}, "row 1: .* do not begin with the prompt"),
    "half a surrogate pair": (
        {"prompt": "Q", "chosen": "A", "rejected": "B \ud83d"}, "row 1, rejected, message 1: character 2"),
    "a weight": (
        {"prompt": "Q", "chosen": [reply("A", weight=0)], "rejected": "B"}, "row 1, chosen: .* weight 0"),
    "conversations": (
        {"messages": [user("Q"), reply("A")]},
        r"row 1: has the columns of messages \(messages\), which recipes/sft.py reads, not recipes/dpo.py",
    ),
    "tools": ({"prompt": "Q", "chosen": "A", "rejected": "B", "tools": [{}]}, "row 1: field 'tools'"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "message"), REFUSED.values(), ids=REFUSED)
def test_pairs_that_are_refused(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, row)


def test_invalid_pairs_are_dropped_where_asked(tmp_path):
    same, good = {"prompt": "Q", "chosen": "A", "rejected": "A"}, {"prompt": "Q", "chosen": "A", "rejected": "B"}
    data = read(tmp_path, same, good, same, invalid="drop")
    assert len(data.pairs) == 1 and data.sources[0].num_rows == 3
    ((number, first),) = data.sources[0].invalid.values()
    assert number == 2 and "row 1: chosen and rejected are identical" in first


def test_trl_renders_the_pair_as_we_do(tmp_path, tokenizer_folder):
    """TRL's own preparation of a conversational pair, against prompt and whole conversation of ours."""
    from trl.data_utils import apply_chat_template

    tokenizer = chatml_of(tokenizer_folder)
    (pair,) = read(tmp_path, {"prompt": START, "chosen": "good", "rejected": "bad"}).pairs
    theirs = apply_chat_template({name: getattr(pair, name) for name in ("prompt", "chosen", "rejected")}, tokenizer)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    assert ids(theirs["prompt"]) == render(tokenizer, pair.prompt, add_generation_prompt=True).input_ids
    for name in ("chosen", "rejected"):
        assert ids(theirs["prompt"] + theirs[name]) == render(tokenizer, pair.prompt + getattr(pair, name)).input_ids


def test_real_data(shared):
    folder = shared / "data" / "chat" / "preferences"
    sources = [ConversationSource(path=str(folder / f"{name}.jsonl.gz")) for name in ("train", "test")]
    data = read_preferences(sources, "drop")
    assert [source.num_rows for source in data.sources] == [1000, 100]
    assert len(data.pairs) == 1100 - sum(source.num_invalid for source in data.sources) > 1000
    assert {pair.source for pair in data.pairs} == {0, 1}
