"""Steps of fixed shape, recorded and replayed: tokens as without them, and nothing outlives what it depends on.

On a CPU `replay.Replay` stands in for CUDA graphs.
"""

import copy
import logging
import random
import shutil

import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteria, StoppingCriteriaList

from tests.decoding.replay import Again, Replay
from tests.decoding.test_exactness import OPTIONS, near, ragged_prompts, random_model
from tests.exactness import Reference, compare, first_difference, left_padded
from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load
from tinyllama_hf.batch.generate_many import Request, generate_many
from tinyllama_hf.decoding import fixed_memory, graphs
from tinyllama_hf.decoding.draft_length import DraftLength
from tinyllama_hf.decoding.engine import Decoding
from tinyllama_hf.decoding.grouped_attention import GQA_PACKED, attention_configs, packed_attention
from tinyllama_hf.decoding.llama_step import compile_for_generation
from tinyllama_hf.decoding.proposals import ModelProposer, PromptLookup, first_layers
from tinyllama_hf.decoding.rows import Bucket, RowPlan, row_bucket, slot_bucket, slots_of
from tinyllama_hf.errors import InputError
from tinyllama_hf.inference.generation import ExactTextStreamer
from tinyllama_hf.inference.options import Sampling
from tinyllama_hf.planning.inference_memory import Setup, held_cache
from tinyllama_hf.planning.kv_cache import measure_cache


GREEDY = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
PROMPTS = ([5, 17, 33], [9], [100, 3, 77, 41, 8, 60, 21])


@pytest.fixture
def recorders(monkeypatch):
    """Records steps on the CPU; returns the recorders."""
    found: list[Replay] = []
    fixed_memory._kept.clear()

    def recorder_for(device):
        found.append(Replay())
        return found[-1]

    monkeypatch.setattr(graphs, "recorder_for", recorder_for)
    return found


def recorded(recorders) -> int:
    return sum(len(recorder.recorded) for recorder in recorders)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = TinyLlamaConfig.preset("micro", vocab_size=128, num_hidden_layers=2, max_position_embeddings=400)
    made = TinyLlamaForCausalLM(config).eval()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    made.generation_config.eos_token_id = None
    return made


