"""`generate` with a draft: stopping criteria, processors, streaming, statistics and refusals, as without a draft."""

import copy

import pytest
import torch
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    MaxLengthCriteria,
    MistralConfig,
    MistralForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)

from tests.exactness import first_difference, left_padded
from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load, load_tokenizer, speculative_generate
from tinyllama_hf.decoding.draft_length import DraftLength
from tinyllama_hf.decoding.proposals import PromptLookup, first_layers
from tinyllama_hf.decoding.ragged_cache import check_full_attention
from tinyllama_hf.decoding.rows import Rows
from tinyllama_hf.decoding.speculative import SpeculativeOutput
from tinyllama_hf.errors import InputError


GREEDY = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
PROMPTS = ([5, 17, 33], [9], [100, 3, 77, 41, 8, 60, 21], [12, 12, 13, 14, 12, 12])


def alone(target, prompt, **options):
    """Returns the target's output for one prompt alone."""
    ids = torch.tensor([prompt])
    output = target.generate(ids, attention_mask=torch.ones_like(ids), **{**GREEDY, **options})
    return output[0, len(prompt) :].tolist()


def together(target, draft, **options):
    """Returns the target's output for all prompts in one batch with a draft."""
    batch = left_padded(PROMPTS)
    output = target.generate(**batch, assistant_model=draft, num_assistant_tokens=4, **{**GREEDY, **options})
    return output[:, batch["input_ids"].shape[1] :].tolist()


def assert_equal(target, draft, **options):
    for prompt, ours in zip(PROMPTS, together(target, draft, **options), strict=True):
        stock = alone(target, prompt, **options)
        assert first_difference(ours, stock) is None, (ours, stock)


class EndsAfter(StoppingCriteria):
    """Ends a row that contains a token a given number of times in succession."""

    def __init__(self, token: int, times: int):
        self.token, self.times = token, times

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids == self.token).sum(dim=1) >= self.times


class OfAllRows(StoppingCriteria):
    def __init__(self, rows, prompt, token):
        self.done, self.prompt, self.token = [False] * rows, prompt, token

    def __call__(self, input_ids, scores, **kwargs):
        for row in range(len(self.done)):
            self.done[row] = self.done[row] or self.token in input_ids[row, self.prompt :].tolist()
        return False not in self.done


