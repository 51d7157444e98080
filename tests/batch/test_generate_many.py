"""Many prompts at a time: each gets the output that it gets alone, whatever else is in the batch."""

import copy
import itertools

import numpy as np
import pytest
import torch
from transformers import WatermarkingConfig

from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load, load_tokenizer
from tinyllama_hf.batch.generate_many import Request, generate_many
from tinyllama_hf.decoding.acceptance import draw
from tinyllama_hf.errors import InputError
from tinyllama_hf.inference.generation import generate_ids, stop_token_ids
from tinyllama_hf.inference.load import load_draft
from tinyllama_hf.inference.options import Sampling


GREEDY = Sampling(0, 1.0)
TEXTS = (
    *("Once upon a time", "Tom", "", "The dog and the cat went to the park.", "Lily likes cake"),
    *("One day, a big red car", '"No," said', "They", "x"),
    "A girl named Sue saw a bird. The bird was blue and it sang a song.",
)


@pytest.fixture(scope="module")
def stories(shared):
    return load(shared / "data" / "models" / "stories260K", dtype=torch.float32)


@pytest.fixture
def random_model(tokenizer_folder):
    torch.manual_seed(0)
    model = TinyLlamaForCausalLM(TinyLlamaConfig.preset("micro", vocab_size=512, max_position_embeddings=96)).eval()
    return model, load_tokenizer(tokenizer_folder)


def requests(tokenizer, new_tokens=40):
    """Returns prompts of different lengths with different `max_new_tokens`."""
    return [Request(i, tokenizer(text)["input_ids"], new_tokens + 3 * i) for i, text in enumerate(TEXTS)]


def by_key(model, tokenizer, wanted, *arguments, **options):
    completions = list(generate_many(model, tokenizer, wanted, *arguments, **options))
    assert len(completions) == len(wanted)
    return {completion.key: completion for completion in completions}


def close_call(model, ids) -> bool:
    """Returns whether the two best logits of the next token differ by less than rounding."""
    with torch.inference_mode():
        best = model(torch.tensor([ids])).logits[0, -1].topk(2).values
    return (best[0] - best[1]).item() < 1e-4


@pytest.mark.parametrize(("batch_size", "stops"), [(1, True), (3, False), (16, True)])
def test_each_gets_what_it_gets_by_itself(stories, batch_size, stops):
    """A trained model in fp32; rows end at their limits, or at a period that counts as end-of-sequence."""
    model, tokenizer = stories
    kept = model.generation_config.eos_token_id
    stop_tokens = [kept, *(tokenizer.convert_tokens_to_ids(["."]) if stops else [])]
    model.generation_config.eos_token_id = stop_tokens
    try:
        found = by_key(model, tokenizer, requests(tokenizer), batch_size, GREEDY)
    finally:
        model.generation_config.eos_token_id = kept
    ties = 0
    for request in requests(tokenizer):
        alone = generate_ids(model, tokenizer, request.ids, request.max_new_tokens, GREEDY, eos_token_id=stop_tokens)
        ended = alone[-1] in stop_tokens
        completion = found[request.key]
        if completion.ids != alone[: len(alone) - ended]:
            same = next(i for i, (a, b) in enumerate(zip(completion.ids, alone, strict=False)) if a != b)
            assert close_call(model, [*request.ids, *alone[:same]])
            ties += 1
        assert completion.finish_reason == ("stop" if ended else "length") or ties
    assert ties <= 1
    assert len({len(completion.ids) for completion in found.values()}) > 5


