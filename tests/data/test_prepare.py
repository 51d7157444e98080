"""Preparing data: every token of every document is in exactly one split, without padding, also after an
interruption."""

import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tinyllama_hf import load_tokenizer
from tinyllama_hf.data.pipeline import split_of
from tinyllama_hf.data.prepare import prepare
from tinyllama_hf.data.row_files import zstd_library
from tinyllama_hf.data.shards import TokenDataset, read_metadata
from tinyllama_hf.errors import InputError
from tinyllama_hf.tokenization_tinyllama import encode_text, tokenizer_fingerprint


# The hash of a text as a number in [0, 1): `printf TEXT | b2sum -l 64`, divided by 2**64.
PLACES = {
    "中文": 0.00742, "e": 0.06581, "f": 0.18198, "c": 0.21581, "a": 0.25379, "🚀": 0.50877, "b": 0.51738,
    "hello world": 0.52939, "d": 0.70956, "é": 0.79338,
}  # fmt: skip


def expected_split(text: str, validation: float, sample: float = 1.0) -> str | None:
    """The documented rule: hashes up to the first fraction are held out, and those up to the second are trained on."""
    place = int(hashlib.blake2b(text.encode("utf-8"), digest_size=8).hexdigest(), 16) / 16**16
    if place < validation:
        return "validation"
    return "train" if (place - validation) / (1 - validation) < sample else None


@pytest.mark.parametrize(("validation", "sample"), [(0.1, 1.0), (0.2, 0.5), (0.5, 0.25), (0.0, 0.6), (0.6, 1.0)])
def test_the_split_is_that_of_the_written_rule(validation, sample):
    end = validation + sample * (1 - validation)
    for text, place in PLACES.items():
        wanted = "validation" if place < validation else "train" if place < end else None
        assert split_of(text, validation, sample) == wanted == expected_split(text, validation, sample)


def run(sources, tokenizer_folder, output, **options):
    return prepare([str(s) for s in sources], tokenizer_folder, output, workers=1, progress=False, **options)


def all_tokens(folder, split="train"):
    dataset = TokenDataset(folder, 8, split)
    return dataset.tokens(0, dataset.num_tokens)


@pytest.mark.parametrize("separator", ["both", "bos", "eos"])
def test_tokens_are_those_of_the_documents(documents, corpus, tokenizer_folder, tmp_path, separator):
    metadata, _ = run([corpus], tokenizer_folder, tmp_path / "out", separator=separator, validation_fraction=0.1)
    tokenizer = load_tokenizer(tokenizer_folder)
    begin = [1] if separator != "eos" else []
    end = [2] if separator != "bos" else []
    for split in ("train", "validation"):
        chosen = [text for text in documents if expected_split(text, 0.1, 1.0) == split]
        expected = [token for text in chosen for token in (*begin, *encode_text(tokenizer, text), *end)]
        assert list(all_tokens(tmp_path / "out", split)) == expected
        assert metadata["splits"][split]["documents"] == len(chosen) > 0
        assert metadata["splits"][split]["bytes"] == sum(len(text.encode()) for text in chosen)
    assert metadata["separator"] == separator


def test_regression_nothing_is_padded_and_a_literal_end_of_sequence_is_text(tokenizer_folder, tmp_path):
    """There is one separator per document. The original TinyLlama preparation padded with `<s>`."""
    texts = [f"document {i} with </s> and <s> spelled out\n" for i in range(50)]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run([file], tokenizer_folder, tmp_path / "out", validation_fraction=0)
    tokens = all_tokens(tmp_path / "out")
    assert [(tokens == i).sum() for i in range(3)] == [0, 50, 50]
    assert load_tokenizer(tokenizer_folder).decode(tokens, skip_special_tokens=True).count("</s>") == 50


