"""Conversations: the embedded questions, files, and rows that are refused."""

import json

import pytest

from tinyllama_hf import load_tokenizer
from tinyllama_hf.chat.render import render
from tinyllama_hf.chat.templates import load_template
from tinyllama_hf.data import embedded
from tinyllama_hf.data.questions import questions
from tinyllama_hf.errors import InputError
from tinyllama_hf.finetune.config import ConversationSource
from tinyllama_hf.finetune.conversation_sources import EMBEDDED
from tinyllama_hf.finetune.conversations import (
    read_conversations,
    read_sources,
    render_all,
    split_conversations,
    write_rows,
)


GOOD = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


@pytest.fixture
def tokenizer(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.chat_template = load_template("llama2")
    return tokenizer


def rows(path, *messages):
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in messages))
    return str(path)


@pytest.mark.slow
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


def test_the_split_is_disjoint_and_stable_when_rows_are_removed():
    conversations = read_conversations(EMBEDDED)
    train, held_out = split_conversations(conversations, 0.1)
    assert 0.07 < len(held_out) / len(conversations) < 0.13 and len(train) + len(held_out) == len(conversations)
    fewer_train, fewer_held_out = split_conversations(conversations[::2], 0.1)
    assert {c.name for c in fewer_train} <= {c.name for c in train}
    assert {c.name for c in fewer_held_out} <= {c.name for c in held_out}


def test_written_conversations_are_read_back(tmp_path):
    conversations = read_conversations(EMBEDDED)[:50]
    (tmp_path / "held_out.jsonl").write_text(write_rows(conversations))
    assert [c.messages for c in read_conversations(str(tmp_path / "held_out.jsonl"))] == [
        c.messages for c in conversations
    ]


def test_the_split_is_that_of_the_written_rule(tmp_path):
    """Hashes from `printf '[{"content": "Red?", "role": "user"}, ...]' | sha256sum`: 16 hex digits over 2**64."""
    places = {"Red": 0.44205, "Green": 0.00921, "Blue": 0.47474, "White": 0.57582, "Black": 0.13361}
    talks = [[{"role": "user", "content": f"{w}?"}, {"role": "assistant", "content": f"{w}."}] for w in places]
    conversations = read_conversations(rows(tmp_path / "a.jsonl", *talks))
    for fraction in (0.00922, 0.1336, 0.1337, 0.44204, 0.44206, 0.5, 0.5758):
        train, held_out = split_conversations(conversations, fraction)
        assert [c.messages[1]["content"] for c in held_out] == [f"{w}." for w in places if places[w] < fraction]
        assert [c.messages[1]["content"] for c in train] == [f"{w}." for w in places if places[w] >= fraction]


def test_a_weight_does_not_change_the_split(tmp_path):
    plain = [GOOD[0], GOOD[1], {"role": "user", "content": "Bye"}]
    weighted = [GOOD[0], {**GOOD[1], "weight": 0}, plain[2]]
    talks = [[*start, {"role": "assistant", "content": str(i)}] for start in (plain, weighted) for i in range(40)]
    conversations = read_conversations(rows(tmp_path / "a.jsonl", *talks))
    train, _ = split_conversations(conversations, 0.5)
    sides = [conversation in train for conversation in conversations]
    assert sides[:40] == sides[40:] and 0 < sum(sides[:40]) < 40


def test_replies_of_weight_0_are_read_and_written_and_have_no_loss(tmp_path, tokenizer):
    talk = [GOOD[0], {"role": "assistant", "content": "Bad.", "weight": 0}, {"role": "user", "content": "No"}, GOOD[1]]
    for _ in range(2):
        (conversation,) = read_conversations(rows(tmp_path / "a.jsonl", talk))
        ((ids, masks),) = render_all(tokenizer, [conversation], 96).examples
        assert tokenizer.decode([i for i, mask in zip(ids, masks, strict=True) if mask]) == "Hello. </s>"
        assert ids == render(tokenizer, [{k: m[k] for k in ("role", "content")} for m in talk]).input_ids
        (tmp_path / "a.jsonl").write_text(write_rows([conversation]))