class TestDraws:
    def test_follow_from_seed_and_key_alone(self, random_model):
        model, tokenizer = random_model
        wanted = requests(tokenizer, 20)
        sampling = Sampling(1.3, 0.9)
        found = [by_key(model, tokenizer, wanted, size, sampling, seed=5) for size in (3, 10)]
        assert found[0] == found[1]
        assert by_key(model, tokenizer, wanted[4:], 1, sampling, seed=5) == {k: found[0][k] for k in range(4, 10)}
        others = [by_key(model, tokenizer, wanted, 10, sampling, **other) for other in ({"seed": 6}, {}, {})]
        assert all(a != b for a, b in itertools.combinations([found[0], *others], 2))

    @pytest.mark.parametrize("seed", [5, None])
    def test_equal_prompts_are_continued_differently(self, random_model, seed):
        model, tokenizer = random_model
        wanted = [Request(key, [1, 7, 8], 12) for key in range(6)]
        found = by_key(model, tokenizer, wanted, 4, Sampling(1.3, 1.0), seed=seed)
        assert len({tuple(completion.ids) for completion in found.values()}) == 6

    def test_have_the_distribution(self):
        """50,000 samples with probabilities from 0.5 to 0.001, and one of 0: each within 4.5 standard deviations."""
        probabilities = torch.tensor([0.5, 0.2, 0.0, 0.15, 0.1, 0.049, 0.001], dtype=torch.float64)
        rows = 50_000
        numbers = torch.from_numpy(np.stack([np.random.default_rng([1, key]).random(2) for key in range(rows)]))
        drawn = draw(probabilities.float().expand(rows, 2, -1), numbers)
        for counts in (torch.bincount(drawn[:, step], minlength=7) for step in (0, 1)):
            deviations = (counts - rows * probabilities) / (rows * probabilities * (1 - probabilities)).sqrt().clamp(
                min=1
            )
            assert deviations.abs().max() < 4.5

    def test_the_largest_number_draws_a_token_that_can_be_drawn(self):
        """The largest number below 1, times the sum, may round up to the sum. No token with probability follows it."""
        largest = torch.full((100, 1), 1 - 2**-53, dtype=torch.float64)
        weights = torch.rand(100, 1, 9, generator=torch.Generator().manual_seed(0))
        weights[..., 6:] = 0
        weights[..., 0] = 0
        assert (draw(weights, largest) == 5).all() and (draw(weights, 0 * largest) == 1).all()

    @pytest.mark.parametrize("settings", [{"min_p": 1.0}, {"epsilon_cutoff": 0.99}], ids=str)
    def test_settings_of_the_folder_count(self, random_model, settings):
        """These keep only the most likely token, as they do for one prompt."""
        model, tokenizer = random_model
        wanted, sampling = requests(tokenizer, 20), Sampling(1.3, 0.9)
        greedy = by_key(model, tokenizer, wanted, 4, GREEDY)
        assert by_key(model, tokenizer, wanted, 4, sampling, seed=5) != greedy
        model.generation_config.update(**settings)
        assert by_key(model, tokenizer, wanted, 4, sampling, seed=5) == greedy
        first = wanted[0]
        alone = generate_ids(model, tokenizer, first.ids, first.max_new_tokens, sampling)
        assert alone == generate_ids(model, tokenizer, first.ids, first.max_new_tokens, GREEDY)

    def test_a_watermark_is_drawn_with(self, random_model):
        """It is applied after the warpers and before sampling."""
        model, tokenizer = random_model
        watermark = WatermarkingConfig(bias=1000.0)
        model.generation_config.watermarking_config = watermark
        processor = watermark.construct_processor(model.config.vocab_size, "cpu")
        for request in requests(tokenizer, 20):
            ids = by_key(model, tokenizer, [request], 1, Sampling(1.0, 1.0), seed=5)[request.key].ids
            text = [*request.ids, *ids]
            for end in range(len(request.ids), len(text)):
                assert text[end] in processor._get_greenlist_ids(torch.tensor(text[:end]))

    @pytest.mark.parametrize("sampling", [Sampling(0.7, 1.0), Sampling(1.5, 0.6)])
    def test_are_the_models(self, random_model, sampling):
        """The first token of 4000 equal prompts, against an independent computation of temperature and top-p."""
        model, tokenizer = random_model
        ids = tokenizer("class")["input_ids"]
        model.lm_head.weight.data *= 4  # confident, as a trained model
        with torch.inference_mode():
            exact = (model(torch.tensor([ids])).logits[0, -1].double() / sampling.temperature).softmax(-1)
        order = exact.argsort(descending=True)
        kept = order[: int((exact[order].cumsum(0) < sampling.top_p).sum()) + 1]
        exact = torch.zeros_like(exact).index_put((kept,), exact[kept])
        exact /= exact.sum()
        found = by_key(model, tokenizer, [Request(i, ids, 1) for i in range(4000)], 2000, sampling, seed=0)
        drawn = [completion.ids[0] if completion.ids else tokenizer.eos_token_id for completion in found.values()]
        counts = torch.bincount(torch.tensor(drawn), minlength=512)
        assert not counts[exact == 0].any()
        deviations = (counts - 4000 * exact) / (4000 * exact * (1 - exact)).sqrt().clamp(min=1)
        assert deviations.abs().max() < 5
        assert (counts > 0).sum() > 20


