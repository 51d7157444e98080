"""Which outcomes are a difference from stock, and which files a folder of fetched tests has."""

import unittest

import fetch
import pytest
from comparison import Outcome, compare, run_case


class Case(unittest.TestCase):
    """One test per way in which upstream tests pass, skip or fail."""

    __test__ = False  # run by the tests below

    def test_passes(self):
        pass

    def test_skips(self):
        self.skipTest("needs a GPU")

    def test_skips_without_a_reason(self):
        self.skipTest("")

    def test_skips_as_pytest_does(self):
        pytest.skip("needs a GPU")

    def test_fails(self):
        self.fail("expected 1, got 2")

    def test_raises(self):
        raise ValueError("wrong shape")

    def test_fails_in_a_subtest(self):
        for value in (1, 2):
            with self.subTest(value):
                self.assertEqual(value, 1)


@pytest.mark.parametrize(
    ("name", "state", "detail"),
    [
        ("test_passes", "passed", ""),
        ("test_skips", "skipped", "needs a GPU"),
        ("test_skips_without_a_reason", "skipped", ""),
        ("test_skips_as_pytest_does", "skipped", "needs a GPU"),
        ("test_fails", "failed", "expected 1, got 2"),
        ("test_raises", "failed", "wrong shape"),
        ("test_fails_in_a_subtest", "failed", "2 != 1"),
    ],
)
def test_outcomes(name, state, detail):
    outcome = run_case(Case(name))
    assert isinstance(outcome, Outcome) and outcome.state == state and detail in outcome.detail


@pytest.mark.parametrize("stock", ["test_skips", "test_skips_without_a_reason", "test_fails"])
@pytest.mark.parametrize("difference", [None, "by design"])
def test_what_stock_does_not_pass_does_not_count(stock, difference):
    with pytest.raises(pytest.skip.Exception, match=r"stock (skipped|failed)"):
        compare(Case(stock), Case("test_fails"), difference)


@pytest.mark.parametrize("ours", ["test_fails", "test_skips"])
def test_ours_has_to_pass_what_stock_passes(ours):
    compare(Case("test_passes"), Case("test_passes"), None)
    with pytest.raises(pytest.fail.Exception, match=r"needs a GPU|expected 1"):
        compare(Case("test_passes"), Case(ours), None)


@pytest.mark.parametrize("ours", ["test_fails", "test_skips"])
def test_a_listed_difference_has_to_be_there(ours):
    with pytest.raises(pytest.xfail.Exception, match="by design"):
        compare(Case("test_passes"), Case(ours), "by design")
    with pytest.raises(pytest.fail.Exception, match=r"differences\.yaml"):
        compare(Case("test_passes"), Case("test_passes"), "by design")


@pytest.fixture
def checkout(tmp_path):
    """Returns a checkout of a neighboring version with a needed file, and one that the archive has too."""
    folder = tmp_path / "checkout"
    for name, text in {
        "src/transformers/__init__.py": '__version__ = "5.16.0.dev0"\n',
        "utils/test_module/__init__.py": "",
        "tests/generation/test_utils.py": "checkout",
        "tests/test_modeling_common.py": "checkout",
        "tests/models/llama/test_modeling_llama.py": "checkout",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_archive_comes_first_then_checkout_then_stand_ins(checkout, tmp_path, monkeypatch):
    def unpack(version, folder):
        (folder / "tests").mkdir(exist_ok=True)
        (folder / "tests" / "test_modeling_common.py").write_text("archive")

    monkeypatch.setattr(fetch, "_unpack_archive", unpack)
    for source, generation in ((checkout, "checkout"), (None, "class GenerationTesterMixin")):
        fetch.fetch(tmp_path / "fetched", source)
        fetch.add_stand_ins(tmp_path / "fetched")
        tests = tmp_path / "fetched" / "tests"
        assert (tests / "test_modeling_common.py").read_text() == "archive"
        assert generation in (tests / "generation" / "test_utils.py").read_text()
        assert "ExportTesterMixin" in (tests / "exporters" / "test_export.py").read_text()
        assert not (tests / "models").exists() and (tests / "__init__.py").exists()
        origin = fetch.yaml.safe_load((tmp_path / "fetched" / "origin.yaml").read_text())
        assert ("generation/test_utils.py" in origin["missing"]) == (source is None)
        assert "exporters/test_export.py" in origin["missing"]
    assert (tmp_path / "fetched" / "src" / "transformers" / "__init__.py").is_file()


def test_a_checkout_of_the_release_needs_no_archive(checkout, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "_unpack_archive", None)
    version = fetch.importlib.metadata.version("transformers")
    (checkout / "src" / "transformers" / "__init__.py").write_text(f'__version__ = "{version}"\n')
    fetch.fetch(tmp_path / "fetched", checkout)
    assert (tmp_path / "fetched" / "tests" / "test_modeling_common.py").read_text() == "checkout"


def test_a_folder_that_is_no_checkout_is_named(tmp_path):
    with pytest.raises(SystemExit, match=str(tmp_path)):
        fetch.fetch(tmp_path / "fetched", tmp_path)
