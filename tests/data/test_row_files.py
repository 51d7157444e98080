"""Rows with real schemas: row filters, text columns, Parquet, data sets of the Hub, and the bundled data recipes."""

import json
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_here
from tinyllama_hf.data.expressions import Expression, MissingColumn, value_at
from tinyllama_hf.data.prepare import prepare
from tinyllama_hf.data.row_files import read_rows, zstd_library
from tinyllama_hf.data.shards import TokenDataset
from tinyllama_hf.data.sources import open_sources
from tinyllama_hf.errors import InputError
from tinyllama_hf.tokenization_tinyllama import load_tokenizer


ROW = {"text": "x", "meta": {"redpajama_set_name": "RedPajamaC4", "n": 3, "tags": ["a", "b"]}, "a.b": 1, "none": None}
SETS = ("RedPajamaC4", "RedPajamaGithub", "RedPajamaBook", "RedPajamaGithub", "RedPajamaWikipedia")


class TestExpressions:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ('meta.redpajama_set_name != "RedPajamaGithub"', True),
            ('meta.redpajama_set_name == "RedPajamaGithub"', False),
            ("meta.n >= 3 and meta.n < 4", True),
            ("2 < meta.n <= 3", True),
            ("1 < meta.n < 2", False),
            ("4 > meta.n > 2 > 1", True),
            ("not (meta.n > 2 or text == 'x')", False),
            ('meta.redpajama_set_name in ["RedPajamaC4", "RedPajamaBook"]', True),
            ('"a" in meta.tags and "c" not in meta.tags', True),
            ("none == null and meta.n != -1", True),
            ("true and not false", True),
            ("text == 'x' or missing == 1", True),
        ],
    )
    def test_value(self, text, expected):
        assert Expression(text)(ROW) is expected

    @pytest.mark.parametrize(
        "text",
        [
            "__import__('os').system('true')",
            "meta.n + 1 == 4",
            "text.lower() == 'x'",
            "[x for x in meta.tags]",
            "lambda: 1",
            "meta['n'] == 3",
            "text is None",
            "f'{text}' == 'x'",
            "(text := 1) == 1",
            "b'x' == text",
            "1 if text else 2",
            "*text",
            "-'x' == text",
            "-true == text",
            "text.upper().lower == 'x'",
        ],
    )
    def test_nothing_else_is_of_the_language(self, text):
        with pytest.raises(InputError, match="--where"):
            Expression(text)

    @pytest.mark.parametrize("text", ["", "meta.n ==", "a b", "('x'"])
    def test_no_expression(self, text):
        with pytest.raises(InputError, match="not a valid expression"):
            Expression(text)

    def test_missing_and_incomparable(self):
        with pytest.raises(
            MissingColumn, match=r"no value at 'meta.name'; available: a.b, meta.n, meta.redpajama_set_name"
        ):
            Expression("meta.name == 'x'")(ROW)
        with pytest.raises(InputError, match="cannot be compared"):
            Expression("meta.n < 'x'")(ROW)

    def test_a_key_with_a_dot(self):
        assert value_at(ROW, "a.b") == 1


def slimpajama_rows(documents: list[str]) -> list[dict]:
    """Rows with the real schema; two of five are from GitHub."""
    return [{"text": text, "meta": {"redpajama_set_name": SETS[i % 5]}} for i, text in enumerate(documents)]


def write_parquet(rows: list[dict], path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)


