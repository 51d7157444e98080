"""Bits per byte against stock transformers, with a loop that scores one document at a time, and the first version."""

import json
import math

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.conftest import run_here
from tests.pretrain.runs import pretrain
from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load_tokenizer
from tinyllama_hf.data.mixture import Mixture
from tinyllama_hf.data.prepare import prepare
from tinyllama_hf.errors import InputError
from tinyllama_hf.evaluation.held_out import bits_per_byte
from tinyllama_hf.evaluation.held_out.baselines import fit_baselines
from tinyllama_hf.evaluation.held_out.bits_per_byte import score_documents, summarize
from tinyllama_hf.evaluation.held_out.held_out_text import HeldOut, held_out_documents
from tinyllama_hf.evaluation.held_out.text_windows import count_in_batch, sorted_buffers, windows
from tinyllama_hf.evaluation.score_files import TextProtocol, TextSource
from tinyllama_hf.evaluation.series import score
from tinyllama_hf.pretrain.config import load_pretrain_config
from tinyllama_hf.tokenization_tinyllama import encode_text, tokenizer_fingerprint


def held_out(name, texts) -> HeldOut:
    """Documents in memory."""
    return HeldOut(TextSource(name, "", len(texts), sum(len(text.encode()) for text in texts)), texts)


@pytest.mark.parametrize("length", [2, 3, 8, 9, 10, 12, 13, 50])
@pytest.mark.parametrize(("context", "stride"), [(8, 4), (8, 8), (5, 1)])
def test_every_token_is_scored_once_with_enough_before_it(length, context, stride):
    tokens = np.arange(length)
    scored, num_bytes = [], 0.0
    for window in windows(0, tokens, context, stride, 60):
        assert len(window.tokens) <= context + 1
        assert np.array_equal(window.tokens, np.arange(window.tokens[0], window.tokens[0] + len(window.tokens)))
        scored += window.tokens[-window.num_scored :].tolist()
        num_bytes += window.num_bytes
        if window.tokens[0] > 0:
            assert len(window.tokens) - 1 - window.num_scored >= context - stride
    assert scored == list(range(1, length)) and num_bytes == pytest.approx(60)