class NeedsScores(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return scores.max() > 0


class NeverTheSameTwice(LogitsProcessor):
    """A user-defined processor, which reads the row."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids[:, -1:], -torch.inf)


class TestEveryRowIsAsAlone:
    def test_end_of_sequence(self, target, draft):
        common = [alone(target, prompt)[5] for prompt in PROMPTS]
        assert_equal(target, draft, eos_token_id=common[:2])
        lengths = [len(alone(target, prompt, eos_token_id=common[:2])) for prompt in PROMPTS]
        assert len(set(lengths)) > 1, "rows must end at different places for this to show anything"

    @pytest.mark.parametrize(
        "options",
        [
            {"repetition_penalty": 1.5},
            {"no_repeat_ngram_size": 2},
            {"bad_words_ids": [[7], [33, 5]]},
            {"eos_token_id": 12, "min_new_tokens": 15},
            {"eos_token_id": 12, "forced_eos_token_id": 12},
            {"eos_token_id": 12, "exponential_decay_length_penalty": (4, 1.3)},
            {"begin_suppress_tokens": [12, 40, 41]},
            {"suppress_tokens": [3, 4, 5]},
            {"sequence_bias": [[[7], 3.0], [[8, 9], -2.0]]},
            {"prefix_allowed_tokens_fn": lambda row, ids: list(range(1 + int(ids[-1]) % 3, 128, 3))},
            {"max_new_tokens": 1},
            {"max_length": 20, "max_new_tokens": None},
        ],
        ids=lambda options: next(iter(options)),
    )
    def test_processors_and_limits(self, target, draft, options):
        if "max_length" in options:  # counts the padding in a batch, as stock does: compare with equal lengths
            ids = torch.tensor([PROMPTS[0], PROMPTS[0][::-1]])
            mask = torch.ones_like(ids)
            stock = target.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, max_length=20)
            ours = target.generate(
                ids, attention_mask=mask, do_sample=False, pad_token_id=0, max_length=20, assistant_model=draft
            )
            assert torch.equal(ours, stock)
            return
        assert_equal(target, draft, **options)

    def test_criteria_that_keep_books_of_the_whole_batch(self, target, draft):
        """As in lm-eval: state per row, prompt length with padding, and one result for the whole batch."""
        token = max(range(128), key=alone(target, PROMPTS[0]).count)
        ours = together(target, draft, stopping_criteria=StoppingCriteriaList([OfAllRows(len(PROMPTS), 7, token)]))
        for prompt, new in zip(PROMPTS, ours, strict=True):
            stock = alone(target, prompt, stopping_criteria=StoppingCriteriaList([OfAllRows(1, len(prompt), token)]))
            assert first_difference(new, stock) is None

    def test_beyond_the_context(self, target, draft):
        """Rotary models continue beyond it, as in stock; the draft reads only up to its own context."""
        assert_equal(target, draft, max_new_tokens=80)
        short = copy.deepcopy(draft)
        short.config.max_position_embeddings = 10
        assert_equal(target, short, max_new_tokens=30)
        output = speculative_generate(
            target, short, **left_padded(PROMPTS[2:3]), draft_length=2, return_dict_in_generate=True, **GREEDY
        )
        assert 0 < output.statistics.draft_passes <= 4
        short.config.max_position_embeddings = 4
        assert_equal(target, short)  # a prompt longer than the context of the draft: no drafting

    def test_a_draft_with_an_adapter(self, target, draft):
        from peft import LoraConfig, get_peft_model

        adapted = get_peft_model(copy.deepcopy(draft), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        assert_equal(target, adapted.eval())

    def test_names_in_the_models_own_configuration(self, target, draft):
        own = copy.deepcopy(target)
        own.generation_config.prompt_lookup_num_tokens = 3
        config = GenerationConfig(**GREEDY, num_assistant_tokens=2, return_dict_in_generate=True)
        for options in ({"generation_config": config}, GREEDY | {"return_dict_in_generate": True}):
            output = own.generate(**left_padded(PROMPTS), **options)
            assert output.statistics.draft_passes == 0 and output.sequences.shape[0] == 4
        fixed = target.generate(**left_padded(PROMPTS), generation_config=config, assistant_model=draft).statistics
        assert fixed.plain_rounds <= 2 and fixed.drafted >= 2 * (fixed.target_passes - 3)

    def test_positional_arguments(self, target, draft):
        batch = left_padded(PROMPTS)
        config = GenerationConfig(**GREEDY)
        plain = target.generate(batch["input_ids"], config, None, None, attention_mask=batch["attention_mask"])
        helped = target.generate(
            batch["input_ids"], config, None, None, None, None, draft, attention_mask=batch["attention_mask"]
        )
        assert plain.shape == helped.shape

    def test_a_processor_of_the_users(self, target, draft):
        assert_equal(target, draft, logits_processor=[NeverTheSameTwice()])

    def test_stopping_criteria_inside_the_accepted_block(self, target, draft):
        token = max(range(128), key=alone(target, PROMPTS[0]).count)
        criteria = StoppingCriteriaList([EndsAfter(token, 2)])
        assert_equal(target, draft, stopping_criteria=criteria)
        assert len(alone(target, PROMPTS[0], stopping_criteria=criteria)) < GREEDY["max_new_tokens"]
        assert_equal(target, target, stopping_criteria=criteria)  # a draft that is always right accepts whole blocks

    def test_the_first_layers_and_the_text_as_drafts(self, target):
        assert_equal(target, first_layers(target, 2))
        batch, width = left_padded(PROMPTS), max(map(len, PROMPTS))
        for name in ({"prompt_lookup_num_tokens": 4}, {"assistant_early_exit": 1}):
            output = target.generate(**batch, **name, **GREEDY)[:, width:].tolist()
            for prompt, ours in zip(PROMPTS, output, strict=True):
                assert first_difference(ours, alone(target, prompt)) is None


@pytest.mark.parametrize("text", ["park", ["a big", "!", "mom"]])
def test_stop_strings_in_a_batch(shared, text):
    """transformers (5.23) refuses them with a draft, and supports one prompt."""
    model, tokenizer = load(shared / "data" / "models" / "stories260K", dtype=torch.float32)
    texts = ["Once upon a time", "Tom", "The dog and the cat", "One day, a"]
    batch = left_padded([tokenizer(t)["input_ids"] for t in texts])
    options = {
        "stop_strings": text,
        "tokenizer": tokenizer,
        "max_new_tokens": 60,
        "do_sample": False,
        "pad_token_id": 0,
    }
    draft, width = first_layers(model, 4), batch["input_ids"].shape[1]
    ours = model.generate(**batch, assistant_model=draft, **options)[:, width:].tolist()
    stopped = 0
    for words, new in zip(texts, ours, strict=True):
        ids = tokenizer(words, return_tensors="pt")["input_ids"]
        stock = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()
        assert first_difference(new, stock) is None
        stopped += len(stock) < 60
    assert stopped
    with pytest.raises(ValueError):
        LlamaForCausalLM.generate(model, batch["input_ids"][:1], assistant_model=draft, **options)


class Recorder:
    def __init__(self):
        self.tokens, self.puts, self.ended = [], 0, False

    def put(self, value):
        self.puts += 1
        self.tokens += value.reshape(-1).tolist()

    def end(self):
        self.ended = True


class TestOutput:
    def test_a_streamer_sees_every_token_once_as_it_comes(self, target, draft):
        recorder, ids = Recorder(), torch.tensor([PROMPTS[0]])
        output = target.generate(
            ids, attention_mask=torch.ones_like(ids), assistant_model=draft, streamer=recorder, **GREEDY
        )
        assert recorder.tokens == output[0].tolist() and recorder.ended and recorder.puts > 4

    def test_several_samples_of_each_prompt(self, target, draft):
        torch.manual_seed(0)
        batch = left_padded(PROMPTS)
        sampling = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 9, "pad_token_id": 0}
        output = target.generate(**batch, assistant_model=draft, **sampling)
        assert output.shape == (12, 7 + 9)
        assert (
            torch.equal(output[::3, :7], batch["input_ids"]) and len({tuple(row.tolist()) for row in output[:3]}) == 3
        )

    def test_statistics_are_what_the_passes_were(self, target, draft):
        eos = alone(target, PROMPTS[0])[3]
        real = sum(len(alone(target, prompt, eos_token_id=eos)) for prompt in PROMPTS)
        passes, rows = {"target": 0, "draft": 0}, []

        def count(name):
            def hook(module, args, kwargs):
                passes[name] += 1
                if name == "target":
                    rows.append(kwargs["input_ids"].shape[0])

            return hook

        hooks = [
            model.register_forward_pre_hook(count(name), with_kwargs=True)
            for name, model in (("target", target), ("draft", draft))
        ]
        output = speculative_generate(
            target,
            draft,
            **left_padded(PROMPTS),
            draft_length=3,
            return_dict_in_generate=True,
            eos_token_id=eos,
            **GREEDY,
        )
        for hook in hooks:
            hook.remove()
        counted = output.statistics
        assert isinstance(output, SpeculativeOutput) and counted.rows == 4
        assert (counted.target_passes, counted.draft_passes) == (passes["target"], passes["draft"])
        assert counted.row_passes == sum(rows) and rows[0] == 4 and rows[-1] < 4, "finished rows leave the batch"
        assert counted.new_tokens == real and 0 < counted.accepted <= counted.drafted
        assert counted.row_passes < counted.new_tokens <= counted.accepted + counted.row_passes
        assert counted.draft_seconds > 0 and counted.target_seconds > 0 and counted.prefill_seconds > 0

    def test_the_line_for_people(self, target):
        output = speculative_generate(
            target, target, **left_padded(PROMPTS[:1]), draft_length=4, return_dict_in_generate=True, **GREEDY
        )
        assert str(output.statistics).startswith(
            "draft: 100 % of 18 drafted tokens accepted, 6 target passes for 24 tokens, "
        )

    def test_the_models_are_left_as_they_were(self, target, draft):
        before = [
            (m.config.to_dict(), m.generation_config.to_dict(), m.config._attn_implementation) for m in (target, draft)
        ]
        config = GenerationConfig(**GREEDY, prompt_lookup_num_tokens=3)
        target.generate(**left_padded(PROMPTS), generation_config=config)
        together(target, draft)
        after = [
            (m.config.to_dict(), m.generation_config.to_dict(), m.config._attn_implementation) for m in (target, draft)
        ]
        assert after == before and config.prompt_lookup_num_tokens == 3

    def test_eager_models_too(self, target, draft):
        eager = copy.deepcopy(target)
        eager.set_attn_implementation("eager")
        assert together(eager, draft) == together(target, draft)


class TestDraftLength:
    def test_rows_that_end_with_their_prompt_are_forgotten(self, target, draft, monkeypatch):
        """Their acceptance would otherwise count for the remaining rows."""
        seen, observe = [], DraftLength.observe

        def spy(self, width, limits, accepted, *seconds):
            seen.append((len(self._tried), len(accepted)))
            observe(self, width, limits, accepted, *seconds)

        monkeypatch.setattr(DraftLength, "observe", spy)
        first = alone(target, PROMPTS[0])[0]
        speculative_generate(target, draft, **left_padded(PROMPTS), eos_token_id=first, **GREEDY)
        assert seen and seen[0][1] < len(PROMPTS) and all(known == active for known, active in seen)

    @pytest.mark.parametrize("rows", [1, 4])
    def test_a_useless_draft_is_given_up(self, target, rows):
        torch.manual_seed(3)
        stranger = TinyLlamaForCausalLM(target.config).eval()
        output = speculative_generate(
            target,
            stranger,
            **left_padded(PROMPTS[:rows]),
            return_dict_in_generate=True,
            **GREEDY | {"max_new_tokens": 50},
        )
        assert output.statistics.plain_rounds > 10  # more on a quiet machine: the length follows measured times


def test_a_text_drafts_what_followed_the_longest_match_and_of_several_the_latest():
    prompts = torch.tensor([[3, 4, 1, 2, 9, 1, 2, 8, 1, 2], [5, 1, 2, 7, 1, 2, 6, 5, 1, 2], list(range(10))])
    rows = Rows(prompts, None, StoppingCriteriaList([MaxLengthCriteria(20)]), context=64)
    assert PromptLookup().propose(rows, 2, None, False) == 2
    assert rows.state.drafted_tokens(2).tolist() == [[8, 1], [7, 1], [0, 0]]
    assert rows.state.drafted.tolist() == [2, 2, 0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_no_gradients_are_kept(target, draft, mode):
    """Also where the caller has them on, or is in inference mode, which has to be left for tensors that are kept."""
    seen = set()

    class Sees(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.add((scores.requires_grad, torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
            return scores

    with mode():
        together(target, draft, logits_processor=[Sees()])
    assert seen == {(False, False, False)}


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_beams": 2}, "beam_search: "),
            ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states=True"),
            ({"output_attentions": True}, "output_attentions=True"),
            ({"stop_strings": ["a"]}, "stop_strings=.'a'.: .*tokenizer"),
            ({"stop_strings": 7}, "stop_strings=7: "),
            ({"stop_strings": [""], "tokenizer": 1}, "stop_strings=..'.: .*empty"),
            ({"cache_implementation": "static"}, "cache_implementation='static'"),
            ({"use_cache": False}, "use_cache=False"),
            ({"assistant_tokenizer": 1}, "assistant_tokenizer: "),
            ({"prompt_lookup_num_tokens": 3}, "assistant_model, prompt_lookup_num_tokens, .*only one"),
            ({"num_assistant_tokens": 0}, "draft_length=0: "),
            ({"num_assistant_tokens": 2.5}, "draft_length=2.5: "),
            ({"assistant_confidence_threshold": 0.4}, "assistant_confidence_threshold=0.4"),
            ({"prefill_chunk_size": 8}, "prefill_chunk_size=8"),
            ({"stopping_criteria": [NeedsScores()]}, "stopping criterion NeedsScores: .*scores"),
            ({"guidance_scale": 1.5}, "UnbatchedClassifierFreeGuidanceLogitsProcessor: "),
            ({"streamer": Recorder()}, "streamer: .* 4"),
            ({"pad_token_id": None, "eos_token_id": 5}, None),
        ],
        ids=lambda value: ",".join(value) if isinstance(value, dict) else str(value),
    )
    def test_options(self, target, draft, options, message):
        arguments = {**left_padded(PROMPTS), **GREEDY, **options}
        if message is None:  # end-of-sequence is used as padding, as in stock
            assert target.generate(**arguments, assistant_model=draft).shape[0] == 4
            return
        with pytest.raises(InputError, match=message):
            target.generate(**arguments, assistant_model=draft)

    def test_criteria_without_a_padding_token(self, target, draft):
        stock = LlamaForCausalLM(target.config.to_llama()).eval()
        stock.generation_config.pad_token_id = stock.generation_config.eos_token_id = None
        options = {
            "max_new_tokens": 4,
            "do_sample": False,
            "stopping_criteria": StoppingCriteriaList([EndsAfter(3, 1)]),
        }
        with pytest.raises(InputError, match=r"pad_token_id: .*different lengths"):
            speculative_generate(stock, draft, **left_padded(PROMPTS), **options)

    def test_prompts(self, target, draft):
        with pytest.raises(InputError, match="prompt 0: its 64 tokens leave no room in the context of 64"):
            target.generate(torch.ones(1, 64, dtype=torch.long), assistant_model=draft, **GREEDY)
        ids = torch.tensor([[5, 6, 0], [5, 6, 7]])
        with pytest.raises(InputError, match="padding must be on the left"):
            target.generate(ids, attention_mask=(ids > 0).long(), assistant_model=draft, **GREEDY)
        with pytest.raises(InputError, match="prompt 0: is empty"):
            target.generate(ids, attention_mask=torch.tensor([[0, 0, 0], [1, 1, 1]]), assistant_model=draft, **GREEDY)

    def test_pairs(self, target):
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        other = LlamaForCausalLM(LlamaConfig(vocab_size=160, **sizes)).eval()
        with pytest.raises(InputError, match=r"has 160 entries, the target's 128.*resize_token_embeddings\(128\)"):
            target.generate(**left_padded(PROMPTS), assistant_model=other, **GREEDY)
        other.resize_token_embeddings(128)
        together(target, other)
        with pytest.raises(InputError, match=r"draft: .* str$"):
            speculative_generate(target, "draft", **left_padded(PROMPTS), **GREEDY)
        for number in (0, 3):
            with pytest.raises(InputError, match=f"first_layers={number}: must be from 1 to 2"):
                first_layers(target, number)
        with pytest.raises(InputError, match="max_matching_ngram_size=0"):
            PromptLookup(0)

    def test_models_without_full_attention(self, target):
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = MistralConfig(vocab_size=128, **sizes, num_key_value_heads=1, sliding_window=8)
        with pytest.raises(InputError, match=r"target MistralForCausalLM: .*sliding window: 8"):
            speculative_generate(MistralForCausalLM(config), target, **left_padded(PROMPTS), **GREEDY)
        training = copy.deepcopy(target).train()
        training.gradient_checkpointing_enable()
        with pytest.raises(InputError, match="training mode with activation checkpointing"):
            together(training, target)
        table = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=16, n_layer=2, n_head=2, n_positions=24)).eval()
        with pytest.raises(InputError, match="rows of 31 tokens are longer than the context of 24"):
            speculative_generate(table, target, **left_padded(PROMPTS), **GREEDY)
        scaled = copy.deepcopy(target)
        for kind in ("dynamic", "longrope"):
            scaled.config.rope_parameters = {**scaled.config.rope_parameters, "rope_type": kind}
            with pytest.raises(InputError, match=f"rotary scaling '{kind}' depends on the longest row"):
                together(target, scaled)
        # Without a draft, no row exceeds the context, so only one of the two kinds depends on the other rows.
        with pytest.raises(InputError, match="rotary scaling 'longrope'"):
            check_full_attention(scaled, "model", drafts=False)
        scaled.config.rope_parameters = {**scaled.config.rope_parameters, "rope_type": "dynamic"}
        check_full_attention(scaled, "model", drafts=False)

    def test_stock_still_refuses_batches(self, target, draft):
        """If this fails, check whether stock assisted generation can replace ours."""
        stock = LlamaForCausalLM(target.config.to_llama()).eval()
        with pytest.raises(ValueError, match="batch_size = 1"):
            stock.generate(**left_padded(PROMPTS), assistant_model=draft, **GREEDY)


def test_a_seed_decides_with_a_fixed_length(target, draft):
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(together(target, draft, do_sample=True, temperature=1.0))
    assert outputs[0] == outputs[1] != outputs[2]


def test_the_tokenizer_pads_as_it_must(tokenizer_folder):
    """The example of the README works with the tokenizer as it is loaded."""
    tokenizer = load_tokenizer(tokenizer_folder)
    batch = tokenizer(["a", "return self"], return_tensors="pt", padding=True, padding_side="left")
    config = TinyLlamaConfig.preset("micro", vocab_size=512, max_position_embeddings=64)
    model = TinyLlamaForCausalLM(config).eval()
    output = model.generate(**batch, assistant_model=first_layers(model, 1), max_new_tokens=5, do_sample=False)
    assert output.shape[0] == 2
