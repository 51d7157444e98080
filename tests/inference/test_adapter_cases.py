"""Adapters in `shared/cases` in every command: tokenizer, template and embeddings are the adapter's.

The expected logits and tokens are those of stock transformers and PEFT, on embeddings resized as in training.
"""

import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.conftest import run_here
from tinyllama_hf import load, load_tokenizer
from tinyllama_hf.chat.templates import load_template
from tinyllama_hf.errors import InputError
from tinyllama_hf.inference.merge import merge_adapter


pytest.importorskip("peft")

from peft import PeftModel


# Base and adapter, the rows of its embeddings, and the template of its folder for "Hi".
CASES = {
    "template": ("untied", "ad_tmpl", 512, "<s>### user:\nHi\n### assistant:\n"),
    "template in place of the base's": ("untied_llama2", "ad_tmpl", 512, "<s>### user:\nHi\n### assistant:\n"),
    "resized": ("untied", "ad_un_resized", 515, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
    "resized, tied": ("tied", "ad_resized", 515, None),
}
CHATS = [name for name, case in CASES.items() if case[3]]
PROMPT, NUM_TOKENS = "Once upon a time", 8
GREEDY = ("--temperature", "0", "--max-new-tokens", NUM_TOKENS)


@pytest.fixture(scope="module")
def bases(shared, tmp_path_factory):
    """stories260K; the same with an `lm_head` of its own; and that with the template of Llama 2."""
    tied, folder = shared / "data" / "models" / "stories260K", tmp_path_factory.mktemp("bases")
    config, weights = LlamaConfig.from_pretrained(tied), LlamaForCausalLM.from_pretrained(tied).state_dict()
    config.tie_word_embeddings = False
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights)
    for name in ("untied", "untied_llama2"):
        model.save_pretrained(folder / name)
        tokenizer = load_tokenizer(tied)
        tokenizer.chat_template = load_template("llama2") if name == "untied_llama2" else None
        tokenizer.save_pretrained(folder / name)
    shutil.copytree(tied, folder / "tied", copy_function=shutil.copyfile)
    return folder


@pytest.fixture(params=CASES)
def case(request, bases, shared):
    """Base, adapter, rows, the text of a message, and the model and tokenizer of stock libraries."""
    base, adapter, rows, text = CASES[request.param]
    model = LlamaForCausalLM.from_pretrained(bases / base)
    model.resize_token_embeddings(rows)
    stock = PeftModel.from_pretrained(model, shared / "cases" / adapter).eval()
    return bases / base, shared / "cases" / adapter, rows, text, (stock, load_tokenizer(shared / "cases" / adapter))


def continued(stock, ids, from_start=False):
    """The text of the most likely tokens after some ids, or of all."""
    model, tokenizer = stock
    settings = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(input_ids=torch.tensor([ids]), **settings)[0]
    return tokenizer.decode(tokens[0 if from_start else len(ids) :], skip_special_tokens=True)


def test_load_and_merge(case, tmp_path):
    base, adapter, rows, text, (stock, expected) = case
    merge_adapter(base, adapter, tmp_path / "merged")
    ids = torch.tensor([[1, 5, 9, rows - 1, rows - 2, 40]])
    for model, tokenizer in (load(base, adapter=adapter), load(tmp_path / "merged")):
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, stock(ids).logits, atol=2e-5, rtol=2e-5)
        assert tokenizer.get_vocab() == expected.get_vocab() and len(tokenizer) == rows == model.config.vocab_size
        if text is None:
            assert tokenizer.chat_template is None
        else:
            messages = [{"role": "user", "content": "Hi"}]
            assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text


def test_generate(case, tmp_path):
    base, adapter, _, _, stock = case
    done = run_here("tinyllama-hf", "generate", base, PROMPT, "--adapter", adapter, *GREEDY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.removesuffix("\n") == continued(stock, stock[1](PROMPT).input_ids, from_start=True)


def test_chat(case, tmp_path):
    base, adapter, _, text, stock = case
    words = ("tinyllama-hf", "chat", base, "--adapter", adapter, *GREEDY)
    done = run_here(*words, cwd=tmp_path, stdin="Hi\n")
    if text is None:  # neither has a template
        assert done.returncode == 2 and "the tokenizer has no chat template" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        ids = stock[1](text, add_special_tokens=False).input_ids
        assert done.stdout.strip() == continued(stock, ids).strip()


@pytest.mark.parametrize("case", CHATS, indirect=True)
def test_serve(case, tmp_path):
    pytest.importorskip("openai")
    from tests.serving.served import Server, chat

    base, adapter, _, text, stock = case
    server = Server(base, tmp_path, "--adapter", adapter)
    try:
        answer = chat(server.client, "Hi", model=base.name, max_tokens=NUM_TOKENS)
    finally:
        server.stop()
    ids = stock[1](text, add_special_tokens=False).input_ids
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.choices[0].message.content.strip() == continued(stock, ids).strip()


class TestAnotherBase:
    """The message names the base that the adapter was trained on."""

    def test_one_matrix_for_two(self, bases, shared):
        """On the tied model, one of the adapter's embeddings and output matrix would be lost."""
        adapter = shared / "cases" / "ad_un_resized"
        with pytest.raises(InputError, match=r"ad_un_resized: has another output matrix .* trained on \('untied'\)"):
            load(bases / "tied", adapter=adapter)

    def test_other_shapes(self, shared, nano_folder, tmp_path):
        for words in ("generate", "chat", "serve", "merge"):
            adapter = (shared / "cases" / "ad_tmpl",)
            adapter = (*adapter, "--output", "out") if words == "merge" else ("--adapter", *adapter)
            done = run_here("tinyllama-hf", words, nano_folder, *adapter, cwd=tmp_path)
            assert done.returncode == 2 and "give the model it was trained on ('untied')" in done.stderr, words
