"""Conversations: the embedded questions, files, and what cannot be learned from."""

import json

import pytest

from tinyllama_hf import load_tokenizer
from tinyllama_hf.chat.templates import load_template
from tinyllama_hf.data import embedded
from tinyllama_hf.data.questions import questions
from tinyllama_hf.errors import InputError
from tinyllama_hf.finetune.conversations import EMBEDDED, read_conversations, render_all, split, write_rows


GOOD = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def rows(path, *messages):
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in messages))
    return str(path)


def test_questions_come_from_modules_that_the_corpus_leaves_out():
    pairs = list(questions())
    assert len(pairs) > 1000 and len({pair.answer for pair in pairs}) == len(pairs)
    modules = {pair.name.split(".")[0] for pair in pairs}
    for kind in embedded.KINDS:
        read = {document.name.split("/")[0].removesuffix(".py") for document in embedded.documents(kind)}
        assert not modules & read
    assert pairs == list(questions()), "the same on every call"
    for pair in pairs:
        assert pair.name in pair.question and 20 <= len(pair.answer) <= 200


def test_the_split_is_disjoint_and_a_row_stays_on_its_side():
    conversations = read_conversations(EMBEDDED)
    train, held_out = split(conversations, 0.1)
    assert 0.07 < len(held_out) / len(conversations) < 0.13 and len(train) + len(held_out) == len(conversations)
    fewer_train, fewer_held_out = split(conversations[::2], 0.1)
    assert {c.name for c in fewer_train} <= {c.name for c in train}
    assert {c.name for c in fewer_held_out} <= {c.name for c in held_out}


def test_what_is_written_is_read_again(tmp_path):
    conversations = read_conversations(EMBEDDED)[:50]
    (tmp_path / "held_out.jsonl").write_text(write_rows(conversations))
    assert [c.messages for c in read_conversations(str(tmp_path / "held_out.jsonl"))] == [
        c.messages for c in conversations
    ]


def test_real_data(shared):
    folder = shared / "data" / "chat"
    assert len(read_conversations(str(folder / "short_instructions" / "train.jsonl.gz"))) > 500
    assert any(len(c.messages) > 2 for c in read_conversations(str(folder / "multi_turn" / "train.jsonl.gz")))


BAD = {
    "starts with the assistant": ([GOOD[1]], "row 1: starts with the assistant"),
    "empty reply": ([GOOD[0], {"role": "assistant", "content": " \n"}], "row 1, message 1: the reply is empty"),
    "no reply": ([GOOD[0]], "row 1: has no reply of the assistant"),
}


@pytest.mark.parametrize(("messages", "message"), BAD.values(), ids=BAD)
def test_bad_conversations(tmp_path, messages, message):
    with pytest.raises(InputError, match=message):
        read_conversations(rows(tmp_path / "a.jsonl", messages))


def test_bad_files(tmp_path):
    with pytest.raises(InputError, match="no such file of JSON lines"):
        read_conversations(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(InputError, match="holds no row"):
        read_conversations(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match="row 1: no list of messages under 'messages', but: text"):
        read_conversations(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": GOOD}) + "\n{\n")
    with pytest.raises(InputError, match="row 2: no JSON"):
        read_conversations(str(tmp_path / "a.jsonl"))


def test_a_split_that_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="both are needed"):
        split(read_conversations(rows(tmp_path / "a.jsonl", GOOD)), 0.5)


def test_longer_than_the_context(tmp_path, tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.chat_template = load_template("llama2")
    long = [GOOD[0], {"role": "assistant", "content": "word " * 200}]
    conversations = read_conversations(rows(tmp_path / "a.jsonl", GOOD, long))
    with pytest.raises(
        InputError,
        match=r"1 of 2 conversations are longer than data.max_length 64; the longest is .*row 2: \d+ tokens",
    ):
        render_all(tokenizer, conversations, 64)
    assert len(render_all(tokenizer, conversations, 64, drop_overlong=True)) == 1
