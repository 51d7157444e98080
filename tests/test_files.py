"""Locks, files and folders, with real processes that are killed, and a disk that is watched."""

import errno
import fcntl
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.power_cut import Disk
from tinyllama_hf import files
from tinyllama_hf.errors import InputError
from tinyllama_hf.files import (
    link_folder,
    locked,
    new_file,
    new_files,
    new_folder,
    read_json,
    remove_folder,
    replace_folder,
    write_json,
    write_text,
)


PROCESSES = multiprocessing.get_context("fork")  # which need not import anything


@contextmanager
def another_process(work: Callable[[Callable[[], None]], None]) -> Iterator[multiprocessing.Process]:
    """Runs `work` up to where it calls its argument; it continues after the block, unless the block killed it."""
    here, there = PROCESSES.Pipe()

    def pause() -> None:
        there.send("paused")
        there.recv()

    process = PROCESSES.Process(target=work, args=(pause,), daemon=True)
    process.start()
    try:
        assert here.poll(30)
        yield process
    finally:
        here.send("resume")
        process.join(30)
        process.kill()  # if it waits for what another one broke


def kill(process: multiprocessing.Process) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestLocked:
    def hold(self, path):
        def work(pause):
            with locked(path, "--output out"):
                pause()

        return another_process(work)

    def test_one_process_at_a_time(self, tmp_path):
        path = tmp_path / "below" / "lock"
        with self.hold(path) as process:
            with pytest.raises(InputError, match=r"^--output out: another process"), locked(path, "--output out"):
                pass
            kill(process)  # which releases it
            with locked(path, "--output out") as file:
                file.write(b"x")
        with locked(path, "--output out"):
            assert path.read_bytes() == b"x"

    @pytest.mark.parametrize("failure", [OSError(errno.ENOLCK, "No locks available"), ImportError("fcntl")])
    def test_without_locks_nothing_starts(self, tmp_path, monkeypatch, failure):
        def no_locks(*_):
            raise failure

        monkeypatch.setattr(fcntl, "flock", no_locks)
        with pytest.raises(InputError, match=r"^--output out: .*lock cannot be locked .*(No locks|fcntl)"):
            with locked(tmp_path / "lock", "--output out"):
                pass

    def test_where_nothing_can_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match=r"^--output out: cannot be written to \("):
            with locked(tmp_path / "file" / "lock", "--output out"):
                pass

    @pytest.mark.parametrize("leave", [Path.unlink, lambda path: path.rename(path.with_name("final"))])
    def test_a_lock_on_a_file_that_has_lost_its_name_is_none(self, tmp_path, monkeypatch, leave):
        """As when the last owner ends between the opening and the locking."""
        path, real, calls = tmp_path / "lock", fcntl.flock, []

        def flock(*arguments):
            if not calls:
                leave(path)
            calls.append(arguments)
            real(*arguments)

        monkeypatch.setattr(fcntl, "flock", flock)
        with locked(path, "--output out") as file:
            file.write(b"x")
        assert len(calls) == 2 and path.read_bytes() == b"x"


