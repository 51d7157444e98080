"""Drafts: the target's own output with fewer of its passes, and figures that are counted."""

import copy

import pytest
import torch
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load, load_tokenizer
from tinyllama_hf.errors import InputError
from tinyllama_hf.inference.drafts import Draft, DraftStatistics
from tinyllama_hf.inference.generation import generate_text


def first_layers(model, num_layers):
    """A draft cut from its target."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = num_layers
    cut = TinyLlamaForCausalLM(config).eval()
    cut.load_state_dict({n: w for n, w in model.state_dict().items() if n in cut.state_dict()})
    cut.generation_config = copy.deepcopy(model.generation_config)
    return cut


@pytest.fixture(scope="module")
def stories(shared):
    return load(shared / "data" / "models" / "stories260K", dtype=torch.float32)


def close_call(model, ids, position) -> bool:
    """Whether the two best logits for a position are closer than rounding may decide."""
    with torch.inference_mode():
        best = model(torch.tensor([ids[:position]])).logits[0, -1].topk(2).values
    return (best[0] - best[1]).item() < 1e-4


PROMPTS = (
    "Once upon a time",
    "Tom",
    "The dog and the cat",
    '"No," said',
    "One day, a big",
    "",
    "Lily likes cake and milk",
    "They",
)


def test_greedy_output_is_the_targets_own(stories):
    """A trained target; drafts from nearly itself to poor. Ties closer than 1e-4 would be exempt; they are counted."""
    model, tokenizer = stories
    ties = accepted = 0
    for num_layers in (4, 3, 1):
        draft = Draft(first_layers(model, num_layers), tokenizer, model, tokenizer)
        for prompt in PROMPTS:
            alone = generate_text(model, tokenizer, prompt, 60, temperature=0)
            helped = generate_text(model, tokenizer, prompt, 60, temperature=0, draft=draft)
            counted = draft.statistics
            assert counted.drafted > 0 and counted.new_tokens == counted.accepted + counted.target_passes
            assert 0 <= counted.accepted <= counted.drafted
            accepted += counted.accepted
            if helped != alone:
                a, b = (tokenizer(text)["input_ids"] for text in (alone, helped))
                place = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
                assert close_call(model, a, place), f"{prompt!r} with {num_layers} layers"
                ties += 1
    print(f"{ties} ties")
    assert ties <= 1 and accepted > 200


@pytest.mark.parametrize("seed", range(6))
def test_a_stranger_as_draft_changes_nothing(tokenizer_folder, seed):
    """Random pairs, of different width and depth: next to nothing is accepted, with the end of text somewhere inside."""
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
    draft = Draft(stranger, tokenizer, target, tokenizer)
    for prompt in ("a", "return self", "    def "):
        alone = generate_text(target, tokenizer, prompt, 40, temperature=0)
        assert generate_text(target, tokenizer, prompt, 40, temperature=0, draft=draft) == alone
        assert draft.statistics.drafted > 0


def test_the_figures_are_those_of_the_library(stories, monkeypatch):
    """What our counted passes say, against what its candidate generator was told after each round."""
    rounds = []
    update = AssistedCandidateGenerator.update_candidate_strategy

    def spy(self, input_ids, scores, num_matches):
        rounds.append((scores.shape[1] - 1, int(num_matches)))
        return update(self, input_ids, scores, num_matches)

    monkeypatch.setattr(AssistedCandidateGenerator, "update_candidate_strategy", spy)
    model, tokenizer = stories
    draft = Draft(first_layers(model, 3), tokenizer, model, tokenizer)
    for temperature in (0, 0.8):
        rounds.clear()
        generate_text(model, tokenizer, "Once upon a time", 70, temperature=temperature, seed=0, draft=draft)
        drafted, accepted = (sum(column) for column in zip(*rounds, strict=True))
        counted = draft.statistics
        assert (counted.drafted, counted.accepted, counted.target_passes) == (drafted, accepted, len(rounds))


def test_a_quantised_target(stories, shared):
    """The target's passes over several tokens at once go through the quantised layers."""
    pytest.importorskip("bitsandbytes")
    target, tokenizer = load(shared / "data" / "models" / "stories260K", dtype=torch.float32, quantization="int8")
    draft = Draft(stories[0], tokenizer, target, tokenizer)
    text = generate_text(target, tokenizer, "Once upon a time", 60, temperature=0, draft=draft)
    assert text.startswith("Once upon a time, there was a little")
    assert draft.statistics.target_passes < draft.statistics.new_tokens / 2