def test_rows_of_other_tools(shared):
    """Regressions: weights that were dropped, and lists of text parts that were refused."""
    weighted = read_conversations(str(shared / "cases" / "weight0.jsonl"))
    for number, conversation in enumerate(weighted):
        assert [(m["content"], m.get("weight")) for m in conversation.messages if m["role"] == "assistant"] == [
            (f"bad {number}", 0),
            (f"good {number}", None),
        ]
    parts = read_conversations(str(shared / "cases" / "list_content.jsonl"))
    assert parts[1].messages == [{"role": "user", "content": "Q1"}, {"role": "assistant", "content": "A1"}]
    with pytest.raises(InputError, match=r"none_tool\.jsonl, row 21, message 1: key 'tool_calls'"):
        read_conversations(str(shared / "cases" / "none_tool.jsonl"))
    for name, reason in (("none_tool", "row 21, message 1: key 'tool_calls'"), ("surro", "row 21, message 0: char")):
        source = ConversationSource(path=str(shared / "cases" / f"{name}.jsonl"))
        data = read_sources([source], "drop")
        ((number, first),) = data.sources[0].invalid.values()
        assert number == 1 and reason in first and len(data.conversations) == data.sources[0].num_rows - 1 >= 20
    talks = read_conversations(str(shared / "cases" / "sharegpt.jsonl"))
    assert talks[1].messages == [{"role": "user", "content": "Q1"}, {"role": "assistant", "content": "A1"}]


