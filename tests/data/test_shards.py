"""Shards: more of them than a process may open files, and checks of their contents."""

import gzip
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tinyllama_hf.data.prepare import prepare
from tinyllama_hf.data.shards import TokenDataset, check_contents
from tinyllama_hf.errors import InputError


MANY = 150
DOCUMENTS = (5, 30, 7)  # tokens of each, in every shard


def write_many(folder: Path) -> np.ndarray:
    """Writes a data set of many shards with distinct tokens, and returns the tokens."""
    (folder / "train").mkdir(parents=True)
    size, shards = sum(DOCUMENTS), []
    stream = np.arange(MANY * size)
    for number, tokens in enumerate(np.split(stream, MANY)):
        name = f"train/{number:05d}.tokens"
        tokens.astype("<u2").tofile(folder / name)
        np.cumsum(DOCUMENTS).astype("<u8").tofile(folder / f"{name}.index")
        shards.append({"file": name, "sha256": str(number), "documents": len(DOCUMENTS), "tokens": size, "bytes": 1})
    metadata = {"format_version": 1, "token_dtype": "<u2", "splits": {"train": {"shards": shards}}}
    (folder / "dataset.json").write_text(json.dumps(metadata))
    return stream


def check_many(folder: str) -> None:
    """Reads all blocks of that data set and their positions in random order, also in a copy and in a fork."""
    dataset = TokenDataset(folder, 50)
    os.chdir("/")
    position_in_document = np.tile(np.concatenate([np.arange(n) for n in DOCUMENTS]), MANY)
    for reader in (dataset, pickle.loads(pickle.dumps(dataset))):
        for index in np.random.default_rng(1).permutation(len(dataset)).tolist():
            places = np.arange(index * 50, index * 50 + 51)
            assert np.array_equal(reader[index], places) and reader[index].dtype == np.int64
            positions = reader.position_ids(index)
            assert np.array_equal(positions, np.minimum(position_in_document[places[:-1]], np.arange(50)))
            assert positions.dtype == np.int64
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(dataset[3], np.arange(150, 201)) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.slow
def test_more_shards_than_descriptors(tmp_path):
    """Shards are opened on demand. SlimPajama has 59 166 of them."""
    stream = write_many(tmp_path / "data")
    assert np.array_equal(TokenDataset(tmp_path / "data", 50).tokens(0, len(stream)), stream)
    # A relative path, which must stay valid if the working directory changes.
    script = "from tests.data.test_shards import check_many; check_many('data')"
    subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
    )


def test_what_lies_there_anew_is_read_anew(tmp_path):
    for shift in (0, 1):
        write_many(tmp_path / "data")
        path = tmp_path / "data" / "dataset.json"
        if shift:
            (np.arange(sum(DOCUMENTS)) + shift).astype("<u2").tofile(tmp_path / "data/train/00000.tokens")
            path.write_text(path.read_text().replace('"sha256": "0"', '"sha256": "other"'))
        assert TokenDataset(tmp_path / "data", 4)[0].tolist() == [shift + i for i in range(5)]
        shutil.rmtree(tmp_path / "data")


def test_gone_while_it_is_read(tmp_path):
    write_many(tmp_path / "data")
    dataset = TokenDataset(tmp_path / "data", 10)
    (tmp_path / "data" / "train" / "00149.tokens").unlink()
    with pytest.raises(InputError, match=r"00149\.tokens cannot be read"):
        dataset[len(dataset) - 1]


class TestContents:
    @pytest.fixture
    def data(self, corpus, tokenizer_folder, tmp_path) -> Path:
        prepare([str(corpus)], tokenizer_folder, tmp_path / "data", validation_fraction=0.1, workers=1, progress=False)
        return tmp_path / "data"

    def test_as_prepared(self, data):
        assert check_contents(data, progress=False) == 2
        moved = shutil.copytree(data, data.with_name("moved"), copy_function=shutil.copyfile)
        assert check_contents(moved, progress=False) == 2

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("train/00000.tokens", r"00000\.tokens: SHA-256"),
            ("train/00000.tokens.index", r"tokens\.index: document ends"),
            ("validation/00000.jsonl.gz", r"00000\.jsonl\.gz: "),
        ],
    )
    def test_a_change_of_equal_size_is_found(self, data, name, message):
        """Opening a data set compares sizes only, and does not detect it."""
        contents = bytearray((data / name).read_bytes())
        contents[len(contents) // 2 - 1] ^= 0xFF
        (data / name).write_bytes(contents)
        TokenDataset(data, 8)
        with pytest.raises(InputError, match=message):
            check_contents(data, progress=False)

    def test_other_held_out_text_and_other_counts(self, data):
        with gzip.open(data / "validation" / "00000.jsonl.gz", "wt") as file:
            file.write('{"text": "one"}\n')
        with pytest.raises(InputError, match="1 documents, not"):
            check_contents(data, progress=False)
        metadata = json.loads((data / "dataset.json").read_text())
        metadata["splits"]["train"]["documents"] += 1
        (data / "dataset.json").write_text(json.dumps(metadata))
        with pytest.raises(InputError, match=r"2 file\(s\) differ[^$]*dataset\.json: fingerprint"):
            check_contents(data, progress=False)

    @pytest.mark.parametrize("split", ["train", "validation"])
    def test_the_size_of_an_index_is_known_at_the_opening(self, data, split):
        index = data / split / "00000.tokens.index"
        index.write_bytes(index.read_bytes()[:-8])
        with pytest.raises(InputError, match=r"tokens\.index: .*has another size"):
            TokenDataset(data, 8, split)

    def test_command(self, data, capsys, monkeypatch):
        import tinyllama_hf_cli

        def command(*arguments: object) -> int:
            monkeypatch.setattr(sys, "argv", ["tinyllama-hf", "prepare", *map(str, arguments)])
            with pytest.raises(SystemExit) as ended:
                tinyllama_hf_cli.main()
            return ended.value.code

        assert command("--check", data) == 0
        assert "2 shards match their checksums" in capsys.readouterr().out
        assert command("--check", data, "--tokenizer", "x") == 2
        assert "takes no other arguments. Leave out --tokenizer" in capsys.readouterr().err
        (data / "train" / "00000.tokens").unlink()
        assert command("--check", data) == 2
        assert "is missing" in capsys.readouterr().err
        assert command() == 2
        assert "No source was given" in capsys.readouterr().err