@torch.no_grad()
def stock_bits_per_byte(folder, texts: list[str]) -> float:
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    context, nats = model.config.max_position_embeddings, 0.0
    for text in texts:
        ids = [1, *tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]]
        done = 0
        while done < len(ids) - 1:
            new = min(context if done == 0 else context // 2, len(ids) - 1 - done)
            window = torch.tensor([ids[max(done + new - context, 0) : done + new + 1]])
            log = model(window[:, :-1]).logits.log_softmax(-1)[0]
            nats -= log.gather(1, window[0, 1:, None])[-new:].double().sum().item()
            done += new
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


@torch.inference_mode()
def first_version(model, tokenizer, texts, batch_size=16) -> float:
    """The implementation of the first versions: all texts and windows at once, logits of all positions."""
    context = model.config.max_position_embeddings
    stride, everything, nats = max(context // 2, 1), [], 0.0
    for text in texts:
        tokens = np.array([tokenizer.bos_token_id, *encode_text(tokenizer, text)])
        done, predicted = 0, len(tokens) - 1
        while done < predicted:
            new = min(context if done == 0 else stride, predicted - done)
            everything.append((tokens[max(done + new - context, 0) : done + new + 1], new))
            done += new
    everything.sort(key=lambda window: len(window[0]))
    for start in range(0, len(everything), batch_size):
        batch = everything[start : start + batch_size]
        padded = pad_sequence([torch.from_numpy(tokens) for tokens, _ in batch], batch_first=True)
        logits = model(input_ids=padded[:, :-1], use_cache=False).logits.float()
        scores = logits.gather(2, padded[:, 1:, None]).squeeze(2) - logits.logsumexp(2)
        for row, (tokens, new) in zip(scores.double(), batch, strict=True):
            nats -= row[len(tokens) - 1 - new : len(tokens) - 1].sum().item()
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


@pytest.fixture(scope="module")
def model_folder(tokenizer_folder, tmp_path_factory):
    """A model with a context of 48 tokens, whose predictions differ."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = TinyLlamaForCausalLM(TinyLlamaConfig.preset("micro", vocab_size=512, max_position_embeddings=48))
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)
    model.save_pretrained(folder)
    load_tokenizer(tokenizer_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(model_folder):
    return LlamaForCausalLM.from_pretrained(model_folder).eval()


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def texts(documents) -> list[str]:
    """Documents longer than the context and shorter, one empty, and one of one token."""
    return [*(text[:700] for text in documents[:6]), "short", "", "a", "with </s> in it, and ünïcode ", "x" * 300]


def test_a_document_of_one_token_and_one_of_none(tokenizer):
    assert [len(encode_text(tokenizer, text)) for text in ("a", "")] == [1, 0]


@pytest.mark.parametrize("batch_tokens", [None, 1, 100, 131])
def test_equals_stock_transformers_and_the_first_version(model_folder, model, tokenizer, texts, batch_tokens):
    found, _ = score_documents(model, tokenizer, [held_out("a", texts)], batch_tokens)
    assert found.bits_per_byte == pytest.approx(stock_bits_per_byte(model_folder, texts), abs=1e-6)
    assert found.bits_per_byte == pytest.approx(first_version(model, tokenizer, texts), abs=1e-6)


def test_each_data_set_equals_the_first_version_alone(model, tokenizer, texts):
    """Although their windows share batches, in buffers that are smaller than a document."""
    sources = [held_out("a", texts[:3]), held_out("b", texts[3:])]
    before = bits_per_byte.BUFFER_TOKENS
    try:
        for bits_per_byte.BUFFER_TOKENS in (before, 50):
            found, _ = score_documents(model, tokenizer, sources)
            for source in sources:
                expected = first_version(model, tokenizer, source.texts)
                assert found.by_source[source.source.path] == pytest.approx(expected, abs=1e-6)
    finally:
        bits_per_byte.BUFFER_TOKENS = before


def test_logits_are_computed_in_parts_and_for_scored_positions_only(model, tokenizer, texts, monkeypatch):
    monkeypatch.setitem(bits_per_byte.HEAD_ELEMENTS, "cpu", 10 * 512)
    rows = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.numel() // 512))
    try:
        found, _ = score_documents(model, tokenizer, [held_out("a", texts)])
    finally:
        hook.remove()
    assert max(rows) == 10 and sum(rows) == sum(len(encode_text(tokenizer, text)) for text in texts)
    assert found.bits_per_byte == pytest.approx(first_version(model, tokenizer, texts), abs=1e-6)


def test_documents_are_read_as_a_stream(model, tokenizer, texts, monkeypatch):
    """Never more of them ahead of the scored ones than the buffer holds, and progress counts bytes."""
    monkeypatch.setattr(bits_per_byte, "BUFFER_TOKENS", 200)
    document = texts[0][:120]
    tokens = len(encode_text(tokenizer, document))
    read, ahead, updates = [], [], []

    def stream():
        for _ in range(100):
            read.append(document)
            ahead.append(len(read) - (updates[-1]["completed"] / len(document) if updates else 0))
            yield document

    source = HeldOut(TextSource("a", "", 100, 100 * len(document)), stream())
    score_documents(model, tokenizer, [source], update=lambda **fields: updates.append(fields))
    assert 1 < max(ahead) <= 200 / tokens + 2 and len(read) == 100
    assert updates[-1]["completed"] == pytest.approx(updates[-1]["total"]) and updates[-1]["total"] == 12_000


def test_batches_fill_a_budget_of_tokens():
    lengths = [3, 40, 7, 7, 7, 41, 2, 48, 5]
    [ordered] = sorted_buffers((w for n in lengths for w in windows(0, np.arange(n + 1), 48, 24, 1)), 1000)
    batches = []
    while ordered:
        count = count_in_batch(ordered, 90)
        batches.append([window.num_inputs for window in ordered[:count]])
        ordered = ordered[count:]
    assert batches == [[48], [41, 40], [7, 7, 7, 5, 3, 2]]
    assert count_in_batch([*windows(0, np.arange(9), 8, 4, 1)], 1) == 1, "a window is never split"


def runs_out_above(model, limit):
    """Makes forward passes of more than `limit` tokens fail as on a GPU, and returns the sizes of the others."""
    sizes = []

    def check(module, arguments, options):
        if options["input_ids"].numel() > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(options["input_ids"].numel())

    return sizes, model.model.register_forward_pre_hook(check, with_kwargs=True)


def test_batches_are_halved_when_a_gpu_runs_out_of_memory(model, tokenizer, texts):
    expected = first_version(model, tokenizer, texts)
    sizes, hook = runs_out_above(model, 150)
    with hook:
        found, _ = score_documents(model, tokenizer, [held_out("a", texts)], batch_tokens=600)
    assert found.bits_per_byte == pytest.approx(expected, abs=1e-6) and 75 < max(sizes) <= 150
    sizes, hook = runs_out_above(model, 40)
    with hook, pytest.raises(InputError, match=r"out of memory on a window of 48 tokens.*--dtype bf16"):
        score_documents(model, tokenizer, [held_out("a", texts)], batch_tokens=600)


def test_a_uniform_model_costs_its_vocabulary(tokenizer_folder, tmp_path):
    """A model with equal logits spends log2(512) bits per token."""
    config = TinyLlamaConfig.preset("micro", vocab_size=512, max_position_embeddings=32)
    model = TinyLlamaForCausalLM(config).eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    tokenizer, text = load_tokenizer(tokenizer_folder), "some words to count " * 9
    result, _ = score_documents(model, tokenizer, [held_out("a", [text])])
    tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert result.bits_per_byte == pytest.approx(9 * tokens / len(text), rel=1e-6)


def test_bytes_are_those_of_utf8(tokenizer_folder, tmp_path):
    """é has 2 bytes, an emoji 4, a Chinese character 3, both in the score file and in the figure."""
    texts = ("é", "🚀", "中文 a")
    nats = [math.log(2) * (2 * 1 + 4 * 2), math.log(2) * 8 * 3]
    found = summarize(nats, [held_out("one", texts[:2]), held_out("two", texts[2:])])
    assert found.by_source == pytest.approx({"one": (2 + 8) / 6, "two": 3.0})
    assert found.bits_per_byte == pytest.approx((2 + 8 + 24) / 14)
    config = TinyLlamaConfig.preset("micro", vocab_size=512, max_position_embeddings=32)
    TinyLlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    load_tokenizer(tokenizer_folder).save_pretrained(tmp_path / "model")
    # By their hashes (0.67 and 0.79; 0.20, 0.36 and 0.01) the first two are for training, the others held out.
    rows = [json.dumps({"text": text}) + "\n" for text in ("some words", "é", "éé", "🚀🚀", "中文")]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    folder = tmp_path / "data"
    prepare([str(tmp_path / "a.jsonl")], tokenizer_folder, folder, validation_fraction=0.4, workers=1, progress=False)
    splits = json.loads((folder / "dataset.json").read_text())["splits"]
    assert (splits["train"]["bytes"], splits["validation"]["bytes"]) == (10 + 2, 4 + 8 + 6)
    (data,) = score([str(tmp_path / "model")], [str(folder)], device="cpu", show_progress=False).data
    assert (data.documents, data.bytes) == (3, 18)


def test_a_run_with_baselines(recipe):
    config = load_pretrain_config(recipe)
    pretrain(config)
    scores = score([config.output_dir], baselines=True)
    assert [row.step for row in scores.models] == [6, 12]
    assert [(row.name, row.step) for row in scores.baselines] == [
        ("unigram", 6),
        ("5-gram", 6),
        ("unigram", 12),
        ("5-gram", 12),
    ]
    assert scores.baselines[3].distinct_tokens == 12 * 256
    assert scores.baselines[1].bits_per_byte > scores.baselines[3].bits_per_byte, "more text, fewer bits"
    assert scores.models[0].protocol == TextProtocol(context=32, stride=16, bos=True, dtype="float32")
    assert scores.data[0].documents > 0 and scores.provenance["machine"]
    again = score([scores.models[1].path], [scores.data[0].path])
    assert again.models[0].bits_per_byte == scores.models[1].bits_per_byte


def test_baselines_are_fitted_on_each_block_once(documents, tokenizer_folder, tmp_path):
    """Three epochs count as one."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": documents[0]}) + "\n")
    prepare(
        [str(tmp_path / "a.jsonl")],
        tokenizer_folder,
        tmp_path / "data",
        validation_fraction=0,
        workers=1,
        progress=False,
    )
    tokenizer = load_tokenizer(tokenizer_folder)
    mixture = Mixture([tmp_path / "data"], [1.0], 32, 0, tokenizer_fingerprint(tokenizer))
    tokens = 32 * len(mixture.sources[0])
    milestones = [tmp_path / f"step-{epochs}" for epochs in (1, 3)]
    for epochs, milestone in zip((1, 3), milestones, strict=True):
        milestone.mkdir()
        (milestone / "provenance.json").write_text(json.dumps({"step": epochs, "tokens": epochs * tokens}))
    *_, rows = fit_baselines(mixture, tokenizer, milestones, [held_out("b", [documents[1]])])
    assert [(row.name, row.step) for row in rows] == [
        ("unigram", 1),
        ("5-gram", 1),
        ("unigram", 3),
        ("5-gram", 3),
    ]
    assert {row.distinct_tokens for row in rows} == {tokens}
    assert [row.bits_per_byte for row in rows[:2]] == [row.bits_per_byte for row in rows[2:]]


