"""Which held-out documents are scored: the sample against a plain sort, and scores on other samples."""

import gzip
import hashlib
import json
import random
import re
import tracemalloc

import pytest

from tests.conftest import run_here
from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load_tokenizer
from tinyllama_hf.data.prepare import prepare
from tinyllama_hf.data.train_tokenizer import train_tokenizer
from tinyllama_hf.errors import InputError
from tinyllama_hf.evaluation.held_out.bits_per_byte import score_documents
from tinyllama_hf.evaluation.held_out.held_out_text import (
    choose_sample,
    held_out_documents,
    held_out_source,
    parse_max_bytes,
)
from tinyllama_hf.evaluation.held_out.text_protocol import check_same_dtype, check_same_text
from tinyllama_hf.evaluation.score_files import TextScoreFile, TextSource, read_scores
from tinyllama_hf.evaluation.series import check_can_score, lock_score_file, score
from tinyllama_hf.files import read_json, write_json


WORDS = [f"text {number} " + "é🚀 wörds " * (number % 7) for number in range(200)]


def sample_by_sorting(texts, max_bytes):
    """All texts by their hash, as one string of bytes, cut."""
    ordered = sorted(texts, key=lambda text: hashlib.blake2b(text.encode(), digest_size=8).digest())
    joined = "".join(ordered).encode()[:max_bytes].decode(errors="ignore")
    chosen = []
    while joined:
        chosen.append(joined[: len(ordered[len(chosen)])])
        joined = joined[len(chosen[-1]) :]
    return tuple(chosen)


@pytest.mark.parametrize("max_bytes", [7, 8, 100, 101, 102, 103, 1000, 5000])
def test_the_sample_depends_on_nothing_but_the_texts(max_bytes):
    expected = sample_by_sorting(WORDS, max_bytes)
    size = sum(len(text.encode()) for text in expected)
    assert max_bytes - 3 <= size <= max_bytes and set(expected[:-1]) <= set(WORDS)
    for seed in range(5):
        shuffled = random.Random(seed).sample(WORDS, len(WORDS))
        assert choose_sample(shuffled, max_bytes) == expected
    assert len({len(text) for text in expected}) > 1 or max_bytes < 100


def test_texts_that_occur_twice_are_in_the_sample_twice():
    assert choose_sample(["abc", "abc", "abc"], 7) == ("abc", "abc", "a")
    assert choose_sample(["", "abc", ""], 100) == ("abc",)


def test_choosing_holds_the_sample_and_one_text(tmp_path):
    texts = (f"{number:07d}" + "x" * 993 for number in range(20_000))
    tracemalloc.start()
    sample = choose_sample(texts, 50_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(map(len, sample)) == 50_000 and peak < 400_000, "of 20 MB"


@pytest.fixture(scope="module")
def other_tokenizer(documents, tmp_path_factory):
    folder = tmp_path_factory.mktemp("other") / "tokenizer"
    train_tokenizer(documents[:20], 400, folder)
    return folder


def prepared_from(texts, tokenizer, folder, files=1, fraction=0.5):
    folder.mkdir()
    paths = [folder / f"{number}.jsonl" for number in range(files)]
    for number, path in enumerate(paths):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[number::files]))
    options = {"validation_fraction": fraction, "workers": 1, "progress": False}
    prepare([str(path) for path in paths], tokenizer, folder / "data", **options)
    return folder / "data"


def test_it_is_equal_for_other_shards_orders_tokenizers_and_shares(tokenizer_folder, other_tokenizer, tmp_path):
    backwards = WORDS[::-1]
    folders = [
        prepared_from(WORDS, tokenizer_folder, tmp_path / "a"),
        prepared_from(backwards, other_tokenizer, tmp_path / "b", files=3, fraction=0.8),
    ]
    all_texts = [list(held_out_documents(folder).texts) for folder in folders]
    assert len(all_texts[0]) < len(all_texts[1]) and set(all_texts[0]) <= set(all_texts[1])
    samples = [held_out_documents(folder, 1000) for folder in folders]
    assert samples[0].texts == samples[1].texts == sample_by_sorting(WORDS, 1000)
    for folder, sample, texts in zip(folders, samples, all_texts, strict=True):
        source, size = sample.source, sum(len(text.encode()) for text in texts)
        assert (source.documents, source.total_documents, source.total_bytes) == (len(sample.texts), len(texts), size)
        assert 997 <= source.bytes <= 1000 == source.max_bytes
        whole = held_out_documents(folder, size).source
        assert whole == held_out_documents(folder).source == held_out_source(folder)
        assert (whole.documents, whole.bytes, whole.max_bytes) == (len(texts), size, None)


@pytest.mark.parametrize(
    ("value", "expected"), [("all", None), ("0", None), ("2_000", 2000), ("5k", 5000), ("1M", 10**6)]
)
def test_sizes(value, expected):
    assert parse_max_bytes(value) == expected