def test_held_out_text_is_kept_and_never_trained_on(documents, prepared):
    texts = []
    for file in sorted((prepared / "validation").glob("*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            texts += [json.loads(line)["text"] for line in lines]
    assert texts == [text for text in documents if expected_split(text, 0.1, 1.0) == "validation"]
    train = load_tokenizer(prepared / "tokenizer").decode(all_tokens(prepared))
    assert not any(text in train for text in texts)


def test_sample_fraction_keeps_the_same_validation(documents, corpus, tokenizer_folder, tmp_path):
    metadata, _ = run([corpus], tokenizer_folder, tmp_path / "out", validation_fraction=0.1, sample_fraction=0.5)
    kept = [text for text in documents if expected_split(text, 0.1, 0.5) == "train"]
    assert metadata["splits"]["train"]["documents"] == len(kept)
    assert 0.25 * len(documents) < len(kept) < 0.7 * len(documents)
    assert {t for t in documents if expected_split(t, 0.1, 0.5) == "validation"} == {
        t for t in documents if expected_split(t, 0.1, 1.0) == "validation"
    }


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "jsonl.zst", "txt", "two files"])
def test_every_form_of_source(documents, tokenizer_folder, tmp_path, form):
    texts = documents[:12]
    lines = [json.dumps({"body": text, "metadata": {"n": i}}) + "\n" for i, text in enumerate(texts)]
    folder = tmp_path / "in"
    folder.mkdir()
    if form == "jsonl":
        (folder / "a.jsonl").write_text("".join(lines))
    elif form == "jsonl.gz":
        with gzip.open(folder / "a.jsonl.gz", "wt") as file:
            file.write("".join(lines))
    elif form == "jsonl.zst":
        (folder / "a.jsonl.zst").write_bytes(zstd_library().compress("".join(lines).encode()))
    elif form == "two files":
        (folder / "a.jsonl").write_text("".join(lines[:5]))
        (folder / "b.jsonl").write_text("".join(lines[5:]))
    else:
        for i, text in enumerate(texts):
            (folder / f"{i:02d}.txt").write_text(text)
    run([folder], tokenizer_folder, tmp_path / "out", validation_fraction=0, text_column="body")
    tokenizer = load_tokenizer(tokenizer_folder)
    expected = [token for text in texts for token in (1, *encode_text(tokenizer, text), 2)]
    assert list(all_tokens(tmp_path / "out")) == expected


def test_bytes_are_those_of_utf8_and_empty_texts_are_counted(tokenizer_folder, tmp_path):
    """é has 2 bytes, an emoji 4, and each of the two Chinese characters 3. PLACES gives their splits."""
    texts = ["", "é", "🚀", "e", "hello world", "", "中文", ""]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    metadata, _ = run([tmp_path / "a.jsonl"], tokenizer_folder, tmp_path / "out", validation_fraction=0.52)
    assert metadata["rows"] == {"read": 8, "kept": 8, "empty": 3}
    wanted = {"train": {"documents": 2, "bytes": 2 + 11}, "validation": {"documents": 3, "bytes": 4 + 1 + 6}}
    for split, counts in metadata["splits"].items():
        assert {name: counts[name] for name in ("documents", "bytes")} == wanted[split]
    assert read_metadata(tmp_path / "out")["rows"]["empty"] == 3


