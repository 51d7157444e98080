"""Records of where things come from, on machines that lack what they would like to name."""

import json
import os
from pathlib import Path

import pytest

from tests.power_cut import Disk
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


@pytest.mark.parametrize("write", [provenance.write_text, provenance.write_json])
def test_a_power_cut_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch, write):
    disk = Disk(tmp_path, monkeypatch)
    for text in ("first", "second"):
        write(tmp_path / "file", text)
        disk.check("file")
    assert len(disk.named) == 2 and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_damaged_json_names_the_file(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(InputError, match=r"a\.json: damaged, not valid JSON"):
        provenance.read_json(tmp_path / "a.json")


class TestNewFolder:
    @pytest.fixture
    def folder(self, tmp_path):
        """The name, and a folder that has it."""
        with provenance.new_folder(tmp_path / "model") as temporary:
            (temporary / "a").write_text("first")
            assert not (tmp_path / "model").exists()
        return tmp_path / "model"

    def contents(self, folder):
        """Of the folder and of what is next to it."""
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]
        return {path.name: path.read_text() for path in folder.iterdir()}

    def test_it_appears_whole_or_not_at_all(self, folder):
        with pytest.raises(RuntimeError), provenance.new_folder(folder, overwrite=True) as temporary:
            (temporary / "a").write_text("half")
            raise RuntimeError
        assert self.contents(folder) == {"a": "first"}
        with pytest.raises(OSError), provenance.new_folder(folder) as temporary:
            (temporary / "a").write_text("unasked")
        assert self.contents(folder) == {"a": "first"}
        with provenance.new_folder(folder, overwrite=True) as temporary:
            (temporary / "b").write_text("second")
        assert self.contents(folder) == {"b": "second"}

    def test_a_power_cut_leaves_the_old_one_or_the_new_one(self, folder, monkeypatch):
        disk = Disk(folder.parent, monkeypatch)
        with provenance.new_folder(folder, overwrite=True) as temporary:
            (temporary / "below").mkdir()
            (temporary / "below" / "b").write_text("second")
        disk.check("model")

    @pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
    def test_the_old_one_is_back_if_the_new_one_cannot_get_its_name(self, folder, monkeypatch, failure):
        real = os.replace

        def replace(source, target):
            if Path(target) == folder and (Path(source) / "b").exists():
                raise failure
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(failure), provenance.new_folder(folder, overwrite=True) as temporary:
            (temporary / "b").write_text("second")
        assert self.contents(folder) == {"a": "first"}

    def test_two_at_once_do_not_touch_each_other(self, tmp_path):
        folder = tmp_path / "model"
        with pytest.raises(OSError), provenance.new_folder(folder) as first:
            (first / "a").write_text("first")
            with provenance.new_folder(folder) as second:
                (second / "a").write_text("second")
                assert first != second and (first / "a").read_text() == "first"
        assert self.contents(folder) == {"a": "second"}

    def test_what_killed_processes_left(self, folder):
        """The new folder of one is removed; an old one that was set aside is back before anything else happens."""
        abandoned = folder.with_name(f".{folder.name}.0123abcd.tmp")
        (abandoned / "below").mkdir(parents=True)
        folder.rename(folder.with_name(f".{folder.name}.0123abcd.replaced"))
        with pytest.raises(RuntimeError), provenance.new_folder(folder, overwrite=True):
            assert not abandoned.exists() and (folder / "a").read_text() == "first"
            raise RuntimeError
        assert self.contents(folder) == {"a": "first"}
