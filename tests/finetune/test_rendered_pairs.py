"""Pairs as tokens: the prompt is a prefix of both conversations, and only the replies have loss."""

import pytest

from tinyllama_hf.chat.masks import mask_replies
from tinyllama_hf.chat.render import render
from tinyllama_hf.chat.templates import load_template
from tinyllama_hf.errors import InputError
from tinyllama_hf.finetune.config import ConversationSource
from tinyllama_hf.finetune.preferences import PreferencePair, read_preferences
from tinyllama_hf.finetune.rendered_pairs import render_pairs, split_pairs, write_pairs
from tinyllama_hf.tokenization_tinyllama import load_tokenizer


PLAIN = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def pair(prompt, chosen, rejected, name="row 1"):
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, prompt, strict=False)]
    return PreferencePair(name, messages, *([{"role": "assistant", "content": text}] for text in (chosen, rejected)))


@pytest.fixture
def tokenizer(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.chat_template = load_template("llama2")
    return tokenizer


@pytest.mark.parametrize("template", ["llama2", "without markers"])
def test_prompt_and_replies(tokenizer, template):
    """The prompt is what precedes a generated reply; each reply has the tokens that fine-tuning would mark."""
    if template == "without markers":
        tokenizer.chat_template = PLAIN
    given = pair(["Is 2 > 1?", "Yes.", "Sure? Write </s>."], "I am </s> sure.", "No\n\nidea <s>")
    (found,), _ = render_pairs(tokenizer, [given], 200)
    assert found.prompt_ids == render(tokenizer, given.prompt, add_generation_prompt=True).input_ids
    for reply, example in zip((given.chosen, given.rejected), found.examples(), strict=True):
        messages = given.prompt + reply
        ids, masks = mask_replies(tokenizer, messages, render(tokenizer, messages))
        assert ids[: len(example.input_ids)] == example.input_ids
        start = len(found.prompt_ids)
        assert masks[start:] == example.assistant_masks[start:] + [0] * (len(ids) - len(example.input_ids))
        assert not any(example.assistant_masks[:start]) and all(example.assistant_masks[start:])
        assert example.input_ids[-1] == tokenizer.eos_token_id
        assert example.input_ids[start:].count(tokenizer.eos_token_id) == 1, "written control tokens are text"


def test_a_template_that_renders_the_prompt_differently(tokenizer):
    template = load_template("llama2")
    tokenizer.chat_template = template.replace("{%- generation -%}", "{%- generation -%}{{- ' Well,' -}}")
    (found,), _ = render_pairs(tokenizer, [pair(["Why?"], "So.", "No.")], 200)
    assert "Well" in tokenizer.decode(found.chosen_ids), "what the template adds to a reply is learned"
    tokenizer.chat_template = template.replace("{%- generation -%}", "{{- ' Well,' -}}{%- generation -%}")
    with pytest.raises(
        InputError, match=r"row 1, chosen: before a reply, .*, but with this reply .*'W', 'el', 'l', ','"
    ):
        render_pairs(tokenizer, [pair(["Why?"], "So.", "No.")], 200)


def test_replies_that_the_template_makes_equal(tokenizer):
    with pytest.raises(InputError, match="row 1: the chat template renders chosen and rejected equally"):
        render_pairs(tokenizer, [pair(["Why?"], "So.", " So. ")], 200)


def test_too_long(tokenizer):
    """Either reply can make a pair too long."""
    pairs = [pair(["Why?"], "So.", "No. " * number, f"row {number}") for number in (1, 90, 3)]
    lengths = [max(found.lengths()) for found in render_pairs(tokenizer, pairs, 999)[0]]
    assert lengths == sorted(lengths), "the shortest first"
    with pytest.raises(InputError, match=rf"1 of 3 pairs .* data.max_length {lengths[1]}.* row 90: {lengths[2]} tok"):
        render_pairs(tokenizer, pairs, lengths[1])
    found, kept = render_pairs(tokenizer, pairs, lengths[1], drop_overlong=True)
    assert [max(one.lengths()) for one in found] == lengths[:2]
    assert [one.name for one in kept] == ["row 1", "row 3"], "what is written as held out"


def test_pairs_with_the_same_prompt_are_in_one_part():
    pairs = [pair([f"Question {i}?"], f"Yes {j}", "No", f"row {i} {j}") for i in range(40) for j in range(3)]
    train, held_out = split_pairs(pairs, 0.3)
    assert len(train) + len(held_out) == 120 and 18 < len(held_out) < 54
    prompts = [{p.prompt[0]["content"] for p in part} for part in (train, held_out)]
    assert not prompts[0] & prompts[1]
    assert split_pairs(pairs[:60], 0.3)[1] == [p for p in held_out if p in pairs[:60]]


def test_written_pairs_are_read_again(tmp_path):
    pairs = [pair(["Why?", "Because.", "Ünd?"], "So.", "No.")]
    (tmp_path / "pairs.jsonl").write_text(write_pairs(pairs), encoding="utf-8")
    (found,) = read_preferences([ConversationSource(path=str(tmp_path / "pairs.jsonl"))]).pairs
    assert found[1:4] == pairs[0][1:4]