@pytest.mark.parametrize("name", [None, "layers:1", "lookup"])
class TestPlacesAreFilled:
    """Rows finish at different times and new ones join, which the draft has not read. A seed keeps drafting on."""

    @pytest.fixture
    def random_model(self, random_model):
        """Returns a model in which the first layer alone often predicts the same token."""
        for layer in random_model[0].model.layers[1:]:
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight.data *= 0.3
        return random_model

    def draft(self, name, model, tokenizer):
        return load_draft(name, model, tokenizer) if name else None

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            pytest.param({"repetition_penalty": 1.4}, marks=pytest.mark.slow),
            {"no_repeat_ngram_size": 2, "min_new_tokens": 9},
            pytest.param({"forced_eos_token_id": 9}, marks=pytest.mark.slow),
            {"min_length": 22, "eos_token_id": list(range(3, 120))},
        ],
        ids=lambda settings: ",".join(settings),
    )
    def test_greedy_output_is_each_prompts_own(self, random_model, name, settings):
        """Processors count each row's own tokens, whichever rows it joined with."""
        model, tokenizer = random_model
        model.generation_config.update(**settings)
        wanted = requests(tokenizer, 4)
        if not settings:
            wanted += [Request(100 + r.key, r.ids[::-1], 3 + r.key) for r in wanted]
        stops = stop_token_ids(model, tokenizer)
        alone = {
            r.key: generate_ids(model, tokenizer, r.ids, r.max_new_tokens, GREEDY, eos_token_id=stops) for r in wanted
        }
        for batch_size in (3,) if settings else (1, 3, 8):
            draft = self.draft(name, model, tokenizer)
            found = by_key(model, tokenizer, wanted, batch_size, GREEDY, seed=0, draft=draft)
            for key, ids in alone.items():
                kept = ids[:-1] if ids[-1] in stops else ids
                assert found[key].ids == kept, key
            if draft:
                assert draft.statistics.rows == len(wanted) and draft.statistics.drafted > 0
                assert draft.statistics.accepted > 0 or (name == "lookup" and settings), "penalties end what repeats"

    def test_draws_follow_from_seed_and_key_alone(self, random_model, name):
        model, tokenizer = random_model
        draft, sampling = self.draft(name, model, tokenizer), Sampling(0.9, 0.9)
        wanted = requests(tokenizer, 20)
        if name == "lookup":  # text that repeats
            sampling = Sampling(0.2, 0.9)
            wanted = [r._replace(ids=[7, 8, 9] * (2 + r.key)) for r in wanted]
        found = [by_key(model, tokenizer, wanted, size, sampling, seed=5, draft=draft) for size in (3, 10)]
        assert found[0] == found[1]
        assert by_key(model, tokenizer, wanted[4:], 1, sampling, seed=5, draft=draft) == {
            key: found[0][key] for key in range(4, 10)
        }
        assert by_key(model, tokenizer, wanted, 10, sampling, seed=6, draft=draft) != found[0]
        if draft:
            assert 0 < draft.statistics.accepted < draft.statistics.drafted