@pytest.mark.parametrize("value", ["-1", "1.5", "some", "1T", ""])
def test_other_sizes_are_refused(value):
    with pytest.raises(InputError, match=rf"--max-bytes '?{value}.*all"):
        parse_max_bytes(value)


def test_a_sample_smaller_than_a_character_is_refused(tokenizer_folder, tmp_path):
    folder = prepared_from(["é" * number for number in range(1, 60)], tokenizer_folder, tmp_path / "a")
    with pytest.raises(InputError, match=r"--max-bytes 1: not enough.*Use at least 4"):
        held_out_documents(folder, 1)


@pytest.mark.parametrize("problem", ["missing", "truncated", "short", "other"])
def test_damaged_documents_are_named(tokenizer_folder, tmp_path, problem):
    folder = prepared_from(WORDS, tokenizer_folder, tmp_path / "a", files=2)
    file = folder / "validation" / "00001.jsonl.gz"
    if problem == "missing":
        file.unlink()
    elif problem == "truncated":
        file.write_bytes(file.read_bytes()[:-50])
    else:
        with gzip.open(file, "rt") as lines:
            rows = list(lines)
        with gzip.open(file, "wt") as lines:
            lines.writelines(rows[:-1] if problem == "short" else [*rows[:-1], '{"id": "1"}\n'])
    with pytest.raises(InputError, match=r"validation/00001\.jsonl\.gz: .*"):
        list(held_out_documents(folder).texts)


@pytest.fixture(scope="module")
def data(tokenizer_folder, tmp_path_factory):
    return prepared_from(WORDS, tokenizer_folder, tmp_path_factory.mktemp("data") / "a")


@pytest.fixture(scope="module")
def models(tokenizer_folder, other_tokenizer, tmp_path_factory):
    """Two models with tokenizers of their own."""
    folders = []
    for name, tokenizer in (("one", tokenizer_folder), ("two", other_tokenizer)):
        folder = tmp_path_factory.mktemp("models") / name
        config = TinyLlamaConfig.preset("micro", vocab_size=512, max_position_embeddings=64)
        TinyLlamaForCausalLM(config).save_pretrained(folder)
        load_tokenizer(tokenizer).save_pretrained(folder)
        folders.append(str(folder))
    return folders


def test_models_with_other_tokenizers_are_scored_on_the_same_sample(models, data, tmp_path):
    output = tmp_path / "scores.json"
    file = score(models, [str(data)], output=output, max_bytes=900, show_progress=False)
    [source] = file.data
    assert [row.name for row in file.models] == ["one", "two"] and 897 <= source.bytes <= 900
    assert read_scores(output, TextScoreFile) == file
    [written] = read_json(output)["data"]
    assert written["max_bytes"] == 900 and written["total_bytes"] > 2 * written["bytes"] == 2 * source.bytes
    model, tokenizer = TinyLlamaForCausalLM.from_pretrained(models[1]).eval(), load_tokenizer(models[1])
    alone, _ = score_documents(model, tokenizer, [held_out_documents(data, 900)])
    assert file.models[1].bits_per_byte == pytest.approx(alone.bits_per_byte, abs=1e-6)


def test_models_are_added_to_a_file_one_by_one(models, data, tmp_path):
    output = tmp_path / "scores.json"
    first = score(models[:1], [str(data)], output=output, show_progress=False)
    both = score(models[1:], [str(data)], output=output, show_progress=False)
    assert [row.name for row in both.models] == ["one", "two"] and both.models[0] == first.models[0]


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (None, 900, r"all [\d,]+ bytes of the held-out .*not on a sample of 900 bytes.*--max-bytes all .*--rescore"),
        (900, None, r"a sample of 900 bytes of .*not on all [\d,]+ bytes.*--max-bytes 900 .*--rescore.*--output"),
        (900, 901, r"a sample of 900 bytes.*not on a sample of 901 bytes"),
    ],
)
def test_another_sample_is_refused_before_anything_is_read_or_scored(models, data, tmp_path, before, now, message):
    output = tmp_path / "scores.json"
    options = {"output": output, "show_progress": False}
    score(models[:1], [str(data)], max_bytes=before, **options)
    text = output.read_text()
    with pytest.raises(InputError, match=rf"scores\.json has scores on {message}"):
        score(["gone", *models], [str(data)], max_bytes=now, **options)
    assert output.read_text() == text
    score(models[:1], [str(data)], max_bytes=now, rescore=True, **options)
    assert read_json(output)["data"][0]["max_bytes"] == now


