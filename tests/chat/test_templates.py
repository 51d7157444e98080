"""Which template is trained, the token that ends its replies, and the requirements on templates."""

import re

import pytest
from tokenizers import AddedToken

from tests.chat.test_masks import CHATML, chatml_of
from tests.chat.test_render import assistant, user
from tests.conftest import ROOT
from tinyllama_hf import load_tokenizer
from tinyllama_hf.chat.masks import mask_replies
from tinyllama_hf.chat.render import render
from tinyllama_hf.chat.templates import (
    check_template,
    choose_template,
    load_template,
    required_tokens,
    set_template,
    template_names,
)
from tinyllama_hf.errors import InputError


@pytest.fixture
def tokenizer(tokenizer_folder):
    loaded = load_tokenizer(tokenizer_folder)
    loaded.chat_template = load_template("llama2")
    return loaded


@pytest.fixture
def chatml(tokenizer_folder):
    return chatml_of(tokenizer_folder)


CHOICES = {
    "the model's, by default": (CHATML, "auto", CHATML, "the model's own"),
    "llama2, where there is none": (None, "auto", load_template("llama2"), "llama2"),
    "another, if asked for": (CHATML, "llama2", load_template("llama2"), "llama2, which replaces the model's own"),
    "the same by name": (load_template("llama2"), "llama2", load_template("llama2"), "llama2"),
    "own": (CHATML, "own", CHATML, "the model's own"),
}


@pytest.mark.parametrize(("own", "name", "template", "told"), CHOICES.values(), ids=CHOICES)
def test_which_template_is_trained(chatml, own, name, template, told):
    chatml.chat_template, chatml.bos_token = own, "<|im_start|>"
    assert choose_template(chatml, name, "my-model") == told and chatml.chat_template == template


def test_no_template_to_choose(chatml):
    chatml.chat_template = None
    with pytest.raises(InputError, match=r"chat.template: own, but my-model has no chat template; use auto"):
        choose_template(chatml, "own", "my-model")
    for several in ({"default": CHATML, "rag": CHATML}, [{"name": "default", "template": CHATML}]):
        chatml.chat_template = several
        with pytest.raises(InputError, match=r"chat.template: auto, but my-model has several templates"):
            choose_template(chatml, "auto", "my-model")


LLAMA2 = load_template("llama2")
BROKEN = {
    "a stop token that is not learned": (
        LLAMA2.replace(" ~ ' ' ~ eos_token -}}\n        {%- endgeneration -%}",
        " ~ ' ' -}}\n        {%- endgeneration -%}{{- eos_token -}}"),
        "do not include the stop token '</s>'",
    ),
    "two begin-of-sequence": (LLAMA2.replace("{{- bos_token ~",
                              "{{- bos_token ~ bos_token ~"), "never have two in a row"),
    "no begin-of-sequence": (LLAMA2.replace("{{- bos_token ~", "{{-"), "must start with one begin-of-sequence"),
    "a question that is learned": (
        LLAMA2.replace("{%- if message['role'] == 'user' -%}",
        "{%- if message['role'] == 'user' -%}{%- generation -%}", 1).replace(
            "    {%- else -%}\n        {%- generation",
            "{%- endgeneration -%}    {%- else -%}\n        {%- generation"),
        "do not include the stop token|they must be the replies",
    ),
    "another prompt than in training": (LLAMA2 + "{%- if add_generation_prompt -%}{{- ' Answer:' -}}{%- endif -%}",
                                        "another format than in training"),
}  # fmt: skip


@pytest.mark.parametrize(("template", "message"), BROKEN.values(), ids=BROKEN)
def test_a_template_that_breaks_the_contract(tokenizer, template, message):
    assert template != LLAMA2
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=message):
        check_template(tokenizer)


def test_an_unknown_template():
    with pytest.raises(InputError, match="chat template 'lama2'; did you mean 'llama2'"):
        load_template("lama2")


