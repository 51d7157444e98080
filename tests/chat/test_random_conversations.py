"""200 random conversations per template: ids and mask equal those of formats written by hand, without Jinja."""

import itertools
import random

import pytest
from tokenizers import AddedToken

from tests.conversion.test_gguf_tokenizer import byte_level
from tinyllama_hf import load_tokenizer
from tinyllama_hf.chat.masks import mask_replies, reply_spans
from tinyllama_hf.chat.render import render
from tinyllama_hf.chat.templates import choose_template, load_template, required_tokens, template_names
from tinyllama_hf.errors import InputError


CONTROL, STOP, CONTEXT, REPLY = "control", "stop", "context", "reply"
GEMMA_TOKENS = ("<start_of_turn>", "<end_of_turn>")
TOKENS = (*required_tokens("chatml"), *required_tokens("llama3"), *GEMMA_TOKENS)
PLAIN = (
    "def",
    " ",
    "  ",
    "\n",
    "\n\n    ",
    "\t",
    "héé",
    "中文",
    "🚀👩‍💻",
    "[/INST]",
    "<|user|>",
    "0123",
    "}{%",
    "(",
    "’s",
    "\u200b",
)
WRITTEN = ("</s>", "<s>", "<unk>", "<|im_end|>", "<|im_start|>assistant\n", "<|eot_id|>", "<end_of_turn>", "<|end|>")


def llama2(messages, bos, eos):
    """Begin-of-sequence before every exchange, and the system prompt inside the first message."""
    system = ""
    if messages[0]["role"] == "system":
        system = f"<<SYS>>\n{messages[0]['content']}\n<</SYS>>\n\n"
        messages = messages[1:]
    for number, message in enumerate(messages):
        if message["role"] == "user":
            yield bos, CONTROL
            yield f"[INST] {((system if number == 0 else '') + message['content']).strip()} [/INST]", CONTEXT
        else:
            yield f" {message['content'].strip()} ", REPLY
            yield eos, STOP


def in_turns(messages, bos, header, stop, after, trimmed):
    """For each message a header, the text, its stop token and what follows; `trimmed` are roles."""
    yield from [(bos, CONTROL)] if bos else []
    for message in messages:
        role = message["role"]
        yield from header(role)
        text = message["content"].strip() if role in trimmed else message["content"]
        yield text, REPLY if role == "assistant" else CONTEXT
        yield stop, STOP if role == "assistant" else CONTROL
        yield after, CONTEXT


ROLES = ("system", "user", "assistant")


def chatml(messages, bos, eos, trimmed=("assistant",)):
    def header(role):
        return [("<|im_start|>", CONTROL), (f"{role}\n", CONTEXT)]

    return in_turns(messages, bos, header, "<|im_end|>", "\n", trimmed)


def chatml_with_default(system):
    """ChatML as in SmolLM2 and Qwen: a default system prompt, no begin-of-sequence, and nothing is trimmed."""

    def written_by_hand(messages, bos, eos):
        default = [] if messages[0]["role"] == "system" else [{"role": "system", "content": system}]
        return chatml([*default, *messages], None, eos, ())

    return written_by_hand


def llama3(messages, bos, eos):
    def header(role):
        return [("<|start_header_id|>", CONTROL), (role, CONTEXT), ("<|end_header_id|>", CONTROL), ("\n\n", CONTEXT)]

    return in_turns(messages, bos, header, "<|eot_id|>", "", ROLES)


def zephyr(messages, bos, eos, trimmed=("assistant",)):
    return in_turns(messages, bos, lambda role: [(f"<|{role}|>\n", CONTEXT)], eos, "\n", trimmed)


def zephyr_of_tinyllama(messages, bos, eos):
    return zephyr(messages, None, eos, ())


def gemma(messages, bos, eos):
    def header(role):
        return [("<start_of_turn>", CONTROL), (f"{role.replace('assistant', 'model')}\n", CONTEXT)]

    return in_turns(messages, bos, header, "<end_of_turn>", "\n", ROLES)


BUNDLED = {"llama2": llama2, "chatml": chatml, "llama3": llama3, "zephyr": zephyr}
# Forms of published templates without generation markers: text, and the same by hand.
UNMARKED = {
    "Llama 2": (
        "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else none %}"
        "{% for m in (messages if system is none else messages[1:]) %}{% set text = m['content'] %}"
        "{% if loop.first and system is not none %}"
        "{% set text = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + text %}{% endif %}"
        "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        llama2,
    ),
    "ChatML with a default system prompt": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        chatml_with_default("You help."),
    ),
    "Llama 3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        llama3,
    ),
    "Zephyr without begin-of-sequence": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
        zephyr_of_tinyllama,
    ),
    "Gemma, which refuses system prompts": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system prompts') }}{% endif %}"
        "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else 'user' %}"
        "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
        gemma,
    ),
}  # fmt: skip


def with_control_tokens(tokenizer):
    tokens = [AddedToken(token, special=True, normalized=False) for token in TOKENS]
    tokenizer.add_tokens(tokens, special_tokens=True)
    return tokenizer


@pytest.fixture(scope="module")
def byte_level_folder(documents, tmp_path_factory):
    """A byte-level tokenizer, which joins a line end with white space after it."""
    folder = tmp_path_factory.mktemp("byte-level")
    byte_level("llama-bpe", documents).save_pretrained(folder)
    return folder