def cli(*arguments: object, cwd: Path) -> str:
    done = run_here("tinyllama-hf", "prepare", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestShippedRecipes:
    @pytest.mark.slow
    def test_slimpajama_without_github(self, documents, tokenizer_folder, tmp_path):
        rows = slimpajama_rows(documents)
        folder = tmp_path / "chunk1"
        folder.mkdir()
        half = len(rows) // 2
        for name, part in (("a", rows[:half]), ("b", rows[half:])):
            lines = "".join(json.dumps(row) + "\n" for row in part)
            (folder / f"{name}.jsonl.zst").write_bytes(zstd_library().compress(lines.encode()))
        recipe = ROOT / "recipes" / "data" / "slimpajama.yaml"
        arguments = (
            recipe,
            f"sources=[{folder}]",
            "--tokenizer",
            tokenizer_folder,
            "--output",
            "data",
            "--workers",
            1,
        )
        dry = cli(*arguments, "--dry-run", cwd=tmp_path)
        assert 'rows selected by meta.redpajama_set_name != "RedPajamaGithub"' in dry and "first document, " in dry
        assert not (tmp_path / "data").exists()
        printed = cli(*arguments, cwd=tmp_path)
        kept = [row["text"] for row in rows if row["meta"]["redpajama_set_name"] != "RedPajamaGithub"]
        metadata = json.loads((tmp_path / "data" / "dataset.json").read_text())
        assert metadata["rows"] == {"read": len(rows), "kept": len(kept), "empty": 0} and len(kept) < len(rows)
        assert f"{len(rows)} rows, {len(kept)} kept by" in printed
        splits = metadata["splits"]
        assert splits["train"]["documents"] + splits["validation"]["documents"] == len(kept)
        assert splits["train"]["bytes"] + splits["validation"]["bytes"] == sum(len(text.encode()) for text in kept)
        assert metadata["separator"] == "both" and metadata["request"]["where"] in (recipe.read_text())
        assert "is already finished" in cli(*arguments, cwd=tmp_path)

    @pytest.mark.slow
    def test_starcoderdata(self, documents, tokenizer_folder, tmp_path):
        rows = [
            {
                "max_stars_repo_path": f"f{i}.py",
                "max_stars_repo_name": "o/r",
                "max_stars_count": i % 4,
                "id": str(i),
                "content": text,
            }
            for i, text in enumerate(documents)
        ]
        write_parquet(rows[:30], tmp_path / "code" / "python" / "train-00000.parquet")
        write_parquet(rows[30:], tmp_path / "code" / "java" / "train-00000.parquet")
        recipe = ROOT / "recipes" / "data" / "starcoderdata.yaml"
        overrides = [f"sources=[{tmp_path / 'code'}]", "where=max_stars_count >= 1", f"tokenizer={tokenizer_folder}"]
        cli(recipe, *overrides, "output=data", "--workers", 2, cwd=tmp_path)
        metadata = json.loads((tmp_path / "data" / "dataset.json").read_text())
        assert metadata["rows"] == {
            "read": len(rows),
            "kept": sum(row["max_stars_count"] >= 1 for row in rows),
            "empty": 0,
        }
        data = TokenDataset(tmp_path / "data", 16)
        text = load_tokenizer(tokenizer_folder).decode(data.tokens(0, 200), skip_special_tokens=True)
        assert any(text[10:100] in row["content"] for row in rows)

    def test_the_mixture_is_seven_to_three(self):
        from tinyllama_hf.data.config import load_prepare_config
        from tinyllama_hf.pretrain.config import load_pretrain_config

        config = load_pretrain_config(ROOT / "recipes" / "pretrain" / "tinyllama-1.1b.yaml")
        assert [source.weight for source in config.data.sources] == [0.693584, 0.306416]
        recipes = {
            load_prepare_config(path).output: load_prepare_config(path)
            for path in (ROOT / "recipes" / "data").glob("*.yaml")
        }
        assert {source.path for source in config.data.sources} == set(recipes)
        assert {recipe.separator for recipe in recipes.values()} == {"both"}


class TestParquet:
    def test_rows_equal_those_of_json_lines(self, documents, tokenizer_folder, tmp_path):
        rows = slimpajama_rows(documents)
        write_parquet(rows, tmp_path / "a.parquet")
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert [row for _, row in read_rows(tmp_path / "a.parquet")] == rows
        folders = []
        for name in ("a.parquet", "a.jsonl"):
            folders.append(tmp_path / f"from-{name}")
            prepare(
                [str(tmp_path / name)],
                tokenizer_folder,
                folders[-1],
                validation_fraction=0.1,
                workers=1,
                progress=False,
            )
        for file in ("train/00000.tokens", "validation/00000.tokens"):
            assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes()

    def test_damaged(self, documents, tmp_path, tokenizer_folder):
        write_parquet(slimpajama_rows(documents), tmp_path / "a.parquet")
        data = (tmp_path / "a.parquet").read_bytes()
        (tmp_path / "cut.parquet").write_bytes(data[: len(data) // 2])
        with pytest.raises(InputError, match=r"cut\.parquet: damaged after row 0"):
            open_sources([str(tmp_path / "cut.parquet")])

    def test_text_that_is_not_utf8(self, tmp_path):
        import pyarrow
        from pyarrow import parquet

        ends = pyarrow.py_buffer(b"\0\0\0\0\3\0\0\0")
        text = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, ends, pyarrow.py_buffer(b"a\xff\xfe")])
        parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
        with pytest.raises(InputError, match=r"a\.parquet: damaged after row 0 .*utf-8"):
            list(read_rows(tmp_path / "a.parquet"))


class TestJsonLines:
    @pytest.mark.parametrize("row", ["[" * 100_000, "1" * 5000, "{", "nul"])
    def test_no_json(self, tmp_path, row):
        (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + row + "\n")
        with pytest.raises(InputError, match="row 2: not valid JSON"):
            list(read_rows(tmp_path / "a.jsonl"))

    def test_what_the_system_refuses_is_no_damage(self, tmp_path):
        """A system error is not reported as damage."""
        (tmp_path / "a.jsonl").mkdir()
        with pytest.raises(InputError, match=r"cannot be read after row 0 .Is a directory.\. Check its permissions"):
            list(read_rows(tmp_path / "a.jsonl"))


class TestHub:
    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    @pytest.fixture
    def cache(self, documents, tmp_path, monkeypatch) -> Path:
        """A Hub cache as after a download, for use without a network."""
        from huggingface_hub import constants

        folder = tmp_path / "cache" / "datasets--me--corpus"
        snapshot = folder / "snapshots" / self.COMMIT / "data"
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(self.COMMIT)
        write_parquet(slimpajama_rows(documents), snapshot / "train.parquet")
        (snapshot.parent / "README.md").write_text("# me/corpus\n")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        return tmp_path / "cache"

    @pytest.mark.parametrize("name", ["hub:me/corpus", "hub:me/corpus@main", "hub:me/corpus/data/*.parquet"])
    def test_prepared_with_its_commit(self, cache, tokenizer_folder, tmp_path, name):
        prepare([name], tokenizer_folder, tmp_path / "data", validation_fraction=0.1, workers=1, progress=False)
        metadata = json.loads((tmp_path / "data" / "dataset.json").read_text())
        assert metadata["request"]["source"]["hub"] == [{"repo": "me/corpus", "revision": self.COMMIT}]
        assert metadata["rows"]["read"] > 50

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("hub:corpus", "hub:OWNER/NAME/PATTERN"),
            ("hub:me/corpus/*.csv", r"no file matches \*\.csv"),
            ("hub:me/nothing", "cannot be downloaded"),
        ],
    )
    def test_refusals(self, cache, name, message):
        with pytest.raises(InputError, match=message):
            open_sources([name])


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"where": "meta.name == 'x'"},
                r"row 1: no value at 'meta.name'; available: meta.redpajama_set_name, text. Check --where",
            ),
            ({"where": "text <"}, "not a valid expression"),
            ({"where": "text < 3"}, "cannot be compared"),
            ({"text_column": "meta"}, "'meta' is {\"redpajama_set_name\".*not a string"),
            ({"where": "text == 'none of them'"}, r"--where .* kept 0 of \d+ rows"),
        ],
    )
    def test_before_or_without_a_data_set(self, documents, tokenizer_folder, tmp_path, options, message):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in slimpajama_rows(documents)))
        with pytest.raises(InputError, match=message):
            prepare([str(path)], tokenizer_folder, tmp_path / "data", workers=1, progress=False, **options)
        assert not (tmp_path / "data").exists()

    @pytest.mark.parametrize(
        ("sources", "message"), [(["embedded:prose"], "has no columns"), (["{text}"], "have no columns")]
    )
    def test_nothing_to_choose_by(self, tmp_path, sources, message):
        (tmp_path / "a.txt").write_text("text")
        with pytest.raises(InputError, match=message):
            open_sources([source.format(text=tmp_path / "a.txt") for source in sources], where="a == 1")

    def test_other_rows_are_another_request(self, documents, tokenizer_folder, tmp_path):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in slimpajama_rows(documents)))
        prepare([str(path)], tokenizer_folder, tmp_path / "data", workers=1, progress=False)
        with pytest.raises(InputError, match=r"another request \(different: where\)"):
            prepare([str(path)], tokenizer_folder, tmp_path / "data", where='text != "x"', workers=1, progress=False)


def test_very_large_sources_are_told_apart_by_samples(tmp_path, monkeypatch):
    from tinyllama_hf.data import sources

    monkeypatch.setattr(sources, "_HASHED_WHOLE_BYTES", 1000)
    path = tmp_path / "big.txt"
    data = bytearray(b"word " * 2**19)
    path.write_bytes(data)
    first = open_sources([str(path)]).record["files"][0]
    assert first["bytes"] == len(data) and "sampled_sha256" in first
    data[-1] = ord("!")
    path.write_bytes(data)
    assert open_sources([str(path)]).record["files"][0] != first