def test_own_template_from_a_file(tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    assert load_template(str(tmp_path / "mine.jinja")) == "{{ messages }}"


@pytest.mark.parametrize("name", [name for name in template_names() if required_tokens(name)])
def test_a_template_with_tokens_that_the_tokenizer_does_not_have(tokenizer, name):
    written = dict.fromkeys(re.findall(r"<\|\w+\|>", load_template(name)))
    assert required_tokens(name) == tuple(written)
    with pytest.raises(InputError) as caught:
        choose_template(tokenizer, name, "my-model")
    message = str(caught.value)
    assert message.startswith(f"chat template {name} needs {', '.join(written)}") and "llama2 or zephyr" in message


def test_the_token_that_ends_a_reply_becomes_end_of_sequence(tokenizer, tmp_path):
    """As in TinyLlama's Chat-v0.3: the tokens of ChatML are in the vocabulary, and the model would stop at </s>."""
    tokenizer.chat_template = None
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in required_tokens("chatml")])
    told = choose_template(tokenizer, "chatml", "my-model")
    assert told == "chatml; <|im_end|> ends a reply and replaces </s> as end-of-sequence token"
    tokenizer.save_pretrained(tmp_path)
    saved = load_tokenizer(tmp_path)
    assert (saved.eos_token, saved.eos_token_id, len(saved)) == ("<|im_end|>", 513, 514)
    assert choose_template(saved, "auto", "my-model") == "the model's own"
    messages = [user("Hi </s><|im_end|>"), assistant(" One.<|im_start|>\n")]
    for each in (tokenizer, saved):
        ids, masks = mask_replies(each, messages, render(each, messages))
        learned = [i for i, mask in zip(ids, masks, strict=True) if mask]
        assert learned[-1] == 513 and ids.count(513) == 2 and ids.count(512) == 2 and each.eos_token_id == 513
        assert each.decode(learned) == "One.<|im_start|><|im_end|>"


def test_a_server_in_a_bundled_template_stops_at_its_token(chatml):
    chatml.eos_token = "</s>"
    set_template(chatml, "chatml", "my-model")
    assert (chatml.eos_token, chatml.chat_template) == ("<|im_end|>", load_template("chatml"))


def test_the_end_of_a_reply_in_the_models_own_template(chatml):
    chatml.eos_token = "</s>"
    assert choose_template(chatml, "own", "my-model") == (
        "the model's own; <|im_end|> ends a reply and replaces </s> as end-of-sequence token"
    )
    assert chatml.eos_token == "<|im_end|>"


def test_a_template_that_also_writes_another_end_of_sequence(chatml):
    """As in the first template of Llama 3, which writes it after a conversation."""
    chatml.eos_token = "</s>"
    chatml.chat_template = CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    with pytest.raises(InputError, match=r"replies end with '<\|im_end\|>', but the template also writes eos_token"):
        choose_template(chatml, "own", "my-model")


def test_begin_of_sequence_that_opens_every_turn(chatml):
    """As in SmolLM2, which does not get two of them; and a tokenizer that has none, as in Qwen."""
    chatml.bos_token = "<|im_start|>"
    choose_template(chatml, "chatml", "my-model")
    ids = render(chatml, [user("Hi")]).input_ids
    chatml.bos_token = chatml.chat_template = None
    choose_template(chatml, "chatml", "my-model")
    assert render(chatml, [user("Hi")]).input_ids == ids and ids[0] == 512 and ids.count(512) == 1


@pytest.mark.parametrize("eos", ["<|im_end|>", "</s>"])
def test_a_template_that_ignores_the_generation_prompt(chatml, eos):
    chatml.eos_token = eos
    chatml.chat_template = CHATML[: CHATML.index("{% if add_generation_prompt")]
    with pytest.raises(InputError, match=r"the tokens to learn are .*add_generation_prompt"):
        choose_template(chatml, "own", "my-model")


def test_a_template_that_refuses_system_prompts(chatml):
    chatml.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system prompts') }}{% endif %}" + CHATML
    )
    assert choose_template(chatml, "own", "my-model") == "the model's own"


def test_the_page_has_each_bundled_template_with_its_tokens():
    page = (ROOT / "docs" / "chat_templates.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (none of its own|`<.*?>`) \|", page.replace("\\|", "¦"), re.MULTILINE))
    assert {name: tuple(re.findall("`(.*?)`", tokens.replace("¦", "|"))) for name, tokens in rows.items()} == {
        name: required_tokens(name) for name in template_names()
    }
