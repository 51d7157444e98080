"""Records of where things come from, on machines that lack what they would like to name."""

import json

import pytest

from tinyllama_hf import provenance
from tinyllama_hf.errors import InputError


def test_a_record_is_json_and_names_everything():
    record = json.loads(json.dumps(provenance.collect(step=3)))
    assert record["step"] == 3
    assert record["libraries"]["transformers"] and record["machine"]["cores"] and record["code"]["tinyllama_hf"]


def test_a_clone_on_a_machine_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    version = provenance.code_version.__wrapped__()
    assert version["tinyllama_hf"] and version.get("commit") is None and version.get("modified") is None


def test_nothing_half_written(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(OSError):
        provenance.write_json(tmp_path / "there", {"a": 1})
    with pytest.raises(TypeError):
        provenance.write_json(tmp_path / "file.json", {"a": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_damaged_json_names_the_file(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(InputError, match=r"a\.json: damaged, not valid JSON"):
        provenance.read_json(tmp_path / "a.json")


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "model"
    with provenance.new_folder(folder) as temporary:
        (temporary / "a").write_text("first")
        assert not folder.exists()
    with pytest.raises(RuntimeError), provenance.new_folder(folder, overwrite=True) as temporary:
        (temporary / "a").write_text("half")
        raise RuntimeError
    assert (folder / "a").read_text() == "first"
    with pytest.raises(OSError), provenance.new_folder(folder) as temporary:
        (temporary / "a").write_text("unasked")
    assert (folder / "a").read_text() == "first"
    with provenance.new_folder(folder, overwrite=True) as temporary:
        (temporary / "b").write_text("second")
    assert [path.name for path in folder.iterdir()] == ["b"] and [path.name for path in tmp_path.iterdir()] == [
        "model"
    ]