def test_refusals(prepared, tmp_path, corpus, tokenizer_folder):
    with pytest.raises(InputError, match="--data is required"):
        score([str(tmp_path)])
    with pytest.raises(InputError, match=r"--data .*data set twice"):
        score([str(tmp_path)], [str(prepared), f"{prepared}/."])
    with pytest.raises(InputError, match="--baselines needs one run"):
        score([str(tmp_path)], [str(prepared)], baselines=True)
    with pytest.raises(InputError, match=r"holds no config\.json"):
        score([str(tmp_path)], [str(prepared)])
    prepare([str(corpus)], tokenizer_folder, tmp_path / "all", validation_fraction=0, workers=1, progress=False)
    with pytest.raises(InputError, match="all has no held-out documents"):
        held_out_documents(tmp_path / "all")


def test_the_command_keeps_baselines_and_writes_into_runs_only(recipe, tmp_path):
    config = load_pretrain_config(recipe)
    pretrain(config)
    run = tmp_path / "run"
    (milestone, *_) = sorted((run / "milestones").iterdir())
    before = set(milestone.iterdir())
    done = run_here("tinyllama-hf", "eval", "text", run, "--baselines", cwd=tmp_path)
    with_baselines = json.loads((run / "scores.json").read_text())["baselines"]
    assert len(with_baselines) == 4, done.stderr
    run_here("tinyllama-hf", "eval", "text", run, cwd=tmp_path)
    assert json.loads((run / "scores.json").read_text())["baselines"] == with_baselines
    done = run_here("tinyllama-hf", "eval", "text", milestone, "--data", config.data.sources[0].path, cwd=tmp_path)
    assert done.returncode == 0 and "wrote" not in done.stdout
    assert set(milestone.iterdir()) == before
