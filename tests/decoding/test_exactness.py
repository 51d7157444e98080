"""Greedy output of every draft equals stock `generate`: random and trained models, ragged batches, processors."""

import copy
import random

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.exactness import Reference, compare
from tinyllama_hf import TinyLlamaForCausalLM, load
from tinyllama_hf.decoding.proposals import PromptLookup, first_layers


VOCABULARY = 128
OPTIONS = (
    {"max_new_tokens": 32, "eos_token_id": None},
    {"max_new_tokens": 32, "eos_token_id": 7},
    {"max_new_tokens": 32, "eos_token_id": 7, "repetition_penalty": 1.3},
    {"max_new_tokens": 32, "eos_token_id": 7, "no_repeat_ngram_size": 2},
)
LLAMA = {"vocab_size": VOCABULARY, "intermediate_size": 96, "max_position_embeddings": 96, "num_hidden_layers": 3}
KINDS = {
    "grouped": (LlamaForCausalLM, LlamaConfig(**LLAMA, hidden_size=64, num_attention_heads=8, num_key_value_heads=2)),
    "multi_head": (LlamaForCausalLM, LlamaConfig(**LLAMA, hidden_size=48, num_attention_heads=3)),
    "multi_query": (
        LlamaForCausalLM,
        LlamaConfig(**LLAMA, hidden_size=64, num_attention_heads=4, num_key_value_heads=1),
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**LLAMA, hidden_size=64, num_attention_heads=4, num_key_value_heads=2)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=VOCABULARY, n_embd=48, n_layer=3, n_head=3, n_positions=96)),
    "gpt_neox": (
        GPTNeoXForCausalLM,
        GPTNeoXConfig(**LLAMA, hidden_size=48, num_attention_heads=3),
    ),
    "opt": (
        OPTForCausalLM,
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            word_embed_proj_dim=48,
            ffn_dim=96,
            num_hidden_layers=3,
            num_attention_heads=3,
            max_position_embeddings=96,
        ),
    ),
}


def random_model(kind: str, seed: int):
    """Returns a random model with wide weights, so that its output depends on its input."""
    torch.manual_seed(seed)
    model_class, config = KINDS[kind]
    model = model_class(copy.deepcopy(config)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    model.generation_config.eos_token_id = None
    return model


def near(model, spread: float, seed: int):
    """Returns a copy with noise on its weights: a draft that is right in part."""
    torch.manual_seed(seed)
    draft = copy.deepcopy(model)
    for parameter in draft.parameters():
        parameter.data += spread * torch.randn_like(parameter) * parameter.std()
    return draft


def ragged_prompts(number: int, seed: int, longest: int = 40) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(8, VOCABULARY) for _ in range(generator.randint(1, longest))] for _ in range(number)]


QUICK = ("grouped", "qwen3", "gpt2", "opt")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in QUICK else pytest.mark.slow) for k in KINDS])
def test_random_models(kind):
    model = random_model(kind, 0)
    reference, draft = Reference(model), near(model, 0.03, 1)
    prompts = ragged_prompts(5, 2)
    tally = compare(reference, model, draft, prompts, OPTIONS, (1, 5), (4,))
    lookup = compare(reference, model, PromptLookup(), prompts, OPTIONS[:2], (5,), (3,))
    print(kind, tally, lookup, sep="\n")
    assert tally.statistics.drafted > 0 and tally.statistics.row_passes < tally.statistics.new_tokens
    assert tally.ties + lookup.ties <= 0.02 * (tally.sequences + lookup.sequences)


@pytest.fixture(scope="module")
def stories(shared):
    folder = shared / "data" / "models" / "stories260K"
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    target, tokenizer = load(folder, dtype=torch.float32)
    return Reference(stock), target, tokenizer


STORIES = (
    *("Once upon a time", "Tom", "The dog and the cat", '"No," said', "One day, a big", "Lily likes cake and milk"),
    *("They", "She was very happy because", "In the park there was a", "Mom said to Ben that he must not"),
    *("It was a sunny day and", "The bird", "He saw a red ball and wanted to", "Why", "At night the moon"),
    "Sue had a toy car. It was",
)
EXTRA = (
    {"max_new_tokens": 48},
    {"max_new_tokens": 48, "repetition_penalty": 1.2},
    {"max_new_tokens": 48, "no_repeat_ngram_size": 3},
)


@pytest.mark.slow
def test_a_trained_model(stories):
    reference, target, tokenizer = stories
    prompts = [tokenizer(text)["input_ids"] for text in STORIES[:8]]
    tally = compare(reference, target, first_layers(target, 4), prompts, EXTRA[:2], (1, 7), (3,))
    print(tally)
    assert tally.statistics.accepted > 100 and tally.statistics.row_passes < tally.statistics.new_tokens
    assert tally.ties <= 1


@pytest.mark.slow
def test_two_thousand_sequences(stories, smollm2):
    """All kinds of drafts and targets; up to one tie in 500 sequences is allowed."""
    tallies = {}
    for number, kind in enumerate(KINDS):
        model = random_model(kind, 10 + number)
        reference, prompts = Reference(model), ragged_prompts(16, number)
        for spread, batches in ((0.02, (16,)), (0.1, (1, 2, 13))):
            draft = near(model, spread, number)
            tallies[kind, spread] = compare(reference, model, draft, prompts, OPTIONS, batches, (1, 5))
    reference, target, tokenizer = stories
    prompts = [tokenizer(text)["input_ids"] for text in STORIES]
    for name, draft in (("4 layers", first_layers(target, 4)), ("look-up", PromptLookup())):
        tallies["stories260K", name] = compare(reference, target, draft, prompts, EXTRA, (1, 4, 11), (2, 7, 8))
    tallies["stories260K", "16 rows"] = compare(
        reference, target, first_layers(target, 3), prompts, EXTRA, (16,), (4,)
    )
    for name, tally in smollm2_tallies(smollm2):
        tallies["SmolLM2-135M", name] = tally
    for (model, draft), tally in tallies.items():
        print(f"{model}, draft {draft}: {tally}")
    sequences, ties = (sum(getattr(tally, name) for tally in tallies.values()) for name in ("sequences", "ties"))
    print(f"{sequences} sequences, {ties} differ where two logits lie within 1e-4")
    assert sequences >= 2000 and ties <= 0.002 * sequences
    for tally in tallies.values():
        assert tally.statistics.drafted > 0
    assert sum(t.statistics.row_passes for t in tallies.values()) < sum(
        t.statistics.new_tokens for t in tallies.values()
    )


def smollm2_tallies(folder):
    """Trained weights: the 4-bit model is often a good draft of itself, its first layers rarely."""
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    target = TinyLlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    quantized, _ = load(folder, quantization="nf4")
    reference = Reference(stock)
    texts = (
        *(
            "The capital of France is",
            "Photosynthesis turns",
            "def add(a, b):",
            "Once upon a time there was a king who",
        ),
        *("Water", "1, 2, 3, 4,", "The most important thing about bread is", "My favorite"),
    )
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    options = ({"max_new_tokens": 20}, {"max_new_tokens": 20, "repetition_penalty": 1.2})
    yield "nf4", compare(reference, target, quantized, prompts, options, (8,), (3,))
    yield "first 10 layers", compare(reference, target, first_layers(target, 10), prompts, options[:1], (1, 7), (2,))
