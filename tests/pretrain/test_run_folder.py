"""The folder of a run: its lock, the space that it needs, what `--overwrite` must not remove, and a full disk."""

import errno
import fcntl
import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_here
from tests.pretrain.runs import assert_same_run, read_metrics, run, signal_after
from tinyllama_hf.errors import InputError
from tinyllama_hf.pretrain import loop
from tinyllama_hf.pretrain.checkpoints import BYTES_PER_PARAMETER, FullDiskError
from tinyllama_hf.pretrain.loop import Hooks
from tinyllama_hf.pretrain.metrics import METRICS_FILE, Metrics
from tinyllama_hf.pretrain.milestones import list_milestones
from tinyllama_hf.pretrain.run_folder import STOPPED_FILE
from tinyllama_hf.pretrain.signals import Stopped


class TestLock:
    def test_two_launches_in_one_folder(self, recipe):
        output = recipe.parent / "run"
        output.mkdir()
        (output / "training.yaml").write_text("model: {}")
        with (output / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(InputError, match=r"^output_dir .*: another process"):
                run(recipe, overwrite=True)

    def test_a_file_system_without_locks(self, recipe, monkeypatch):
        def no_locks(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", no_locks)
        with pytest.raises(InputError, match=r"^output_dir .*\.lock cannot be locked .*No locks available"):
            run(recipe)

    def test_a_folder_that_cannot_be_made(self, recipe, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="cannot be written to"):
            run(recipe, f"output_dir={tmp_path / 'file' / 'run'}")


class TestSpace:
    def room(self, monkeypatch, num_bytes: int) -> None:
        usage = shutil.disk_usage("/")._replace(free=num_bytes)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    def parameters(self, output: Path) -> int:
        return (list_milestones(output)[0] / "model.safetensors").stat().st_size // 4  # plus a few for the header

    def test_too_little(self, recipe, monkeypatch):
        self.room(monkeypatch, 2_000_000)
        with pytest.raises(InputError, match=r"3 checkpoints and 2 milestones need [\d.]+ MB, and 2.0 MB are"):
            run(recipe)
        assert not (recipe.parent / "run").exists()

    def test_only_what_is_still_to_be_written_is_asked_for(self, recipe, output, uninterrupted, monkeypatch):
        """One checkpoint and one milestone remain; two old checkpoints and a new one must fit at the same time."""
        shutil.rmtree(output / "checkpoints" / "step-12")
        shutil.rmtree(list_milestones(output)[-1])
        one = self.parameters(output)
        self.room(monkeypatch, (2 * BYTES_PER_PARAMETER + 4 - 1) * one)
        with pytest.raises(InputError, match="2 checkpoints and 1 milestones need"):
            run(recipe)
        self.room(monkeypatch, (2 * BYTES_PER_PARAMETER + 4) * one)
        assert_same_run(run(recipe), uninterrupted)

    def test_a_finished_run_needs_none(self, recipe, output, monkeypatch, capsys):
        self.room(monkeypatch, 0)
        run(recipe)
        assert "the run is finished" in capsys.readouterr().out

    def test_what_overwrite_removes_counts_as_free(self, recipe, monkeypatch):
        output = run(recipe, "milestones.keep_training_state=true")
        self.room(monkeypatch, BYTES_PER_PARAMETER * self.parameters(output))
        with pytest.raises(InputError, match="are free"):
            run(recipe, "milestones.keep_training_state=true", f"output_dir={output}2")
        run(recipe, "milestones.keep_training_state=true", overwrite=True)


class TestOverwrite:
    def test_a_branch_does_not_lie_in_the_run_that_it_leaves(self, recipe):
        base = run(recipe, "milestones.keep_training_state=true")
        before = sorted(base.rglob("*"))
        branch = f"branch={{from: {list_milestones(base)[0]}, schedule: continue}}"
        for overwrite in (True, False):
            with pytest.raises(InputError, match=r"branch.from .*: is in output_dir .*another output_dir"):
                run(recipe, branch, overwrite=overwrite)
        assert sorted(base.rglob("*")) == before

    @pytest.mark.parametrize("key", ["model.init_from", "data.tokenizer", "data.sources.0.path"])
    def test_nothing_that_the_run_reads_is_removed(self, recipe, output, prepared, tokenizer_folder, tmp_path, key):
        shutil.copytree(prepared, output / "data")
        shutil.copytree(tokenizer_folder, output / "tokenizer")
        (tmp_path / "link").symlink_to(output)
        override = {
            "model.init_from": f"model.init_from={list_milestones(output)[0]}",
            "data.tokenizer": f"data.tokenizer={tmp_path / 'link' / 'tokenizer'}",
            "data.sources.0.path": f"data.sources=[{{path: {output / 'data'}, weight: 1}}]",
        }[key]
        before = sorted(output.rglob("*"))
        with pytest.raises(InputError, match=rf"{key} .*: is in output_dir .*, which --overwrite would remove"):
            run(recipe, override, overwrite=True)
        assert sorted(output.rglob("*")) == before


def test_word_of_a_requested_stop(recipe, uninterrupted):
    """Present until the run resumes."""
    with pytest.raises(Stopped):
        run(recipe, hooks=Hooks(after_checkpoint=signal_after(1, signal.SIGTERM)))
    word = recipe.parent / "run" / STOPPED_FILE
    assert json.loads(word.read_text()) == {"step": 5, "tokens": 1280, "request": "SIGTERM"}
    run(recipe)
    assert not word.exists()


class TestFullDisk:
    def test_of_the_metrics(self, recipe, uninterrupted, monkeypatch):
        """/dev/full refuses every write: one message, the exit status of a full disk, and the run can be resumed."""
        log, calls = Metrics.log, []

        def full(self, row):
            calls.append(row)
            if len(calls) == 7:
                self._file.close()
                self._file = open("/dev/full", "a")
            log(self, row)

        with monkeypatch.context() as patch:
            patch.setattr(Metrics, "log", full)
            done = run_here(ROOT / "recipes" / "pretrain.py", recipe, cwd=ROOT)
        assert done.returncode == 4, done.stdout + done.stderr
        assert "metrics.jsonl: could not be written (OSError: [Errno 28] No space left" in done.stderr
        assert_same_run(run(recipe), uninterrupted)

    def test_what_ended_the_run_is_not_hidden_by_a_row_that_could_not_be_written(self, tmp_path):
        with pytest.raises(ZeroDivisionError), Metrics(tmp_path, 1, True) as metrics:
            metrics._file = open("/dev/full", "a")
            metrics._file.write("row")
            raise ZeroDivisionError
        with pytest.raises(FullDiskError, match=r"metrics\.jsonl"), Metrics(tmp_path, 1, True) as metrics:
            metrics._file = open("/dev/full", "a")
            metrics._file.write("row")

    def test_of_a_tracker(self, recipe, monkeypatch):
        def full(*_, **__):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(loop.Accelerator, "log", full)
        monkeypatch.setattr(loop, "start_trackers", lambda *_: None)
        pytest.importorskip("tensorboard")
        with pytest.raises(FullDiskError, match="No space left"):
            run(recipe, "logging.trackers=[tensorboard]")
        assert [row["step"] for row in read_metrics(recipe.parent / "run")] == [1]


@pytest.mark.parametrize("damage", [b"\0\0\0\n", b"[]\n", b'{"loss": 1}\n'])
def test_a_damaged_row_is_named_and_nothing_is_lost(tmp_path, damage):
    path = tmp_path / METRICS_FILE
    path.write_bytes(b'{"step": 1}\n' + damage + b'{"step": 3}\n')
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"metrics\.jsonl, row 2: damaged"):
        Metrics(tmp_path, 1, True, 3)
    assert path.read_bytes() == before
