"""Progress of long work: a bar on a terminal, elsewhere plain lines at intervals. The interval is shortened here."""

import io
import re
import sys
import time

import pytest

from tinyllama_hf import progress
from tinyllama_hf.progress import progress_bar, show_busy


@pytest.fixture(autouse=True)
def short(monkeypatch):
    assert progress.SECONDS_BETWEEN_LINES == 10
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.001)


@pytest.fixture
def wait_for(capsys):
    """Waits until a whole line is on standard error."""

    def wait(line: str) -> None:
        while line not in capsys.readouterr().err.splitlines():
            time.sleep(0.001)

    return wait


def test_lines_in_a_log(wait_for, capsys):
    """Also before the first update, and while an update takes long."""
    with progress_bar("model [a]: loading", "requests") as update:
        wait_for("model [a]: loading")
        update(description="model [a]: piqa (7 of 7)", total=3676)
        wait_for("model [a]: piqa (7 of 7): 0 of 3,676 requests")
        update(advance=1200)
        wait_for("model [a]: piqa (7 of 7): 1,200 of 3,676 requests")
        update(completed=2000)
        wait_for("model [a]: piqa (7 of 7): 2,000 of 3,676 requests")
    with progress_bar("comparing", "texts") as update:
        update(advance=5)
        wait_for("comparing: 5 texts")
    with show_busy("drawing"):
        wait_for("drawing")
    capsys.readouterr()
    time.sleep(0.01)
    assert capsys.readouterr() == ("", ""), "nothing is printed after the work, and nothing to standard output"


def test_the_thread_ends_with_an_error(wait_for, capsys):
    with pytest.raises(KeyboardInterrupt), progress_bar("working", "files", 3):
        wait_for("working: 0 of 3 files")
        raise KeyboardInterrupt
    capsys.readouterr()
    time.sleep(0.01)
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal_names_the_task_and_the_count(monkeypatch, capsys):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress_bar("model: loading", "requests") as update:
        assert terminal.getvalue() == "", "the bars of libraries that load a model are not disturbed"
        update(description="model: piqa (7 of 7)", completed=1200, total=3676)
        print("in a file")
    assert capsys.readouterr().out == "in a file\n", "which standard output is here"
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert re.search(r"model: piqa \(7 of 7\) \S+ +1200/3676 requests", text), text


def test_nothing_where_it_is_not_wanted(capsys):
    with progress_bar("working", "files", 3, show=False) as update:
        update(advance=1)
        time.sleep(0.01)
    assert capsys.readouterr() == ("", "")
