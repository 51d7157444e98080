"""Our model for lm-eval against lm-eval's own `hf` model: the same answers to the same requests."""

import copy
import json

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tests.conftest import run_here
from tests.evaluation.commonsense_scorer import SPLITS, question, read_rows
from tests.evaluation.test_commonsense import SAMPLE, save
from tinyllama_hf.errors import InputError
from tinyllama_hf.evaluation.harness.kept_answers import KeptAnswers
from tinyllama_hf.evaluation.harness.local_harness import EncodedTexts, TinyLlamaHarness


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, pair, 0, ("task", number, 1)) for number, pair in enumerate(arguments)]


@pytest.fixture(scope="module")
def folder(tokenizer_folder, tmp_path_factory):
    return save(tmp_path_factory.mktemp("harness") / "model", tokenizer_folder, 3, context=256)


@pytest.fixture(scope="module")
def loaded(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def pairs(loaded):
    """The sample's questions, and contexts and continuations at the edges of tokenization."""
    found = [pair for task in SPLITS for row in read_rows(SAMPLE, task, 3) for pair in question(task, row)[0]]
    bos = loaded[1].bos_token
    edges = [
        ("", "The end"),
        ("", f"{bos}The end"),
        ("A word ", "and more"),
        ("Two  blanks  ", "  and two"),
        ("\n", "x"),
    ]
    edges += [
        (f"{bos}begins with it", " yes"),
        ("word " * 400, "is too long for the context"),
        ("a", " b"),
        ("   ", "x"),
    ]
    return found + edges


@pytest.mark.parametrize("add_bos_token", [None, False, True])
def test_log_likelihoods(loaded, pairs, add_bos_token):
    model, tokenizer = loaded
    wanted = pairs if add_bos_token is not False else [pair for pair in pairs if pair[0].strip() or pair[0] == ""]
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, add_bos_token=add_bos_token, batch_size=4)
    ours = TinyLlamaHarness(model, tokenizer, add_bos_token=add_bos_token)
    asked = requests("loglikelihood", wanted)
    expected, found = theirs.loglikelihood(asked, disable_tqdm=True), ours.loglikelihood(asked)
    for pair, own, other in zip(wanted, found, expected, strict=True):
        assert own[0] == pytest.approx(other[0], abs=1e-3), pair
        assert own[1] == other[1], pair
    assert ours.num_cut == 1


def test_rolling_log_likelihoods(loaded):
    model, tokenizer = loaded
    asked = requests("loglikelihood_rolling", [("A short text.",), ("A text of several windows. " * 60,)])
    theirs = HFLM(pretrained=model, tokenizer=tokenizer).loglikelihood_rolling(asked, disable_tqdm=True)
    ours = TinyLlamaHarness(model, tokenizer).loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours == pytest.approx(theirs, abs=1e-2)


def test_windows_of_texts_are_kept_and_checked(loaded, monkeypatch, capfd):
    asked, kept = requests("loglikelihood_rolling", [("A text of several windows. " * 60,)]), KeptAnswers("", {}, None)
    whole = TinyLlamaHarness(*loaded, kept=kept).loglikelihood_rolling(asked)
    assert len(kept) > 1 and "it/s" not in capfd.readouterr().err
    monkeypatch.setattr(LlamaForCausalLM, "get_decoder", lambda self: pytest.fail("a forward pass"))
    assert TinyLlamaHarness(*loaded, kept=kept).loglikelihood_rolling(asked) == whole


@torch.no_grad()
def test_windows_of_a_damaged_model_are_refused(loaded):
    model, tokenizer = loaded
    damaged = copy.deepcopy(model)
    damaged.model.norm.weight[0] = float("nan")
    with pytest.raises(InputError, match=r"log-likelihoods are not finite, the first for 'A short text\.'"):
        TinyLlamaHarness(damaged, tokenizer).loglikelihood_rolling(requests("", [("A short text.",)]))


SETTINGS = [
    {"until": ["\n\n"], "max_gen_toks": 20, "do_sample": False},
    {"until": ["e", "zz"], "max_gen_toks": 30},
    {"until": [], "max_gen_toks": 5, "temperature": 0.0},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_greedy_texts(loaded, settings):
    model, tokenizer = loaded
    prompts = ["Once upon a time", "The answer is", "x = ", "word " * 400]
    asked = requests("generate_until", [(prompt, settings) for prompt in prompts])
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).generate_until(asked, disable_tqdm=True)
    ours = TinyLlamaHarness(model, tokenizer).generate_until(asked)
    assert ours == theirs and len(set(ours)) > 1


def test_samples_repeat_and_differ_by_request(loaded):
    settings = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    asked = requests("generate_until", [("Once", settings), ("Once", settings), ("Twice", settings)])
    first, second = (TinyLlamaHarness(*loaded).generate_until(asked) for _ in range(2))
    assert first == second and first[0] != first[1]