def test_a_file_of_an_early_version_has_scores_on_everything(models, data, tmp_path, monkeypatch):
    output = tmp_path / "scores.json"
    options = {"output": output, "show_progress": False}
    score(models[:1], [str(data)], **options)
    contents = read_json(output)
    for key in ("total_documents", "total_bytes", "max_bytes"):
        del contents["data"][0][key]
    write_json(output, contents)
    [source] = read_scores(output, TextScoreFile).data
    assert source == TextSource(**contents["data"][0]) and source.max_bytes is None
    with pytest.raises(InputError, match="--max-bytes all"):
        score(models[1:], [str(data)], max_bytes=900, **options)
    # The default sample is larger than this data set.
    assert len(score(models[1:], [str(data)], **options).models) == 2


def test_training_knows_before_it_starts(data, models, tmp_path, monkeypatch):
    from tinyllama_hf.evaluation import series

    score(models[:1], [str(data)], output=tmp_path / "scores.json", show_progress=False)
    check_can_score(tmp_path, [str(data)])
    monkeypatch.setattr(series, "DEFAULT_MAX_BYTES", 900)
    with pytest.raises(InputError, match=r"not on a sample of 900 bytes.*`eval text`"):
        check_can_score(tmp_path, [str(data)])


def test_the_option_to_add_to_several_data_sets(data, tokenizer_folder, tmp_path):
    """One of which is smaller than the sample."""
    small = prepared_from(WORDS[:30], tokenizer_folder, tmp_path / "small")
    folders = [str(small), str(data)]
    size = held_out_source(small).bytes
    assert size < 2000 < held_out_source(data).bytes
    file = TextScoreFile(data=[held_out_source(folder, 2000) for folder in folders], models=[])
    check_same_text(file, folders, 2000, None)
    with pytest.raises(InputError, match="--max-bytes 2000 "):
        check_same_text(file, folders, 900, None)


class TestDtype:
    def test_it_is_in_the_protocol_and_decides_the_arithmetic(self, models, data):
        rows = [score(models[:1], [str(data)], dtype=d, show_progress=False).models[0] for d in ("fp32", "bf16")]
        assert [row.protocol.dtype for row in rows] == ["float32", "bfloat16"]
        assert rows[0].bits_per_byte != rows[1].bits_per_byte == pytest.approx(rows[0].bits_per_byte, abs=0.02)

    def test_another_one_is_refused_before_a_model_is_loaded(self, models, data, tmp_path):
        options = {"output": tmp_path / "scores.json", "show_progress": False}
        score(models[:1], [str(data)], **options)
        with pytest.raises(InputError, match=r"scores\.json: one was scored in float32, but two .* bfloat16.*--dtype"):
            score(models[1:], [str(data)], dtype="bf16", **options)
        with pytest.raises(InputError, match=r"--dtype 'auto'.*fp32 or bf16"):
            score(models[:1], [str(data)], dtype="auto")

    def test_models_that_need_bf16(self, models, data):
        from tinyllama_hf.evaluation.score_files import ScoredModel

        chosen = [ScoredModel(name=n, path=n, quantization=q) for n, q in (("a", "none"), ("b", "int4"))]
        check_same_dtype([], chosen, "bf16", None)
        with pytest.raises(InputError, match=r"a would be scored in float32, but b in bfloat16.*--dtype bf16"):
            check_same_dtype([], chosen, "fp32", None)


class TestLock:
    def test_a_file_that_another_process_writes_is_named(self, models, data, tmp_path):
        output = tmp_path / "scores.json"
        with lock_score_file(output), pytest.raises(InputError, match=rf"--output {re.escape(str(output))}: another"):
            score(models[:1], [str(data)], output=output)
        with lock_score_file(output):
            command = ("tinyllama-hf", "eval", "text", models[0], "--data", data, "--output", output)
            done = run_here(*command, cwd=tmp_path)
        assert done.returncode == 2 and f"{output}: another process is writing" in done.stderr

    def test_it_leaves_nothing(self, models, data, tmp_path):
        score(models[:1], [str(data)], output=tmp_path / "new" / "scores.json", show_progress=False)
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["scores.json"]
        with pytest.raises(InputError):
            score(["gone"], [str(data)], output=tmp_path / "other" / "scores.json")
        assert not list(tmp_path.glob("other/*"))


def test_the_command_names_the_sample(models, data, tmp_path):
    output = tmp_path / "scores.json"
    command = ("tinyllama-hf", "eval", "text", models[0], "--data", data, "--output", output)
    done = run_here(*command, "--max-bytes", "900", "--dtype", "bf16", cwd=tmp_path)
    written = read_json(output)
    [source], [row] = written["data"], written["models"]
    assert f"sample of {data}: {source['bytes']} of {source['total_bytes']:,} bytes\n" in done.stdout
    assert row["protocol"]["dtype"] == "bfloat16" and f"{row['bits_per_byte']:.4f}" in done.stdout