@pytest.fixture(params=["SentencePiece", "byte-level"])
def tokenizer(request, tokenizer_folder, byte_level_folder):
    folder = tokenizer_folder if request.param == "SentencePiece" else byte_level_folder
    return with_control_tokens(load_tokenizer(folder))


def conversations(system=True, number=200):
    """Conversations of 1 to 6 exchanges; every second one has control tokens written as text."""
    draw = random.Random(0)
    for index in range(number):
        words = PLAIN + WRITTEN * (index % 2)
        roles = ["system"] * (system and draw.random() < 0.5) + ["user", "assistant"] * draw.randrange(1, 7)
        messages = [{"role": role, "content": "".join(draw.choices(words, k=draw.randrange(6)))} for role in roles]
        for message in messages:
            if message["role"] == "assistant":
                message["content"] = message["content"] if message["content"].strip() else " so "
                message |= {"weight": 0} if draw.random() < 0.2 else {}
        yield messages, index % 2 == 1


def by_hand(tokenizer, parts, learned):
    """Encodes the text between control tokens; `learned` is whether each reply has weight."""
    ids, masks, weight, learned = [], [], 0, iter(learned)
    for is_control, group in itertools.groupby(parts, key=lambda part: part[1] in (CONTROL, STOP)):
        group = list(group)
        if is_control:
            for token, kind in group:
                ids.append(tokenizer.convert_tokens_to_ids(token))
                masks.append(int(kind == STOP and weight))
            continue
        context = "".join(text for text, kind in group if kind == CONTEXT)
        reply = "".join(text for text, kind in group if kind == REPLY)
        assert [text for text, _ in group] == [text for text, kind in group if kind == CONTEXT] + [reply] * bool(reply)
        before, whole = (
            tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
            for text in (context, context + reply)
        )
        assert whole[: len(before)] == before
        weight = next(learned) if reply else 0
        ids += whole
        masks += [0] * len(before) + [weight] * (len(whole) - len(before))
    return ids, masks


def check(tokenizer, written_by_hand, system=True, stripped=False):
    draw = random.Random(1)
    for messages, has_control_text in conversations(system):
        if stripped:
            messages = [{**m, "content": m["content"].strip()} for m in messages]
        rendered = render(tokenizer, messages)
        found = mask_replies(tokenizer, messages, rendered)
        replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        learned = [messages[i].get("weight", 1) for i in replies]
        wanted = by_hand(tokenizer, written_by_hand(messages, tokenizer.bos_token, tokenizer.eos_token), learned)
        assert (found.input_ids, found.assistant_masks) == wanted, messages
        texts = [tokenizer.decode(found.input_ids[start:end]) for start, end in reply_spans(found.assistant_masks)]
        assert all(text.endswith(tokenizer.eos_token) for text in texts)
        assert [text.removesuffix(tokenizer.eos_token).strip() for text in texts] == [
            messages[i]["content"].strip() for i, weight in zip(replies, learned, strict=True) if weight
        ]
        number = draw.choice(replies)
        asked = render(tokenizer, messages[:number], add_generation_prompt=True).input_ids
        assert found.input_ids[: len(asked)] == asked
        if not has_control_text:
            options = {"return_dict": True, "return_assistant_tokens_mask": rendered.assistant_masks is not None}
            stock = tokenizer.apply_chat_template(messages, **options)
            assert (stock["input_ids"], stock.get("assistant_masks")) == rendered


def test_every_bundled_template_is_here():
    assert template_names() == sorted(BUNDLED)


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_templates(tokenizer, name):
    choose_template(tokenizer, name, "my-model")
    check(tokenizer, BUNDLED[name])


@pytest.mark.parametrize(("template", "written_by_hand"), UNMARKED.values(), ids=UNMARKED)
def test_templates_without_markers(tokenizer, template, written_by_hand):
    """A byte-level tokenizer joins the prompt with white space that a template does not trim, which is refused."""
    tokenizer.chat_template = template
    choose_template(tokenizer, "own", "my-model")
    is_byte_level = "▁" not in tokenizer.get_vocab()
    check(tokenizer, written_by_hand, system=written_by_hand is not gemma, stripped=is_byte_level)


def test_smollm2(smollm2):
    """Its own template, and the bundled one, which does not add its begin-of-sequence, `<|im_start|>`, twice."""
    tokenizer = load_tokenizer(smollm2)
    assert choose_template(tokenizer, "auto", "SmolLM2") == "the model's own"
    default = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    check(tokenizer, chatml_with_default(default), stripped=True)
    choose_template(tokenizer, "chatml", "SmolLM2")
    check(tokenizer, lambda messages, bos, eos: chatml(messages, None, eos))


def test_a_token_of_both_the_prompt_and_a_reply(byte_level_folder):
    """Without trimming, the line end before the reply and white space at its start are one token."""
    tokenizer = with_control_tokens(load_tokenizer(byte_level_folder))
    trimming = load_template("chatml")
    tokenizer.chat_template = trimming.replace("message['content'] | trim", "message['content']")
    messages = [{"role": "user", "content": "\n\nHi"}, {"role": "assistant", "content": "\n\n  One."}]
    with pytest.raises(InputError, match=r"row 3: the token '.*' is part of both the prompt and a reply"):
        render(tokenizer, messages, where="row 3")
    assert render(tokenizer, messages[:1], add_generation_prompt=True)
    messages[1]["content"] = "One."
    untrimmed = render(tokenizer, messages)
    tokenizer.chat_template = trimming
    assert render(tokenizer, messages) == untrimmed