def test_a_seed_decides(stories):
    model, tokenizer = stories
    draft = Draft(first_layers(model, 3), tokenizer, model, tokenizer)
    texts = [generate_text(model, tokenizer, "Tom", 30, temperature=1.0, seed=s, draft=draft) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_draft_that_is_the_target_is_always_right(stories):
    model, tokenizer = stories
    draft = Draft(first_layers(model, model.config.num_hidden_layers), tokenizer, model, tokenizer)
    generate_text(model, tokenizer, "Once upon a time", 60, temperature=0, draft=draft)
    assert draft.statistics.accepted == draft.statistics.drafted
    assert draft.statistics.target_passes < draft.statistics.new_tokens / 2


def test_one_generation_does_not_change_the_next(stories):
    """The library adapts the draft's own generation config; ours comes back as it was."""
    model, tokenizer = stories
    draft = Draft(first_layers(model, 2), tokenizer, model, tokenizer)
    draft.model.generation_config.num_assistant_tokens_schedule = "heuristic"
    before = draft.model.generation_config.to_dict()
    counted = []
    for _ in range(2):
        generate_text(model, tokenizer, "Tom", 50, temperature=0, draft=draft)
        counted.append(draft.statistics[:3])
    assert counted[0] == counted[1] and draft.model.generation_config.to_dict() == before
    model.generate(torch.tensor([[1, 5]]), assistant_model=draft.model, max_new_tokens=50, do_sample=False)
    assert draft.model.generation_config.to_dict() != before, "the library no longer does it: the copy can go"


def test_sampled_output_follows_the_target(stories):
    """A token that the draft proposed, over many draws, against the target's exact distribution (chi-square, 5 classes).

    With two new tokens the first one is drafted.
    """
    model, tokenizer = stories
    draft = Draft(first_layers(model, 2), tokenizer, model, tokenizer)
    ids = torch.tensor([tokenizer("Once upon a time, there was a")["input_ids"]])
    with torch.inference_mode():
        first = model(ids).logits[0, -1].softmax(-1)
    top = first.topk(4).indices.tolist()
    expected = [first[i].item() for i in top] + [1 - first[top].sum().item()]
    torch.manual_seed(0)
    counts, draws = [0] * 5, 1500
    for _ in range(draws):
        output = draft.generate(
            model,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            max_new_tokens=2,
            pad_token_id=0,
        )
        assert draft.statistics.drafted == 1
        token = output[0, ids.shape[1]].item()
        counts[top.index(token) if token in top else 4] += 1
    chi_square = sum((c - draws * e) ** 2 / (draws * e) for c, e in zip(counts, expected, strict=True))
    assert chi_square < 18.5, (counts, expected)  # p = 0.001 at 4 degrees of freedom


def test_statistics_line():
    line = str(DraftStatistics(drafted=180, target_passes=50, new_tokens=160, seconds=3.14))
    assert line == "draft: 61 % of 180 drafted tokens accepted, 50 target passes for 160 tokens, 3.1 s"


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
        target, draft = load(pair / "target"), load(pair / "other")
        with pytest.raises(InputError, match="--draft: its vocabulary has 384 entries, the model's 512"):
            Draft(*draft, *target)

    def test_other_entries(self, pair, documents):
        from tinyllama_hf.data.tokenizer import train_tokenizer

        target, (model, _) = load(pair / "target"), load(pair / "draft")
        other = train_tokenizer(documents[::2], 512, pair / "tokenizer")
        with pytest.raises(InputError, match="its vocabulary has 512 entries as the model's, but other ones"):
            Draft(model, other, *target)

    def test_a_shorter_context(self, pair):
        target = load(pair / "target")
        draft = Draft(*load(pair / "draft"), *target)
        with pytest.raises(InputError, match="longer than the draft's context of 32"):
            generate_text(*target, "word " * 8, 30, draft=draft)

    def test_the_command(self, pair, run_command):
        done = run_command("tinyllama-hf", "generate", "target", "a", "--draft", "other", cwd=pair)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: --draft: its vocabulary has 384 entries, the model's 512; a draft must")

    def test_the_command_prints_what_was_accepted(self, pair, run_command):
        options = ("--temperature", "0", "--max-new-tokens", "12")
        alone = run_command("tinyllama-hf", "generate", "target", "a", *options, cwd=pair)
        done = run_command("tinyllama-hf", "generate", "target", "a", *options, "--draft", "target", cwd=pair)
        assert done.returncode == 0 and done.stdout == alone.stdout
        assert done.stderr.startswith("draft: 100 % of ") and done.stderr.count("\n") == 1, done.stderr