class TestFile:
    def test_nothing_half_written(self, tmp_path):
        (tmp_path / "there").mkdir()
        with pytest.raises(OSError):
            write_json(tmp_path / "there", {"a": 1})
        with pytest.raises(TypeError):
            write_json(tmp_path / "file.json", {"a": object()})
        with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "file") as file:
            file.write(b"half")
            raise KeyboardInterrupt
        assert names(tmp_path) == ["there"]

    @pytest.mark.parametrize("write", [write_text, write_json])
    def test_a_power_cut_leaves_the_old_file_or_the_new_one(self, tmp_path, monkeypatch, write):
        disk = Disk(tmp_path, monkeypatch)
        for text in ("first", "second"):
            write(tmp_path / "file", text)
            disk.check("file")
        assert len(disk.named) == 2 and names(tmp_path) == ["file"]

    @pytest.mark.parametrize("without_locks", [False, True])
    def test_two_processes_write_one_file(self, tmp_path, monkeypatch, without_locks):
        def no_locks(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        def work(pause):
            with new_file(path) as file:
                file.write(b"theirs, be")
                file.flush()
                pause()
                file.write(b"gun first")

        if without_locks:
            monkeypatch.setattr(fcntl, "flock", no_locks)
        path = tmp_path / "file"
        with another_process(work):
            write_text(path, "ours")
            assert path.read_text() == "ours"
        assert path.read_text() == "theirs, begun first" and names(tmp_path) == ["file"]

    def test_what_a_killed_process_left_is_used_again(self, tmp_path):
        def work(pause):
            with new_file(tmp_path / "file") as file:
                file.write(b"a long text of theirs")
                file.flush()
                pause()

        with another_process(work) as process:
            kill(process)
        assert len(names(tmp_path)) == 1
        write_text(tmp_path / "file", "ours")
        assert (tmp_path / "file").read_text() == "ours" and names(tmp_path) == ["file"]

    def test_the_temporary_file_of_the_next_process_is_left_alone(self, tmp_path, monkeypatch):
        real = os.replace

        def replace(source, target):
            real(source, target)
            Path(source).write_text("of the next process")

        monkeypatch.setattr(os, "replace", replace)
        write_text(tmp_path / "file", "ours")
        assert names(tmp_path) == [".file.tmp", "file"]

    def test_damaged_json_names_the_file(self, tmp_path):
        (tmp_path / "a.json").write_text("{")
        with pytest.raises(InputError, match=r"a\.json: damaged, not valid JSON"):
            read_json(tmp_path / "a.json")


class TestFolder:
    @pytest.fixture
    def folder(self, tmp_path):
        """The name, and a folder that has it."""
        with new_folder(tmp_path / "model") as temporary:
            (temporary / "a").write_text("first")
            assert not (tmp_path / "model").exists()
        return tmp_path / "model"

    def contents(self, folder):
        """Of the folder, which must be alone."""
        assert names(folder.parent) == [folder.name]
        return {path.name: path.read_text() for path in folder.iterdir()}

    def test_it_appears_whole_or_not_at_all(self, folder):
        with pytest.raises(RuntimeError), new_folder(folder, overwrite=True) as temporary:
            (temporary / "a").write_text("half")
            raise RuntimeError
        assert self.contents(folder) == {"a": "first"}
        with pytest.raises(OSError), new_folder(folder) as temporary:
            (temporary / "a").write_text("unasked")
        assert self.contents(folder) == {"a": "first"}
        with new_folder(folder, overwrite=True) as temporary:
            (temporary / "b").write_text("second")
        assert self.contents(folder) == {"b": "second"}

    def test_a_power_cut_leaves_the_old_one_or_the_new_one(self, folder, monkeypatch):
        disk = Disk(folder.parent, monkeypatch)
        with new_folder(folder, overwrite=True) as temporary:
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
        with pytest.raises(failure), new_folder(folder, overwrite=True) as temporary:
            (temporary / "b").write_text("second")
        assert self.contents(folder) == {"a": "first"}

    def test_an_interrupt_right_after_the_old_one_was_set_aside(self, folder, monkeypatch):
        real = os.replace

        def replace(source, target):
            real(source, target)
            if Path(source) == folder:
                raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt), new_folder(folder, overwrite=True) as temporary:
            (temporary / "b").write_text("second")
        assert self.contents(folder) == {"a": "first"}

    def test_killed_between_the_two_renames(self, folder, monkeypatch):
        """The old folder is back before anything else happens; while the process lives, no other one touches it."""

        def work(pause):
            real = os.replace

            def replace(source, target):
                if Path(target) == folder:
                    pause()
                real(source, target)

            os.replace = replace
            with new_folder(folder, overwrite=True) as temporary:
                (temporary / "b").write_text("second")

        with another_process(work) as process:
            assert not folder.exists() and len(names(folder.parent)) == 2
            with pytest.raises(RuntimeError), new_folder(folder, overwrite=True):
                assert not folder.exists() and len(names(folder.parent)) == 3
                raise RuntimeError
            kill(process)
        with pytest.raises(RuntimeError), new_folder(folder, overwrite=True):
            assert self.contents_next_to_temporary(folder) == {"a": "first"}
            raise RuntimeError
        assert self.contents(folder) == {"a": "first"}

    def contents_next_to_temporary(self, folder):
        assert len(names(folder.parent)) == 2
        return {path.name: path.read_text() for path in folder.iterdir()}

    def test_two_processes_write_one_folder(self, tmp_path):
        """Neither removes the work of the other; the one that ends last gets the name."""
        folder = tmp_path / "model"

        def work(pause):
            with new_folder(folder, overwrite=True) as temporary:
                (temporary / "a").write_text("theirs")
                pause()
                assert (temporary / "a").read_text() == "theirs"

        with another_process(work):
            with new_folder(folder) as temporary:
                (temporary / "b").write_text("ours")
            assert {path.name for path in folder.iterdir()} == {"b"}
        assert self.contents(folder) == {"a": "theirs"}

    def test_what_a_killed_process_was_writing_is_removed(self, folder):
        def work(pause):
            with new_folder(folder, overwrite=True) as temporary:
                (temporary / "half").write_text("")
                pause()

        with another_process(work) as process:
            kill(process)
        assert len(names(folder.parent)) == 2
        with new_folder(folder, overwrite=True) as temporary:
            (temporary / "b").write_text("second")
        assert self.contents(folder) == {"b": "second"}

    def test_a_folder_that_is_being_removed_has_lost_its_name(self, folder, monkeypatch):
        monkeypatch.setattr(files.shutil, "rmtree", lambda path: None)
        remove_folder(folder)
        assert not folder.exists()
        monkeypatch.undo()
        with new_folder(folder):  # as the next process with this name, which finds what a killed one left
            assert len(names(folder.parent)) == 1
        assert self.contents(folder) == {}

    def test_a_complete_folder_gets_its_name(self, folder):
        new = folder.with_name("new")
        new.mkdir()
        (new / "b").write_text("second")
        with pytest.raises(OSError):
            replace_folder(new, folder, overwrite=False)
        replace_folder(new, folder)
        assert self.contents(folder) == {"b": "second"}


