"""What is shown of the data before training."""

import io
import json
from collections import Counter

import pytest
from rich.console import Console

from tinyllama_hf import load_tokenizer
from tinyllama_hf.chat.templates import load_template
from tinyllama_hf.finetune.config import ConversationSource
from tinyllama_hf.finetune.conversations import read_sources, render_all, split_conversations
from tinyllama_hf.finetune.data_summary import describe_sources, draw_conversation, draw_lengths


@pytest.fixture
def tokenizer(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.chat_template = load_template("llama2")
    return tokenizer


def printed(text, **options) -> str:
    console = Console(file=io.StringIO(), width=200, **options)
    console.print(text, soft_wrap=True)
    return console.file.getvalue()


def talk(number: int, length: int = 1) -> dict:
    return {
        "messages": [
            {"role": "user", "content": f"Number {number}?"},
            {"role": "assistant", "content": "Red. " * length},
        ]
    }


@pytest.fixture
def example(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(json.dumps(talk(1)) + "\n")
    data = read_sources([ConversationSource(path=str(tmp_path / "a.jsonl"))])
    return render_all(tokenizer, data.conversations, 96).examples[0]


def test_tokens_with_loss_are_green_on_a_terminal(tokenizer, example):
    text = printed(draw_conversation(tokenizer, example, color=True), color_system="standard", force_terminal=True)
    assert text == "\x1b[2m<s> [INST] Number 1? [/INST]\x1b[0m \x1b[32mRed. </s>\x1b[0m\n"


def test_tokens_with_loss_are_in_brackets_in_a_log(tokenizer, example):
    assert printed(draw_conversation(tokenizer, example, color=False)) == "<s> [INST] Number 1? [/INST] ⟦Red. </s>⟧\n"


def test_markup_in_a_conversation_is_text(tokenizer, example):
    ids = tokenizer("[bold]x[/bold] [/INST]", add_special_tokens=False)["input_ids"]
    text = printed(draw_conversation(tokenizer, example._replace(input_ids=ids, assistant_masks=[0] * len(ids)), True))
    assert text == "[bold]x[/bold] [/INST]\n"


def test_the_histogram():
    """Bars are relative to the highest, and rounded up, so that one conversation is seen."""
    lines = draw_lengths([7] * 80 + [20] * 40 + [21, 64])
    assert lines[0] == "median 7 tokens, 95 % at most 20, longest 64"
    assert [line.split() for line in lines[1:]] == [
        ["1", "to", "10", "█" * 40, "80"],
        ["11", "to", "20", "█" * 20, "40"],
        ["21", "to", "30", "█", "1"],
        *([f"{n}", "to", f"{n + 9}", "0"] for n in (31, 41, 51)),
        ["61", "to", "70", "█", "1"],
    ]


@pytest.mark.parametrize(
    ("lengths", "bars"), [([1], 1), ([12], 12), ([13], 7), ([2048], 11), ([1, 24_000], 12), ([24_001], 5)]
)
def test_any_length_gives_at_most_twelve_bars(lengths, bars):
    lines = draw_lengths(lengths)[1:]
    assert len(lines) == bars and sum(int(line.split()[-1].replace(",", "")) for line in lines) == len(lengths)
    assert len({line.index("to") for line in lines}) == 1, "in columns"


def test_the_percentile_is_that_of_the_definition():
    assert "95 % at most 95," in draw_lengths(range(1, 101))[0]
    assert "95 % at most 19," in draw_lengths(range(1, 21))[0]


def test_a_line_per_source_with_every_count(tmp_path, tokenizer):
    rows = [*(talk(i) for i in range(8)), {"text": "a"}, {"text": "b"}, talk(8, 40), talk(9, 40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.csv").write_text("prompt,completion\nNumber?,Red.\n")
    sources = [
        ConversationSource(path=str(tmp_path / "a.jsonl")),
        ConversationSource(path=str(tmp_path / "b.csv"), weight=2.5),
    ]
    data = read_sources(sources, "drop")
    parts = split_conversations(data.conversations, 0.5)
    a, b = (str(tmp_path / name) for name in ("a.jsonl", "b.csv"))

    def lines(too_long):
        first, second = (render_all(tokenizer, part, 64, too_long) for part in parts)
        used = Counter(conversation.source for conversation in first.conversations + second.conversations)
        return describe_sources(data.sources, used, first.dropped + second.dropped, first.truncated + second.truncated)

    first = f"  2 invalid: {a}, row 9: no known format"
    for too_long, wanted in (("drop", ", 2 too long, 8 used"), ("truncate", ", 2 truncated, 10 used")):
        found = lines(too_long)
        assert found[0] == f"{a} (messages): 12 rows, 2 invalid{wanted}" and found[1].startswith(first)
        assert found[2] == f"{b} (prompt/completion, weight 2.5): 1 rows, 1 used" and len(found) == 3
    assert Counter(conversation.source for conversation in data.conversations) == {0: 10, 1: 1}