@pytest.mark.parametrize(
    ("field", "value"), [("tools", [{"type": "function"}]), ("weight", 0), ("system", "Be brief.")]
)
def test_fields_of_a_row(tmp_path, field, value):
    """A field that would change the loss is refused by name. Others are ignored."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": GOOD, "id": 7, "source": "x", field: None}) + "\n")
    assert read_conversations(str(tmp_path / "a.jsonl"))[0].messages == GOOD
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": GOOD, field: value}) + "\n")
    with pytest.raises(InputError, match=f"row 1: field '{field}'"):
        read_conversations(str(tmp_path / "a.jsonl"))


def test_real_data(shared):
    folder = shared / "data" / "chat"
    assert len(read_conversations(str(folder / "short_instructions" / "train.jsonl.gz"))) > 500
    assert any(len(c.messages) > 2 for c in read_conversations(str(folder / "multi_turn" / "train.jsonl.gz")))


BAD = {
    "starts with the assistant": ([GOOD[1]], "row 1: starts with the assistant"),
    "empty reply": ([GOOD[0], {"role": "assistant", "content": " \n"}], "row 1, message 1: the reply is empty"),
    "no reply": ([GOOD[0]], "row 1 has no reply of the assistant"),
    "no reply to learn": (
        [GOOD[0], {**GOOD[1], "train": False}],
        "row 1 has no reply of the assistant .*weight 0",
    ),
}


@pytest.mark.parametrize(("messages", "message"), BAD.values(), ids=BAD)
def test_bad_conversations(tmp_path, messages, message):
    with pytest.raises(InputError, match=message):
        read_conversations(rows(tmp_path / "a.jsonl", messages))


def test_bad_files(tmp_path):
    with pytest.raises(InputError, match=r"a\.jsonl: no such file"):
        read_conversations(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(InputError, match=r"a\.jsonl: no usable row"):
        read_conversations(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match="row 1: no known format: the columns with a value are text"):
        read_conversations(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": GOOD}) + "\n{\n")
    with pytest.raises(InputError, match="row 2: not valid JSON"):
        read_conversations(str(tmp_path / "a.jsonl"))


def test_a_split_with_an_empty_part(tmp_path):
    with pytest.raises(InputError, match=r"data.validation_fraction: 0.5 of 1 conversations"):
        split_conversations(read_conversations(rows(tmp_path / "a.jsonl", GOOD)), 0.5)


def test_longer_than_the_context(tmp_path, tokenizer):
    long = [GOOD[0], {"role": "assistant", "content": "word " * 200}]
    conversations = read_conversations(rows(tmp_path / "a.jsonl", GOOD, long))
    with pytest.raises(
        InputError,
        match=r"1 of 2 conversations .*data.max_length 64\b.*row 2: \d+ tokens",
    ):
        render_all(tokenizer, conversations, 64)
    rendered = render_all(tokenizer, conversations, 64, "drop")
    assert rendered.conversations == conversations[:1] and rendered.dropped == {0: 1} and not rendered.truncated


def test_a_conversation_of_exactly_the_maximum_length_is_kept(tmp_path, tokenizer):
    conversations = read_conversations(rows(tmp_path / "a.jsonl", GOOD))
    length = len(tokenizer.apply_chat_template(GOOD, return_dict=False))
    assert [len(r.input_ids) for r in render_all(tokenizer, conversations, length).examples] == [length]
    with pytest.raises(InputError, match=f"data.max_length {length - 1}"):
        render_all(tokenizer, conversations, length - 1)


class TestTruncation:
    """The first tokens of a conversation that is too long, with their masks."""

    LONG = (*GOOD, {"role": "user", "content": "More"}, {"role": "assistant", "content": "word " * 100})
    LONG_QUESTION = ({"role": "user", "content": "word " * 100}, GOOD[1])

    def test_the_first_tokens_are_kept(self, tmp_path, tokenizer):
        talks = read_conversations(rows(tmp_path / "a.jsonl", GOOD, list(self.LONG), list(self.LONG_QUESTION)))
        whole = render_all(tokenizer, talks, 10_000).examples
        cut = render_all(tokenizer, talks, 64, "truncate")
        assert cut.examples == [whole[0], (whole[1].input_ids[:64], whole[1].assistant_masks[:64])]
        assert cut.conversations == talks[:2] and cut.truncated == {0: 1} and cut.dropped == {0: 1}
        assert cut.max_length == 64 and any(cut.examples[1].assistant_masks[32:]), (
            "a part of the long reply is learned"
        )

    def test_the_counts_are_by_source(self, tmp_path, tokenizer):
        (long,) = read_conversations(rows(tmp_path / "a.jsonl", list(self.LONG)))
        talks = [long, long._replace(source=1), long._replace(source=1)]
        assert render_all(tokenizer, talks, 64, "truncate").truncated == {0: 1, 1: 2}
        assert render_all(tokenizer, talks, 64, "drop").dropped == {0: 1, 1: 2}

    def test_one_token_with_loss_is_enough(self, tmp_path, tokenizer):
        talks = read_conversations(rows(tmp_path / "a.jsonl", GOOD))
        masks = render_all(tokenizer, talks, 100).examples[0].assistant_masks
        assert [len(render_all(tokenizer, talks, masks.index(1) + n, "truncate").examples) for n in (0, 1)] == [0, 1]


def test_a_conversation_may_end_with_the_user(tmp_path, tokenizer):
    """The last question has no loss; a conversation of it alone has nothing to learn."""
    (talk,) = read_conversations(rows(tmp_path / "a.jsonl", [*GOOD, {"role": "user", "content": "Bye?"}]))
    ((ids, masks),) = render_all(tokenizer, [talk], 96).examples
    assert tokenizer.decode([i for i, mask in zip(ids, masks, strict=True) if mask]) == "Hello. </s>"
    assert "Bye?" in tokenizer.decode(ids)


def test_rendering_shows_its_progress(tmp_path, tokenizer, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal then
    conversations = read_conversations(rows(tmp_path / "a.jsonl", GOOD, GOOD, GOOD))
    render_all(tokenizer, conversations, 96, show=False)
    assert capsys.readouterr().err == ""
    render_all(tokenizer, conversations, 96)
    printed = capsys.readouterr().err
    assert "rendering conversations" in printed and "3/3" in printed