@pytest.mark.parametrize("has_links", [True, False])
def test_files_with_a_second_place(tmp_path, monkeypatch, has_links):
    """As hard links, or as copies on a file system without them."""

    def refused(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr(os, "link", refused)
    source, folder = tmp_path / "source", tmp_path / "below" / "folder"
    for place in (source, folder):
        place.mkdir(parents=True)
        (place / f"of {place.name}").write_text("text")
    link_folder(source, folder)
    assert names(folder) == ["of source"] and (folder / "of source").read_text() == "text"
    assert (folder / "of source").samefile(source / "of source") == has_links


class TestNewFiles:
    def test_other_files_stay_and_one_comes_last(self, tmp_path, monkeypatch):
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "README.md").write_text("kept")
        disk = Disk(folder, monkeypatch)
        with new_files(folder, last="config.json") as temporary:
            for name in ("config.json", "a", "z"):
                (temporary / name).write_text("new")
            assert names(folder) == ["README.md"]
        disk.check("a", "config.json", "z")
        assert disk.named[-1].name == "config.json"
        assert names(folder) == ["README.md", "a", "config.json", "z"] and names(tmp_path) == ["model"]

    def test_after_an_exception_nothing_has_changed(self, tmp_path):
        (tmp_path / "model").mkdir()
        with pytest.raises(RuntimeError), new_files(tmp_path / "model", last="config.json") as temporary:
            (temporary / "a").write_text("half")
            raise RuntimeError
        assert names(tmp_path / "model") == [] and names(tmp_path) == ["model"]