def in_transformers(model, prompts=PROMPTS, **options):
    """Returns the output of transformers' own loop for each prompt alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "recorder_for", lambda device: None)
        return [
            model.generate(**left_padded([prompt]), **{**GREEDY, **options})[:, len(prompt) :].tolist()
            for prompt in prompts
        ]


@pytest.mark.parametrize("kind", ["grouped", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_drafts_in_batches(recorders, kind):
    target = random_model(kind, 0)
    reference, draft = Reference(target), near(target, 0.03, 1)
    tally = compare(reference, target, draft, ragged_prompts(3, 2), OPTIONS[1:2], (3,), (4,))
    lookup = compare(reference, target, PromptLookup(), ragged_prompts(3, 2), OPTIONS[1:2], (3,), (3,))
    assert tally.statistics.drafted and lookup.statistics.drafted and tally.ties + lookup.ties == 0
    assert recorded(recorders) and sum(recorder.replays for recorder in recorders) > 20


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grouped", "multi_query", "qwen3", "gpt2", "opt"])
def test_many_sequences(recorders, kind):
    """Rows that end at different times, with processors that cannot be a part of a step; 160 sequences each."""
    target = random_model(kind, 3)
    reference, draft = Reference(target), near(target, 0.03, 1)
    tally = compare(reference, target, draft, ragged_prompts(20, 4), OPTIONS, (1, 5), (1, 4))
    assert tally.sequences == 160 and tally.ties <= 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eos_token_id": [7, 60, 100]},
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 5, "eos_token_id": 7},
        {"stopping_criteria": "ends"},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_generate_without_a_draft(recorders, model, options):
    class Ends(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return (input_ids[:, -1] % 5) == 0

    if "stopping_criteria" in options:
        options = {"stopping_criteria": StoppingCriteriaList([Ends()])}
    expected = in_transformers(model, **options)
    ours = model.generate(**left_padded(PROMPTS), **{**GREEDY, **options})[:, 7:].tolist()
    for own, [stock] in zip(ours, expected, strict=True):
        assert first_difference(own, stock) is None
    assert recorded(recorders)


def test_buckets_that_grow(recorders, model):
    """Prompts of 3 and 100 tokens, 200 new ones: attention reads 128, 256 and 384 slots."""
    prompts = ragged_prompts(1, 1, 3) + [random.Random(0).choices(range(8, 128), k=100)]
    ours = model.generate(**left_padded(prompts), **{**GREEDY, "max_new_tokens": 200})[:, 100:].tolist()
    assert ours == [row for [row] in in_transformers(model, prompts, max_new_tokens=200)]
    memory = fixed_memory._kept[model]
    assert {key[1].slots for key in memory.graphs._steps} == {128, 256, 384} and memory.size.slots == 384


def test_prompts_of_one_token(recorders, model):
    """A draft has nothing to read in advance then."""
    ours = model.generate(**left_padded([[9], [11]]), **GREEDY, assistant_model=near(model, 0.03, 1))
    assert ours[:, 1:].tolist() == [row for [row] in in_transformers(model, [[9], [11]])]


def test_the_next_call_records_nothing(recorders, model):
    model.generate(**left_padded(PROMPTS), **GREEDY)
    assert recorded(recorders) == 2, "the pass of the target and the choice of tokens"
    again = model.generate(**left_padded(PROMPTS[::-1]), **GREEDY)
    assert recorded(recorders) == 2
    assert again[:, 7:].tolist() == [row for [row] in in_transformers(model, PROMPTS[::-1])]
    model.generate(**left_padded(PROMPTS), **GREEDY | {"do_sample": True, "temperature": 0.5})
    assert recorded(recorders) == 4, "sampling needs memory for random numbers"


def test_several_samples_of_a_prompt_and_seeds(recorders, model):
    options = {**GREEDY, "do_sample": True, "num_return_sequences": 3, "top_p": 0.9, "temperature": 1.5}
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(model.generate(**left_padded(PROMPTS[:2]), **options).tolist())
    assert found[0] == found[1] != found[2]
    assert len({tuple(row) for row in found[0]}) == 6, "a replay draws other tokens for every row"


@pytest.mark.parametrize("draft", [None, "model", "lookup"])
def test_rows_that_join(recorders, model, draft):
    """Places are filled by the next prompts, some with longer rows than there was memory for."""
    generator = random.Random(0)
    requests = [
        Request(key, generator.choices(range(8, 128), k=generator.randint(1, 30)), generator.choice((3, 9, 30)))
        for key in range(14)
    ]
    requests.append(Request(14, [9, 10], 140))
    proposer = {None: None, "model": ModelProposer(near(model, 0.03, 1)), "lookup": PromptLookup()}[draft]
    completions = list(generate_many(model, NoTokenizer(), requests, 4, Sampling(0, 1.0), draft=proposer))
    for completion in completions:
        request = requests[completion.key]
        [[alone]] = in_transformers(model, [request.ids], max_new_tokens=request.max_new_tokens)
        assert completion.ids == alone
    assert len(completions) == 15 and recorded(recorders)


class NoTokenizer:
    pad_token_id, eos_token_id = 0, None


@pytest.mark.slow
def test_five_hundred_rows_that_join(recorders, model):
    generator = random.Random(1)
    requests = [
        Request(key, generator.choices(range(8, 128), k=generator.randint(1, 40)), generator.randint(1, 30))
        for key in range(500)
    ]
    for completion in generate_many(model, NoTokenizer(), requests, 16, Sampling(0, 1.0)):
        request = requests[completion.key]
        [[alone]] = in_transformers(model, [request.ids], max_new_tokens=request.max_new_tokens)
        assert completion.ids == alone


def test_a_seed_gives_the_same_samples_in_every_batch_and_without_graphs(recorders, model, monkeypatch):
    requests = [Request(key, [9 + key, 10, 11], 6 + 5 * key) for key in range(5)]

    def samples(batch_size):
        found = generate_many(model, NoTokenizer(), requests, batch_size, Sampling(1.0, 0.9), seed=3)
        return {completion.key: completion.ids for completion in found}

    together, apart = samples(5), samples(2)
    assert recorded(recorders)
    monkeypatch.setattr(graphs, "recorder_for", lambda device: None)
    assert together == apart == samples(5)


def test_streams(recorders, shared):
    model, tokenizer = load(shared / "data" / "models" / "stories260K", dtype=torch.float32)
    parts: list[str] = []
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    streamer = ExactTextStreamer(tokenizer, parts.append)
    output = model.generate(**inputs, max_new_tokens=30, do_sample=False, streamer=streamer, pad_token_id=0)
    assert "".join(parts) == tokenizer.decode(output[0], skip_special_tokens=True) and len(parts) > 10
    assert recorded(recorders)


class TestWeightsThatChange:
    """Graphs hold the addresses of weights, and what Python decided when they were recorded."""

    @pytest.fixture
    def model(self, model):
        return copy.deepcopy(model)

    def assert_right(self, model, recorders, records: bool) -> None:
        before = recorded(recorders)
        ours = model.generate(**left_padded(PROMPTS), **GREEDY)[:, 7:].tolist()
        assert ours == [row for [row] in in_transformers(model)]
        assert (recorded(recorders) > before) is records

    def test_in_place(self, recorders, model):
        self.assert_right(model, recorders, True)
        with torch.no_grad():
            model.lm_head.weight.mul_(-1)
        self.assert_right(model, recorders, False)

    def test_replaced(self, recorders, model):
        self.assert_right(model, recorders, True)
        model.lm_head.weight = torch.nn.Parameter(-model.lm_head.weight.detach())
        self.assert_right(model, recorders, True)

    def test_resized(self, recorders, model):
        self.assert_right(model, recorders, True)
        model.resize_token_embeddings(160, mean_resizing=False)
        self.assert_right(model, recorders, True)

    def test_adapter(self, recorders, model):
        """Added, disabled, enabled, scaled and merged."""
        from peft import LoraConfig, get_peft_model

        self.assert_right(model, recorders, True)
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
        self.assert_right(model, recorders, True)
        with adapted.disable_adapter():
            self.assert_right(model, recorders, True)
        self.assert_right(model, recorders, True)
        for layer in model.modules():
            if hasattr(layer, "set_scale"):
                layer.set_scale("default", 3.0)
        self.assert_right(model, recorders, True)
        adapted.merge_and_unload()
        self.assert_right(model, recorders, True)

    def test_hooks_are_called(self, recorders, model, caplog):
        calls = []
        model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
        with caplog.at_level(logging.INFO, "tinyllama_hf"):
            self.assert_right(model, recorders, False)
        assert len(calls) > 20 and "has hooks" in caplog.text


class TestRounds:
    def decoding(self, model, draft=None, **options):
        made = Decoding(model, draft, None, **left_padded(PROMPTS), **{**GREEDY, **options})
        made.start()
        return made

    def test_the_next_round_starts_before_the_tokens_are_read(self, recorders, model):
        """Unless it depends on them: with a draft, or with a processor or a criterion in Python."""
        plain = self.decoding(model)
        counts = [sum(map(len, plain.round().values())) for _ in range(3)]
        assert counts == [3, 3, 3] and plain.statistics.target_passes == 1 + 3 + 1
        for options in ({"draft": PromptLookup()}, {"repetition_penalty": 1.2}, {"max_time": 100.0}):
            waiting = self.decoding(model, **options)
            waiting.round()
            assert waiting.statistics.target_passes == 1 + 1

    def test_the_time_of_recording_is_not_learned_from(self, recorders, model, monkeypatch):
        widths = []
        monkeypatch.setattr(DraftLength, "observe", lambda self, width, *rest: widths.append(width))
        decoding = self.decoding(model, ModelProposer(near(model, 0.03, 1)))
        decoding.round()
        assert widths == []
        decoding.round()
        assert widths == [0]

    def test_rows_that_end_leave_few_shapes(self, recorders, model):
        """Of eight rows that end one after the other: steps for eight rows, then for two."""
        requests = [Request(key, [9 + key, 10], 4 + 3 * key) for key in range(8)]
        assert len(list(generate_many(model, NoTokenizer(), requests, 8, Sampling(0, 1.0)))) == 8
        steps = fixed_memory._kept[model].graphs._steps
        assert {bucket.rows for key in steps for bucket in key if isinstance(bucket, Bucket)} == {8, 2}

    def test_only_the_rows_of_the_batch_are_active(self, recorders, model):
        """The last row takes the place of a finished one, and its old place only fills up the shape."""
        plans = [RowPlan(0, 3), RowPlan(1, 20), RowPlan(2, 20)]
        decoding = self.decoding(model, plans=plans)
        while len(decoding.rows) == 3:
            decoding.round()
        assert decoding.rows.keys == [2, 1]
        assert fixed_memory._kept[model].state.active.tolist() == [True, True, False, False]

    def test_a_line_says_what_runs_in_python(self, recorders, model, caplog):
        with caplog.at_level(logging.INFO, "tinyllama_hf"):
            model.generate(**left_padded(PROMPTS), **GREEDY | {"repetition_penalty": 1.2, "max_time": 100.0})
        assert "outside of graphs, in Python: RepetitionPenaltyLogitsProcessor, MaxTimeCriteria" in caplog.text

    def test_samples_do_not_depend_on_the_maximum_length(self, recorders, model):
        found = []
        for length in (6, 12):
            torch.manual_seed(4)
            options = GREEDY | {"do_sample": True, "max_new_tokens": length}
            found.append(model.generate(**left_padded(PROMPTS[:1]), **options)[0].tolist())
        assert found[0] == found[1][: len(found[0])]


def test_the_first_layers_of_a_model_have_its_attention(model):
    """They share the layers, which read the configuration of the whole model."""
    draft = first_layers(model, 1)
    with packed_attention(attention_configs(draft)):
        assert draft.model.layers[0].self_attn.config._attn_implementation == GQA_PACKED
    assert model.config._attn_implementation == "sdpa"


def test_the_tensors_of_quantized_weights_are_described():
    """Those of torchao have no address themselves."""
    torchao = pytest.importorskip("torchao.quantization")
    layers = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False))
    torchao.quantize_(layers, torchao.Int8WeightOnlyConfig())
    first, *others = graphs._parts(layers[0].weight)
    assert first.data_ptr() and others and all(part.data_ptr() != first.data_ptr() for part in others)


class TestOtherLoops:
    """What recorded steps do not support is generated by transformers, and a line says why."""

    class Strange(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.roll(1, dims=0)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"num_beams": 2}, "beam_search"),
            ({"return_dict_in_generate": True}, "return_dict_in_generate"),
            ({"logits_processor": [Strange()]}, "Strange"),
            ({"cache_implementation": "static"}, "cache_implementation"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_arguments(self, recorders, model, caplog, options, reason):
        with caplog.at_level(logging.INFO, "tinyllama_hf"):
            model.generate(**left_padded(PROMPTS), **GREEDY | options)
        assert reason in caplog.text and not recorded(recorders)

    def test_a_step_that_reads_from_the_device(self, recorders, model):
        """With a draft there is no other loop."""
        target = copy.deepcopy(model)
        target.lm_head.forward = lambda hidden: hidden[..., :128] * hidden.abs().max().item()
        with pytest.raises(InputError, match=r"cannot be recorded as a graph .*TINYLLAMA_HF_GRAPHS=off"):
            target.generate(**left_padded(PROMPTS), **GREEDY, assistant_model=near(model, 0.1, 0))

    def test_switch(self, monkeypatch):
        device = torch.device("cuda")
        monkeypatch.setattr(graphs, "CudaRecorder", lambda device: "recorder")
        assert graphs.recorder_for(device) == "recorder" and graphs.recorder_for(torch.device("cpu")) is None
        monkeypatch.setenv("TINYLLAMA_HF_GRAPHS", "off")
        assert graphs.recorder_for(device) is None


def test_two_batches_at_a_time_have_their_own_memory(recorders, model):
    """A generator that is not finished keeps its memory."""
    requests = [Request(key, [9 + key, 10], 30) for key in range(4)]
    first = generate_many(model, NoTokenizer(), requests, 2, Sampling(0, 1.0))
    found = {(completion := next(first)).key: completion.ids}
    ours = model.generate(**left_padded(PROMPTS), **GREEDY)[:, 7:].tolist()
    assert ours == [row for [row] in in_transformers(model)]
    found |= {completion.key: completion.ids for completion in first}
    expected = in_transformers(model, [request.ids for request in requests], max_new_tokens=30)
    assert [found[key] for key in range(4)] == [row for [row] in expected]


def test_inside_inference_mode_and_outside(recorders, model):
    with torch.inference_mode():
        first = model.generate(**left_padded(PROMPTS), **GREEDY)
    assert torch.equal(first, model.generate(**left_padded(PROMPTS), **GREEDY))


def test_memory_is_what_the_plan_says(recorders, model, monkeypatch):
    model.generate(**left_padded(PROMPTS), **GREEDY)
    setup = Setup(model.config, torch.float32, has_graphs=True)
    found = measure_cache(fixed_memory._kept[model].caches[0])
    assert found == held_cache(setup, len(PROMPTS), 7 + GREEDY["max_new_tokens"]) and found.requests == 4
    fixed_memory.release(model)
    assert model not in fixed_memory._kept
    monkeypatch.setattr(fixed_memory, "free_bytes", lambda device: found.total - 1)
    with pytest.raises(InputError, match=r"a batch of 4 rows of 128 tokens: its keys and values take .* are free"):
        model.generate(**left_padded(PROMPTS), **GREEDY)


def test_buckets():
    assert [row_bucket(rows) for rows in (1, 2, 3, 8, 9, 100, 128, 129, 200)] == [1, 2, 4, 8, 16, 128, 128, 192, 256]
    slots = [slot_bucket(end) for end in (1, 128, 129, 300, 400, 513, 800, 1100, 1600, 2057)]
    assert slots == [128, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072]
    assert [slots_of(limit, 2048, 8) for limit in (100, 250, 2048, 3000)] == [128, 384, 2112, 3072]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu(model, monkeypatch):
    """Real graphs in fp32: tokens as in transformers' own loop, plain and with a draft; a second call records none."""
    target, draft = copy.deepcopy(model).cuda(), near(model, 0.03, 1).cuda()
    batch = {name: tensor.cuda() for name, tensor in left_padded(PROMPTS).items()}
    ours = target.generate(**batch, **GREEDY)
    graphs_of_target = fixed_memory._kept[target].graphs
    assert graphs_of_target.recorded == 2
    assert torch.equal(target.generate(**batch, **GREEDY), ours) and graphs_of_target.recorded == 2
    drafted = target.generate(**batch, **GREEDY, assistant_model=draft)
    assert fixed_memory._kept[target].graphs.recorded > 2
    monkeypatch.setenv("TINYLLAMA_HF_GRAPHS", "off")
    for own, with_draft, prompt in zip(ours[:, 7:].tolist(), drafted[:, 7:].tolist(), PROMPTS, strict=True):
        alone = {name: tensor.cuda() for name, tensor in left_padded([prompt]).items()}
        stock = target.generate(**alone, **GREEDY)[0, len(prompt) :].tolist()
        assert own == stock == with_draft


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with a C++ compiler")
def test_compiled_layers(recorders, model, monkeypatch):
    """One compilation per shape for all layers; what was recorded before is not used again."""
    monkeypatch.setattr(graphs, "recorder_for", lambda device: recorders.append(Again()) or recorders[-1])
    model = copy.deepcopy(model)
    ours = model.generate(**left_padded(PROMPTS), **GREEDY)
    assert recorded(recorders) == 2
    torch._dynamo.utils.counters.clear()
    compile_for_generation(model)
    assert torch.equal(model.generate(**left_padded(PROMPTS), **GREEDY), ours)
    assert recorded(recorders) == 4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 < model.config.num_hidden_layers


def test_what_cannot_be_compiled(recorders, model, monkeypatch):
    with pytest.raises(InputError, match=r"--compile: the layers of GPT2LMHeadModel are not those of Llama"):
        compile_for_generation(random_model("gpt2", 0))
    monkeypatch.setattr(graphs, "recorder_for", lambda device: None)
    with pytest.raises(InputError, match=r"--compile: generation on cpu runs without recorded steps. Leave it out"):
        compile_for_generation(model)
