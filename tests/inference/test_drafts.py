"""Drafts for the commands: which are accepted, and what is printed."""

import copy

import pytest
import torch

from tests.conftest import run_here
from tests.exactness import assert_greedy
from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load, load_tokenizer
from tinyllama_hf.decoding.proposals import ModelProposer, first_layers
from tinyllama_hf.errors import InputError
from tinyllama_hf.inference.generation import generate_ids, generate_text
from tinyllama_hf.inference.load import load_draft
from tinyllama_hf.inference.options import Sampling


@pytest.fixture(scope="module")
def stories(shared):
    return load(shared / "data" / "models" / "stories260K", dtype=torch.float32)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 6))])
def test_a_stranger_as_draft_changes_nothing(tokenizer_folder, seed):
    """Random pairs of different depth: hardly any token is accepted, and rows end at end-of-sequence."""
    tokenizer = load_tokenizer(tokenizer_folder)
    torch.manual_seed(seed)
    target, stranger = (
        TinyLlamaForCausalLM(
            TinyLlamaConfig.preset("micro", vocab_size=512, max_position_embeddings=64, num_hidden_layers=layers)
        ).eval()
        for layers in (3, 1)
    )
    for model in (target, stranger):
        model.lm_head.weight.data[tokenizer.eos_token_id] *= 3
    draft = ModelProposer(stranger)
    for prompt in ("a", "return self", "    def "):
        alone = generate_text(target, tokenizer, prompt, 40, temperature=0)
        assert generate_text(target, tokenizer, prompt, 40, temperature=0, seed=0, draft=draft) == alone
        assert draft.statistics.drafted > 0 or draft.statistics.new_tokens < 3


def test_a_quantized_target(stories, shared):
    """The forward passes of the target over several tokens use the quantized layers."""
    pytest.importorskip("bitsandbytes")
    target, tokenizer = load(shared / "data" / "models" / "stories260K", dtype=torch.float32, quantization="int8")
    draft = ModelProposer(stories[0])
    prompt = tokenizer("Once upon a time")["input_ids"]
    written = prompt + generate_ids(target, tokenizer, prompt, 60, Sampling(0, 1.0), draft=draft, seeded=True)
    assert_greedy(target, torch.tensor([written]), torch.ones(1, len(prompt), dtype=torch.long))
    assert tokenizer.decode(written, skip_special_tokens=True).startswith("Once upon a time, there was a")
    assert draft.statistics.target_passes < draft.statistics.new_tokens / 2


@pytest.mark.parametrize("name", ["lookup", "layers:3"])
def test_drafts_without_another_model(stories, name):
    model, tokenizer = stories
    draft = load_draft(name, model, tokenizer)
    alone = generate_text(model, tokenizer, "Once upon a time", 80, temperature=0)
    assert generate_text(model, tokenizer, "Once upon a time", 80, temperature=0, seed=0, draft=draft) == alone
    assert draft.statistics.drafted > 0 and draft.statistics.target_passes < 80


def test_a_seed_decides(stories):
    model, tokenizer = stories
    draft = ModelProposer(first_layers(model, 3))
    texts = [generate_text(model, tokenizer, "Tom", 30, temperature=1.0, seed=s, draft=draft) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_draft_that_is_the_target_is_always_right(stories):
    model, tokenizer = stories
    draft = ModelProposer(copy.deepcopy(model))
    generate_text(model, tokenizer, "Once upon a time", 60, temperature=0, seed=0, draft=draft)
    assert draft.statistics.accepted == draft.statistics.drafted
    assert draft.statistics.target_passes < draft.statistics.new_tokens / 2


@pytest.fixture
def pair(tokenizer_folder, tmp_path):
    for name, vocab_size in (("target", 512), ("draft", 512), ("other", 384)):
        torch.manual_seed(0)
        config = TinyLlamaConfig.preset(
            "micro", vocab_size=vocab_size, max_position_embeddings=64 if name != "draft" else 32
        )
        TinyLlamaForCausalLM(config).save_pretrained(tmp_path / name)
        load_tokenizer(tokenizer_folder).save_pretrained(tmp_path / name)
    return tmp_path


class TestRefusals:
    def test_another_size_of_vocabulary(self, pair):
        target = load(pair / "target")
        with pytest.raises(InputError, match="--draft: its vocabulary has 384 entries, the target's 512"):
            load_draft(str(pair / "other"), *target)

    def test_other_entries(self, pair, documents):
        from tinyllama_hf.data.train_tokenizer import train_tokenizer

        target = load(pair / "target")
        for size in (512, 400):  # a vocabulary of another size cannot be trimmed to the target's
            train_tokenizer(documents[::2], size, pair / f"tokenizer-{size}").save_pretrained(pair / "draft")
            with pytest.raises(
                InputError, match=f"draft: its tokenizer has {size} tokens, the target's 512, and they"
            ):
                load_draft(str(pair / "draft"), *target)

    def test_a_shorter_context(self, pair):
        target = load(pair / "target")
        draft = load_draft(str(pair / "draft"), *target)
        with pytest.raises(InputError, match="exceed the draft's context of 32"):
            generate_text(*target, "word " * 8, 30, draft=draft)

    def test_names(self, pair):
        target = load(pair / "target")
        with pytest.raises(InputError, match="--draft layers:two: "):
            load_draft("layers:two", *target)
        with pytest.raises(InputError, match="first_layers=9: must be from 1 to"):
            load_draft("layers:9", *target)
        with pytest.raises(InputError, match="nowhere/at-all cannot be fetched from the Hub"):
            load_draft("nowhere/at-all", *target)

    def test_the_command(self, pair):
        done = run_here("tinyllama-hf", "generate", "target", "a", "--draft", "other", cwd=pair)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: --draft: its vocabulary has 384 entries, the target's 512")

    def test_the_command_prints_what_was_accepted(self, pair):
        options = ("--temperature", "0", "--max-new-tokens", "12")
        alone = run_here("tinyllama-hf", "generate", "target", "a", *options, cwd=pair)
        done = run_here(
            "tinyllama-hf", "generate", "target", "a", *options, "--draft", "target", "--seed", "1", cwd=pair
        )
        assert done.returncode == 0 and done.stdout == alone.stdout
        assert done.stderr.startswith("draft: 100 % of ") and done.stderr.count("\n") == 1, done.stderr