def test_rotary_angles_that_depend_on_the_length(tokenizer_folder):
    """Within the context they do not depend on it; a drafted token may exceed the context."""
    torch.manual_seed(0)
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = TinyLlamaConfig.preset("micro", vocab_size=512, max_position_embeddings=96, rope_parameters=scaling)
    model, tokenizer = TinyLlamaForCausalLM(config).eval(), load_tokenizer(tokenizer_folder)
    wanted = [Request(i, [5 + i] * (70 - 9 * i), 20) for i in range(5)]
    found = by_key(model, tokenizer, wanted, 3, GREEDY)
    for request in wanted:
        alone = generate_ids(model, tokenizer, request.ids, 20, GREEDY)
        assert found[request.key].ids == [token for token in alone if token != tokenizer.eos_token_id]
    with pytest.raises(InputError, match="its rotary scaling 'dynamic' depends on the longest row"):
        by_key(model, tokenizer, wanted, 3, GREEDY, draft=load_draft("lookup", model, tokenizer))


def test_probabilities_that_are_no_numbers(random_model):
    model, tokenizer = random_model
    model.lm_head.weight.data[7] = torch.nan
    for draft in (None, "layers:1"):
        draft = load_draft(draft, model, tokenizer) if draft else None
        with pytest.raises(RuntimeError, match="probabilities hold nan or inf"):
            by_key(model, tokenizer, requests(tokenizer, 5), 4, Sampling(1.0, 1.0), draft=draft)


def test_no_row_waits_for_the_longest(random_model):
    """Four rows at a time, two of three short: no pass for a finished row, and few passes with less than four rows."""
    model, tokenizer = random_model
    model.generation_config.eos_token_id = tokenizer.eos_token_id = None
    wanted = [Request(i, [5, 6, 7 + i], 60 if i % 3 == 0 else 6) for i in range(24)]
    passes = []
    model.register_forward_pre_hook(lambda _, __, inputs: passes.append(inputs["input_ids"].shape), with_kwargs=True)
    completions = by_key(model, tokenizer, wanted, 4, GREEDY)
    assert [len(completions[r.key].ids) for r in wanted] == [r.max_new_tokens for r in wanted]
    steps = [rows for rows, tokens in passes if tokens == 1]
    assert max(steps) == 4
    assert sum(steps) == sum(r.max_new_tokens - 1 for r in wanted), (
        "the first token comes from the pass over its prompt"
    )
    assert len(steps) < 1.2 * sum(steps) / 4


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0, 0.9)], ids=["greedy", "sampled"])
def test_beams_are_refused(random_model, sampling):
    model, tokenizer = random_model
    model.generation_config.num_beams = 3
    with pytest.raises(InputError, match=r"generation_config\.json of the model: asks for beam_.* \(num_beams 3\)"):
        generate_many(model, tokenizer, requests(tokenizer), 4, sampling)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
        ({"seed": -1}, "--seed -1: "),
        ({"seed": 2**64}, "--seed 18446744073709551616: "),
        (
            {"requests": [Request(7, [1] * 90, 7)]},
            "request 7: 90 tokens plus 7 new tokens exceed the model's context of 96",
        ),
        ({"requests": [Request(7, [1], 0)]}, "request 7: max_new_tokens 0"),
        ({"requests": [Request(7, [], 7)]}, "request 7: empty"),
        ({"requests": [Request(7, [1], 7), Request(7, [2], 7)]}, "requests: two of them have the same key"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refusals(random_model, options, message):
    model, tokenizer = random_model
    options = copy.copy(options)
    wanted = options.pop("requests", [Request(0, [1], 4)])
    with pytest.raises(InputError, match=message):
        generate_many(model, tokenizer, wanted, **options)