def test_prompts_that_are_cut_are_counted_with_and_without_kept_answers(loaded):
    settings, kept = {"until": ["\n"], "max_gen_toks": 8}, KeptAnswers("", {}, None)
    asked = requests("generate_until", [("Once", settings), ("word " * 400, settings), ("many " * 400, settings)])
    whole, resumed = TinyLlamaHarness(*loaded, kept=kept), TinyLlamaHarness(*loaded, kept=kept)
    assert whole.generate_until(asked[:2]) == resumed.generate_until(asked)[:2]
    assert (whole.num_cut, resumed.num_cut) == (1, 2)


def test_settings_that_would_be_ignored_are_refused(loaded):
    asked = requests("generate_until", [("Once", {"until": [], "num_beams": 4})])
    with pytest.raises(InputError, match="generation_kwargs of a task: num_beams not supported"):
        TinyLlamaHarness(*loaded).generate_until(asked)
    asked = requests("generate_until", [("Once", {"until": [], "max_gen_toks": 256})])
    with pytest.raises(InputError, match="max_gen_toks: 256 of a task leaves no room"):
        TinyLlamaHarness(*loaded).generate_until(asked)


def test_a_string_is_tokenized_once_for_all_models(loaded, pairs, monkeypatch):
    model, tokenizer = loaded
    encoded, calls = EncodedTexts(), []
    texts = {text for context, continuation in pairs for text in (context.rstrip(), context + continuation)}
    encode_all = TinyLlamaHarness._encode_all
    monkeypatch.setattr(
        TinyLlamaHarness, "_encode_all", lambda self, new: calls.append(len(new)) or encode_all(self, new)
    )
    answers = [
        TinyLlamaHarness(model, tokenizer, encoded=encoded).loglikelihood(requests("", pairs)) for _ in range(2)
    ]
    assert answers[0] == answers[1] and calls == [len(texts - {""})]


def test_kept_answers_are_not_asked_again(loaded, pairs, monkeypatch):
    asked, kept = requests("loglikelihood", pairs), KeptAnswers("", {}, None)
    whole = TinyLlamaHarness(*loaded, kept=kept).loglikelihood(asked)
    monkeypatch.setattr(LlamaForCausalLM, "get_decoder", lambda self: pytest.fail("a forward pass"))
    assert TinyLlamaHarness(*loaded, kept=kept).loglikelihood(asked) == whole


@pytest.mark.slow
def test_lm_evals_own_command_line(folder, tmp_path):
    """A task of the user's own, through `--include_path`, with both models."""
    rows = [
        {"text": "The sky is", "choices": ["blue", "a fish"], "answer": 0},
        {"text": "One and", "choices": ["two", "x"], "answer": 1},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.yaml").write_text(
        "task: own\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\n"
        'doc_to_text: "{{text}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
    )
    results = {}
    for name in ("tinyllama", "hf"):
        arguments = f"pretrained={folder},dtype=float32"
        where = ("--include_path", tmp_path, "--output_path", tmp_path / name)
        done = run_here(
            *("tinyllama-hf", "eval", "harness", "run", "--model", name, "--model_args", arguments),
            *("--tasks", "own", "--device", "cpu", "--log_samples", *where),
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        (samples,) = (tmp_path / name).rglob("samples_own_*.jsonl")
        results[name] = [float(resp[0][0]) for line in samples.open() for resp in json.loads(line)["resps"]]
    assert len(results["hf"]) == 4 and results["tinyllama"] == pytest.approx(results["hf"], abs=1e-3)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_with_an_adapter(folder, loaded, pairs, tmp_path, quantization):
    """The answers of the model with the adapter merged into its weights; in 4 bit, other ones."""
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    torch.manual_seed(5)
    base = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = peft.LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "adapter")
    asked, tokenizer = requests("loglikelihood", pairs[:40]), loaded[1]
    merged = HFLM(pretrained=adapted.merge_and_unload(), tokenizer=tokenizer).loglikelihood(asked, disable_tqdm=True)
    plain = TinyLlamaHarness(*loaded).loglikelihood(asked)
    ours = TinyLlamaHarness(str(folder), adapter=str(tmp_path / "adapter"), quantization=quantization, dtype="float32")
    found = ours.loglikelihood(asked)
    differences = [abs(own[0] - other[0]) for own, other in zip(found, merged, strict=True)]
    away = [abs(own[0] - other[0]) for own, other in zip(plain, merged, strict=True)]
    assert min(away) > 0.01 and (max(differences) < 1e-3) == (quantization == "none")
    assert sum(differences) < sum(away)


def test_a_dtype_that_does_not_exist(folder):
    with pytest.raises(InputError, match="dtype=bfloat: unknown"):
        TinyLlamaHarness(str(folder), dtype="bfloat")
