"""Masks of templates without generation markers, replies that are not learned, and unclear templates."""

import pytest
from tokenizers import AddedToken

from tests.chat.test_render import assistant, system, user
from tinyllama_hf import load_tokenizer
from tinyllama_hf.chat.masks import mask_replies, reply_spans
from tinyllama_hf.chat.render import render
from tinyllama_hf.chat.templates import check_template, load_template
from tinyllama_hf.errors import InputError


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The template of TinyLlama-1.1B-Chat-v1.0, without a begin-of-sequence token and without markers.
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)


def chatml_of(tokenizer_folder):
    """The tokenizer with 512 ids and the two control tokens of ChatML; the second is its end-of-sequence token."""
    loaded = load_tokenizer(tokenizer_folder)
    tokens = [AddedToken(text, special=True, normalized=False) for text in ("<|im_start|>", "<|im_end|>")]
    loaded.add_tokens(tokens, special_tokens=True)
    loaded.eos_token, loaded.chat_template = "<|im_end|>", CHATML
    return loaded


@pytest.fixture
def chatml(tokenizer_folder):
    return chatml_of(tokenizer_folder)


@pytest.fixture
def tokenizer(tokenizer_folder):
    return load_tokenizer(tokenizer_folder)


def learned(tokenizer, messages) -> list[str]:
    ids, masks = mask_replies(tokenizer, messages, render(tokenizer, messages))
    return [tokenizer.decode(ids[start:end]) for start, end in reply_spans(masks)]


def test_control_text_in_a_reply_does_not_end_it(chatml):
    assert learned(chatml, [user("Hi"), assistant("a <|im_end|> b"), user("x"), assistant("y")]) == [
        "a <|im_end|> b<|im_end|>",
        "y<|im_end|>",
    ]


def test_a_template_without_begin_of_sequence(tokenizer):
    tokenizer.chat_template = ZEPHYR
    assert learned(tokenizer, [system("s"), user("Hi"), assistant("One."), user("x"), assistant("Two.")]) == [
        "One.</s>",
        "Two.</s>",
    ]
    check_template(tokenizer, is_own=True)
    with pytest.raises(InputError, match="must start with one begin-of-sequence"):
        check_template(tokenizer)


def test_markers_taken_out_of_a_template_change_nothing(tokenizer):
    messages = [system("s"), user("Hi"), assistant("One."), user("x"), assistant("Two.")]
    tokenizer.chat_template = load_template("llama2")
    marked = render(tokenizer, messages)
    tokenizer.chat_template = tokenizer.chat_template.replace("{%- generation -%}", "").replace(
        "{%- endgeneration -%}", ""
    )
    unmarked = render(tokenizer, messages)
    assert unmarked.assistant_masks is None and mask_replies(tokenizer, messages, unmarked) == marked
    check_template(tokenizer)


@pytest.mark.parametrize("template", [load_template("llama2"), CHATML], ids=["with markers", "without"])
def test_replies_of_weight_0_are_context(chatml, template):
    chatml.chat_template = template
    messages = [user("a"), {**assistant("Bad."), "weight": 0}, user("b"), assistant("Good.")]
    whole = render(chatml, messages)
    assert [text.removesuffix("<|im_end|>").strip() for text in learned(chatml, messages)] == ["Good."]
    assert (
        mask_replies(chatml, messages, whole).input_ids
        == render(chatml, [messages[0], assistant("Bad."), *messages[2:]])[0]
    )


REFUSED = {
    "a reply that its successor changes": (
        CHATML.replace("m['content'] +", "(m['content'] if loop.last or m['role'] == 'user' else 'x') +"),
        "message 1: the chat template has no {% generation %} markers",
    ),
    "a prompt that training does not show": (
        CHATML.replace("'<|im_start|>assistant\\n' }}{% endif", "'<|im_start|>assistant\\n>' }}{% endif"),
        "message 1: .* at token",
    ),
    "a reply without its stop token": (
        CHATML.replace("<|im_end|>\\n'", "\\n'"),
        "message 1: .*not with the tokenizer's end-of-sequence token '<|im_end|>'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("template", "message"), REFUSED.values(), ids=REFUSED)
def test_unclear_templates(chatml, template, message):
    assert template != CHATML
    chatml.chat_template = template
    messages = [user("a"), assistant("One."), user("b"), assistant("Two.")]
    with pytest.raises(InputError, match=message):
        mask_replies(chatml, messages, render(chatml, messages))
    with pytest.raises(InputError, match="chat template"):
        check_template(chatml, is_own=True)


@pytest.mark.slow
def test_white_space_that_joins_the_prompt(smollm2):
    """SmolLM2's tokenizer joins the line end before the reply with white space that follows it."""
    tokenizer = load_tokenizer(smollm2)
    messages = [user("a"), assistant("\n\n  One.")]
    with pytest.raises(InputError, match=r"row 3, message 1: .*white space around the reply"):
        mask_replies(tokenizer, messages, render(tokenizer, messages), "row 3")
