"""Bits per byte against stock transformers, with a loop that scores one document at a time."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.conftest import run_here
from tests.pretrain.runs import pretrain
from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load_tokenizer
from tinyllama_hf.data.mixture import Mixture
from tinyllama_hf.data.prepare import prepare
from tinyllama_hf.errors import InputError
from tinyllama_hf.evaluation.bits_per_byte import HeldOut, held_out_documents, score_documents, summarize, windows
from tinyllama_hf.evaluation.score_files import TextProtocol
from tinyllama_hf.evaluation.series import _baselines, score
from tinyllama_hf.pretrain.config import load_pretrain_config
from tinyllama_hf.tokenization_tinyllama import tokenizer_fingerprint


@pytest.mark.parametrize("length", [2, 3, 8, 9, 10, 12, 13, 50])
@pytest.mark.parametrize(("context", "stride"), [(8, 4), (8, 8), (5, 1)])
def test_every_token_is_scored_once_with_enough_before_it(length, context, stride):
    tokens = np.arange(length)
    scored = []
    for window in windows(0, tokens, context, stride):
        assert len(window.tokens) <= context + 1
        assert np.array_equal(window.tokens, np.arange(window.tokens[0], window.tokens[0] + len(window.tokens)))
        scored += window.tokens[-window.num_scored :].tolist()
        if window.tokens[0] > 0:
            assert len(window.tokens) - 1 - window.num_scored >= context - stride
    assert scored == list(range(1, length))


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


def test_equals_stock_transformers(tokenizer_folder, documents, tmp_path):
    torch.manual_seed(0)
    config = TinyLlamaConfig.preset("micro", vocab_size=512, max_position_embeddings=48)
    TinyLlamaForCausalLM(config).save_pretrained(tmp_path)
    load_tokenizer(tokenizer_folder).save_pretrained(tmp_path)
    texts = [*(text[:700] for text in documents[:6]), "short", "with </s> in it, and ünïcode ", "x" * 300]
    assert score_texts(tmp_path, texts).bits_per_byte == pytest.approx(stock_bits_per_byte(tmp_path, texts), abs=1e-6)


def score_texts(folder, texts):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return score_documents(model, tokenizer, [HeldOut("a", "", tuple(texts))], batch_size=4)[0]


def test_a_uniform_model_costs_its_vocabulary(tokenizer_folder, tmp_path):
    """A model with equal logits spends log2(512) bits per token."""
    config = TinyLlamaConfig.preset("micro", vocab_size=512, max_position_embeddings=32)
    model = TinyLlamaForCausalLM(config).eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    tokenizer, text = load_tokenizer(tokenizer_folder), "some words to count " * 9
    result, _ = score_documents(model, tokenizer, [HeldOut("a", "", (text,))])
    tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert result.bits_per_byte == pytest.approx(9 * tokens / len(text), rel=1e-6)


def test_bytes_are_those_of_utf8(tokenizer_folder, tmp_path):
    """é has 2 bytes, an emoji 4, a Chinese character 3, both in the score file and in the figure."""
    texts = ("é", "🚀", "中文 a")
    sizes = {"é": 2, "🚀": 4, "中文 a": 8}
    nats = [math.log(2) * sizes[text] * bits for text, bits in zip(texts, (1, 2, 3), strict=True)]
    found = summarize(nats, [HeldOut("one", "", texts[:2]), HeldOut("two", "", texts[2:])])
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
    *_, rows = _baselines(mixture, tokenizer, milestones, [HeldOut("b", "", (documents[1],))])
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