def test_texts_that_are_all_empty_are_no_data(tokenizer_folder, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n' * 3)
    with pytest.raises(InputError, match="3 of 3 documents are empty"):
        run([tmp_path / "a.jsonl"], tokenizer_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_byte_order_mark_is_not_prepared(tokenizer_folder, tmp_path):
    for name, mark in (("plain", b""), ("marked", b"\xef\xbb\xbf")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_bytes(mark + "Été\r\n".encode())
        run([tmp_path / name], tokenizer_folder, tmp_path / f"{name}-data", validation_fraction=0)
    assert list(all_tokens(tmp_path / "marked-data")) == list(all_tokens(tmp_path / "plain-data"))


def test_finished_does_nothing_and_another_request_is_refused(corpus, tokenizer_folder, tmp_path):
    first = run([corpus], tokenizer_folder, tmp_path / "out", validation_fraction=0.1)
    stamp = (tmp_path / "out" / "dataset.json").stat().st_mtime_ns
    second = run([corpus], tokenizer_folder, tmp_path / "out", validation_fraction=0.1)
    assert (first[1], second[1]) == (False, True)
    assert second[0] == first[0]
    assert (tmp_path / "out" / "dataset.json").stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match=r"another request \(different: begin, separator\)"):
        run([corpus], tokenizer_folder, tmp_path / "out", validation_fraction=0.1, separator="eos")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("x")
    with pytest.raises(InputError, match="not a data set"):
        run([corpus], tokenizer_folder, tmp_path / "other")
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["precious.txt"]


def test_fingerprint_follows_the_contents(documents, corpus, tokenizer_folder, tmp_path):
    metadata = [run([corpus], tokenizer_folder, tmp_path / name)[0] for name in ("a", "b")]
    assert metadata[0]["fingerprint"] == metadata[1]["fingerprint"]
    assert metadata[0]["tokenizer"]["fingerprint"] == tokenizer_fingerprint(load_tokenizer(tokenizer_folder))
    changed = tmp_path / "changed.jsonl"
    changed.write_text("".join(json.dumps({"text": text + "."}) + "\n" for text in documents))
    assert run([changed], tokenizer_folder, tmp_path / "c")[0]["fingerprint"] != metadata[0]["fingerprint"]


@pytest.mark.slow
def test_killed_it_goes_on_with_what_is_missing(documents, tokenizer_folder, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(24):
        rows = [json.dumps({"text": text + str(i)}) + "\n" for text in documents * 3]
        (folder / f"{i:02d}.jsonl").write_text("".join(rows))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tests.data.prepare_script", str(folder), str(tokenizer_folder), str(out)]
    process = subprocess.Popen(command, start_new_session=True)
    completions = out / "work" / "logs" / "completions"
    deadline = time.monotonic() + 120
    while len(list(completions.glob("*"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    shards = [out / "train" / f"{p.name}.tokens" for p in completions.glob("*")]
    done = {shard: shard.stat().st_mtime_ns for shard in shards}
    assert 3 <= len(done) < 24, "killed too late to show anything"
    with pytest.raises(InputError, match="interrupted"):
        read_metadata(out)
    # The lock of a killed process is released, and the same call resumes.
    metadata, _ = run([folder], tokenizer_folder, out, validation_fraction=0.1)
    reference, _ = run([folder], tokenizer_folder, tmp_path / "reference", validation_fraction=0.1)
    assert metadata["fingerprint"] == reference["fingerprint"]
    assert {shard: shard.stat().st_mtime_ns for shard in done} == done, "what was finished must not be done again"


def test_truncation_of_a_stock_tokenizer_is_not_obeyed(documents, corpus, tokenizer_folder, tmp_path):
    """A tokenizer folder may have truncation and padding settings from fine-tuning."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_folder, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    loaded = load_tokenizer(tokenizer_folder)
    (folder / "tokenizer.model").unlink()
    tokenizer.save(str(folder / "tokenizer.json"))
    metadata, _ = run([corpus], folder, tmp_path / "out", validation_fraction=0)
    assert metadata["splits"]["train"]["tokens"] == sum(len(encode_text(loaded, text)) + 2 for text in documents)


def word_tokenizer(folder, size, truncation=None):
    """A stock tokenizer with one token per word: `<unk>`, `<s>`, `</s>`, `w3`, `w4`, ..."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, size))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    ).save_pretrained(folder)
    if truncation:
        saved = Tokenizer.from_file(str(folder / "tokenizer.json"))
        saved.enable_truncation(truncation)
        saved.enable_padding(length=truncation)
        saved.save(str(folder / "tokenizer.json"))
    return folder


def test_neither_is_that_of_a_tokenizer_of_another_kind(tmp_path):
    (tmp_path / "a.txt").write_text("w3 w4 w5 w6 w7 w8")
    (tmp_path / "b.txt").write_text("w9")
    folder = word_tokenizer(tmp_path / "tokenizer", 16, truncation=4)
    run([tmp_path / "a.txt", tmp_path / "b.txt"], folder, tmp_path / "out", validation_fraction=0)
    assert list(all_tokens(tmp_path / "out")) == [1, 3, 4, 5, 6, 7, 8, 2, 1, 9, 2]


@pytest.mark.parametrize(("size", "dtype"), [(65536, "<u2"), (65537, "<u4")])
def test_every_id_has_room(tmp_path, size, dtype):
    """The largest of 65536 ids is the last one that fits into two bytes."""
    (tmp_path / "a.txt").write_text(f"w{size - 1} w3 w256 w{size - 1}")
    folder = word_tokenizer(tmp_path / "tokenizer", size)
    metadata, _ = run([tmp_path / "a.txt"], folder, tmp_path / "out", validation_fraction=0)
    assert metadata["token_dtype"] == dtype
    expected = [1, size - 1, 3, 256, size - 1, 2]
    assert np.fromfile(tmp_path / "out" / "train" / "00000.tokens", dtype).tolist() == expected
    assert TokenDataset(tmp_path / "out", 5)[0].tolist() == expected


class TestBlocks:
    def test_blocks_cross_files_and_overlap_by_one(self, documents, tokenizer_folder, tmp_path):
        for i in range(3):
            rows = "".join(json.dumps({"text": text}) + "\n" for text in documents[i * 3 : i * 3 + 3])
            (tmp_path / f"{i}.jsonl").write_text(rows)
        files = [tmp_path / f"{i}.jsonl" for i in range(3)]
        run(files, tokenizer_folder, tmp_path / "out", validation_fraction=0)
        stream = np.concatenate(
            [np.fromfile(tmp_path / "out" / "train" / f"{i:05d}.tokens", dtype="<u2") for i in range(3)]
        )
        dataset = TokenDataset(tmp_path / "out", 50)
        assert len(dataset) == (len(stream) - 1) // 50
        assert dataset.num_tail_tokens == len(stream) - 50 * len(dataset)
        for i in (0, 1, len(dataset) // 2, len(dataset) - 1):
            assert np.array_equal(dataset[i], stream[i * 50 : i * 50 + 51])
        with pytest.raises(IndexError):
            dataset[len(dataset)]

    def test_positions_restart_at_documents(self, prepared):
        dataset = TokenDataset(prepared, 40)
        starts = 0
        for i in range(len(dataset)):
            tokens, positions = dataset[i][:-1], dataset.position_ids(i)
            assert positions[0] == 0
            for j in range(1, 40):
                begins = tokens[j] == 1
                assert positions[j] == (0 if begins else positions[j - 1] + 1)
                starts += begins
        assert starts > 10

    def test_less_than_a_block_is_refused(self, prepared):
        with pytest.raises(InputError, match="less than one block of 10000000"):
            TokenDataset(prepared, 10_000_000)
        with pytest.raises(InputError, match="--validation-fraction"):
            TokenDataset(prepared, 10_000_000, "validation")

    def test_damage_is_found(self, corpus, tokenizer_folder, tmp_path):
        run([corpus], tokenizer_folder, tmp_path / "out")
        shard = tmp_path / "out" / "train" / "00000.tokens"
        shard.write_bytes(shard.read_bytes()[:-2])
        with pytest.raises(InputError, match="has another size"):
            TokenDataset(tmp_path / "out", 8)
        shard.unlink()
        with pytest.raises(InputError, match="is missing"):
            TokenDataset(tmp_path / "out", 8)


class TestRefusals:
    @pytest.mark.parametrize(
        ("sources", "options", "message"),
        [
            (["nowhere"], {}, "nowhere does not exist"),
            (["embedded:poetry"], {}, "embedded:poetry .*prose"),
            (["a.csv"], {}, r"a\.csv: .*\.jsonl"),
            (["a.jsonl"], {"text_column": "body"}, "'body'; available: text"),
            (["broken.jsonl"], {}, "row 1: not valid JSON"),
            (["empty.jsonl"], {}, "contains no rows"),
            (["half.jsonl"], {"validation_fraction": 0.0}, r"row 2, 'text': character 1 is '.ud83d'"),
            (["a.jsonl"], {"workers_": 0}, "--workers 0 must be at least 1"),
            (["late.jsonl"], {"validation_fraction": 0.0}, "row 2: not valid JSON"),
            (["cut.jsonl.gz"], {"validation_fraction": 0.0}, "damaged after row [0-9]+ .*end-of-stream"),
            (["cut.jsonl.zst"], {"validation_fraction": 0.0}, "damaged after row [0-9]+ .*end-of-stream"),
            (["a.jsonl", "b.txt"], {}, "mixed"),
            (["a.jsonl"], {"separator": "bot"}, "did you mean 'both'"),
            (["a.jsonl"], {"validation_fraction": 1.0}, "below 1"),
            (["a.jsonl"], {"sample_fraction": 0.0}, "above 0"),
            (["latin.txt"], {"validation_fraction": 0.0}, "not UTF-8"),
            (["second.jsonl"], {"validation_fraction": 0.0}, "row 2: no text: no value at 'text'; available: other"),
            (["a.jsonl"], {"sample_fraction": 1e-9, "validation_fraction": 0.0}, "no text to train on"),
        ],
    )
    def test_one_clear_error_and_no_data_set(self, tokenizer_folder, tmp_path, monkeypatch, sources, options, message):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "a.csv").write_text("x")
        (tmp_path / "a.jsonl").write_text('{"text": "some text"}\n')
        (tmp_path / "second.jsonl").write_text('{"text": "some text"}\n{"other": 1}\n')
        (tmp_path / "broken.jsonl").write_text("{\n")
        (tmp_path / "half.jsonl").write_text('{"text": "some text"}\n{"text": "a\\ud83d"}\n')
        (tmp_path / "late.jsonl").write_text('{"text": "some text"}\n{\n{"text": "more"}\n')
        rows = "".join(f'{{"text": "{i * i}"}}\n' for i in range(20_000)).encode()
        (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(rows)[:-1000])
        (tmp_path / "cut.jsonl.zst").write_bytes(zstd_library().compress(rows)[:-1000])
        (tmp_path / "empty.jsonl").write_text("")
        (tmp_path / "b.txt").write_text("text")
        (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
        with pytest.raises(InputError, match=message):
            prepare(
                sources,
                tokenizer_folder,
                tmp_path / "out",
                workers=options.pop("workers_", 1),
                progress=False,
                **options,
            )
        assert not (tmp_path / "out").exists()
