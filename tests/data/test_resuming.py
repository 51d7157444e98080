"""Resuming a preparation after a bad file, a full disk or a killed worker: exactly the complete tasks are kept."""

import fcntl
import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, limited_files, run_here
from tinyllama_hf.data.pipeline import split_of
from tinyllama_hf.data.prepare import prepare
from tinyllama_hf.data.shards import check_contents, read_metadata
from tinyllama_hf.data.sources import open_sources, read_documents
from tinyllama_hf.errors import InputError


NUM_FILES = 6


def run(folder: Path, tokenizer_folder: Path, output: Path, **options):
    options = {"validation_fraction": 0.1, "workers": 1} | options
    return prepare([str(folder)], tokenizer_folder, output, progress=False, **options)[0]


def write(path: Path, texts: list[str | None]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def stamps(output: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in (output / "train").glob("*.tokens")}


def assert_equal(output: Path, reference: Path) -> None:
    """Asserts that two data sets have the same files, with equal contents and metadata."""
    names = [
        sorted(
            str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".json"
        )
        for folder in (output, reference)
    ]
    assert names[0] == names[1]
    found, wanted = read_metadata(output), read_metadata(reference)
    for key in ("fingerprint", "rows", "splits", "request"):
        assert found[key] == wanted[key]
    check_contents(output, progress=False)


@pytest.fixture
def sources(documents, tmp_path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(NUM_FILES):
        write(folder / f"{number}.jsonl", [f"{text} {number}" for text in documents[:40]])
    return folder


@pytest.fixture
def broken(sources, documents) -> Path:
    """The sources with a bad row near the end of the last file."""
    write(sources / "5.jsonl", [f"{text} 5" for text in documents[:39]] + [None])
    return sources


class TestBadFile:
    @pytest.mark.parametrize("workers", [1, 2])
    def test_the_others_stay_and_it_alone_is_read_again(self, broken, documents, tokenizer_folder, tmp_path, workers):
        """A bad row keeps the tasks that are complete."""
        out = tmp_path / "out"
        with pytest.raises(
            InputError, match=r"5\.jsonl, row 40: 'text' is null.*\n\d of 6 files are finished and kept"
        ):
            run(broken, tokenizer_folder, out, workers=workers)
        with pytest.raises(InputError, match="its preparation was interrupted"):
            read_metadata(out)
        done = {file.name for file in (out / "work" / "logs" / "completions").iterdir()}
        before = {name: stamp for name, stamp in stamps(out).items() if name.removesuffix(".tokens") in done}
        assert len(before) == NUM_FILES - 1 if workers == 1 else before
        with pytest.raises(InputError, match="files are finished and kept"):
            run(broken, tokenizer_folder, out, workers=workers)
        write(broken / "5.jsonl", [f"{text} 5" for text in documents[:39]])
        run(broken, tokenizer_folder, out, workers=workers)
        assert before.items() <= stamps(out).items(), "what was complete must not be done again"
        run(broken, tokenizer_folder, tmp_path / "reference")
        assert_equal(out, tmp_path / "reference")

    def test_a_complete_file_that_changes_is_read_again(self, broken, documents, tokenizer_folder, tmp_path):
        out = tmp_path / "out"
        with pytest.raises(InputError, match="5 of 6 files are finished"):
            run(broken, tokenizer_folder, out)
        before = stamps(out)
        assert (out / "validation" / "00002.jsonl.gz").is_file()
        # Nothing of it is held out now, so that the earlier held-out text must be deleted.
        write(broken / "2.jsonl", [t for t in documents if split_of(t, 0.1, 1.0) == "train"][:10])
        write(broken / "5.jsonl", documents[:10])
        run(broken, tokenizer_folder, out)
        changed = {name for name, stamp in stamps(out).items() if before[name] != stamp}
        assert changed == {"00002.tokens", "00005.tokens"}
        run(broken, tokenizer_folder, tmp_path / "reference")
        assert_equal(out, tmp_path / "reference")

    @pytest.mark.parametrize("damage", ["shard", "index", "counts", "counts of an older version"])
    def test_what_is_damaged_is_made_again(self, broken, documents, tokenizer_folder, tmp_path, damage):
        out = tmp_path / "out"
        with pytest.raises(InputError, match="5 of 6 files are finished"):
            run(broken, tokenizer_folder, out)
        if damage == "shard":
            (out / "train" / "00001.tokens").write_bytes(b"")
        elif damage == "index":
            (out / "validation" / "00001.tokens.index").unlink()
        elif damage == "counts":
            (out / "work" / "counts_00001.json").write_text("{")
        else:
            counts = json.loads((out / "work" / "counts_00001.json").read_text())
            (out / "work" / "counts_00001.json").write_text(
                json.dumps({k: v for k, v in counts.items() if k != "rows"})
            )
        write(broken / "5.jsonl", documents[:10])
        run(broken, tokenizer_folder, out)
        run(broken, tokenizer_folder, tmp_path / "reference")
        assert_equal(out, tmp_path / "reference")

    def test_another_request_is_refused_as_before(self, broken, documents, tokenizer_folder, tmp_path):
        out = tmp_path / "out"
        with pytest.raises(InputError, match="5 of 6 files are finished"):
            run(broken, tokenizer_folder, out, where='text != "x"')
        write(broken / "5.jsonl", documents[:10])
        with pytest.raises(InputError, match=r"\(different: begin, separator, source\)"):
            run(broken, tokenizer_folder, out, where='text != "x"', separator="eos")
        with pytest.raises(InputError, match=r"\(different: source, where\)"):
            run(broken, tokenizer_folder, out)
        (broken / "5.jsonl").rename(broken / "6.jsonl")
        with pytest.raises(InputError, match=r"\(different: source\)"):
            run(broken, tokenizer_folder, out, where='text != "x"')

    def test_a_file_that_changes_while_it_is_read(self, sources):
        opened = open_sources([str(sources)])
        write(sources / "3.jsonl", ["another text"])
        with pytest.raises(InputError, match=r"3\.jsonl was changed"):
            list(read_documents(opened))

    def test_named_twice(self, sources):
        with pytest.raises(InputError, match=r"3\.jsonl is named twice"):
            open_sources([str(sources), str(sources / "3.jsonl")])
        with pytest.raises(InputError, match="embedded:code is named twice"):
            open_sources(["embedded:code", "embedded:code"])


def in_a_process(folder: Path, tokenizer_folder: Path, output: Path, workers: int, file_bytes: int = 0):
    """Starts the command, with a limit on the size of the files that it writes, which acts like a full disk."""
    command = [
        Path(sys.executable).parent / "tinyllama-hf",
        "prepare",
        folder,
        "--tokenizer",
        tokenizer_folder,
        "--output",
        output,
        "--validation-fraction",
        0.1,
        "--workers",
        workers,
    ]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    return subprocess.Popen(
        [str(c) for c in command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=limit if file_bytes else None,
    )


class TestFullDisk:
    @pytest.mark.slow
    @pytest.mark.parametrize("workers", [1, 2])
    def test_one_message_and_the_same_command_goes_on(self, sources, documents, tokenizer_folder, tmp_path, workers):
        write(sources / "5.jsonl", [f"{text} {n}" for n in range(5) for text in documents])
        out = tmp_path / "out"
        process = in_a_process(sources, tokenizer_folder, out, workers, file_bytes=400_000)
        _, error = process.communicate(timeout=300)
        assert process.returncode == 2 and "Traceback" not in error
        assert error.startswith(f"error: --output {out} cannot be written (File too large)")
        assert "files are finished and kept in" in error
        assert not (out / "dataset.json").exists()
        completions = out / "work" / "logs" / "completions"
        done = {f"{file.name}.tokens" for file in completions.iterdir()}
        before = {name: stamp for name, stamp in stamps(out).items() if name in done}
        assert done and "00005.tokens" not in done
        run(sources, tokenizer_folder, out)
        assert before.items() <= stamps(out).items()
        run(sources, tokenizer_folder, tmp_path / "reference")
        assert_equal(out, tmp_path / "reference")

    @pytest.mark.parametrize("file_bytes", [1, 3000])
    def test_before_the_first_task(self, sources, tokenizer_folder, tmp_path, file_bytes):
        """The request or the tokenizer cannot be written."""
        words = ("--tokenizer", tokenizer_folder, "--output", "out", "--validation-fraction", 0.1, "--workers", 1)
        with limited_files(file_bytes):
            done = run_here("tinyllama-hf", "prepare", sources, *words, cwd=tmp_path)
        assert done.returncode == 2 and "cannot be written (File too large" in done.stderr
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_killed_worker_ends_the_command(documents, tokenizer_folder, tmp_path):
    """datatrove 0.10.1 would wait forever for a worker that was killed because memory ran out."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for number in range(3):
        write(folder / f"{number}.jsonl", [f"{text} {n}" for n in range(60) for text in documents])
    process = in_a_process(folder, tokenizer_folder, out, workers=2)
    shard, writer, deadline = out / "train" / "00000.tokens", None, time.monotonic() + 120
    while writer is None and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
        writer = _writer_of(shard)
    assert writer, "no worker was caught at work"
    os.kill(writer, signal.SIGKILL)
    try:
        _, error = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 2 and "Traceback" not in error
    assert "--workers 2: a worker process died (exit code -9" in error


def _writer_of(file: Path) -> int | None:
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == str(file):
                return int(link.parts[2])
        except OSError:
            continue
    return None


class TestOnlyOne:
    def test_two_commands_never_write_one_folder(self, broken, tokenizer_folder, tmp_path):
        with pytest.raises(InputError, match="5 of 6 files are finished"):
            run(broken, tokenizer_folder, tmp_path / "out")
        with (tmp_path / "out" / "work" / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(InputError, match=r"^--output .*: another process"):
                run(broken, tokenizer_folder, tmp_path / "out")
        assert len(stamps(tmp_path / "out")) == NUM_FILES

    def test_killed_before_anything_was_written(self, sources, tokenizer_folder, tmp_path):
        (tmp_path / "out" / "work").mkdir(parents=True)
        (tmp_path / "out" / "work" / "lock").touch()
        run(sources, tokenizer_folder, tmp_path / "out")
        with gzip.open(tmp_path / "out" / "validation" / "00000.jsonl.gz") as lines:
            assert sum(1 for _ in lines)
        assert not (tmp_path / "out" / "work").exists()
