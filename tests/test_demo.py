"""The whole demo, as a newcomer runs it: interrupted once, then to its end, and everything that it claims."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.evaluation.test_bits_per_byte import STOCK


STAGES = ["tokenizer", "prose", "code", "pretrain", "score", "generate", "report"]


def demo(folder: Path) -> subprocess.Popen:
    scripts = Path(sys.executable).parent
    return subprocess.Popen(
        ["sh", str(ROOT / "recipes" / "demo" / "demo.sh"), "run"],
        cwd=folder,
        env=os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """(folder of the run, what the second call printed); the first call is interrupted in its second stage."""
    folder = tmp_path_factory.mktemp("demo")
    first = demo(folder)
    deadline = time.monotonic() + 600
    while not (folder / "run" / "data" / "prose" / "work").is_dir():
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[0]
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGINT)
    first.communicate(timeout=60)
    assert first.returncode != 0
    assert sorted(p.name for p in (folder / "run" / ".done").iterdir()) == ["tokenizer"]
    second = demo(folder)
    printed = second.communicate(timeout=3000)[0]
    assert second.returncode == 0, printed[-3000:]
    return folder / "run", printed


@pytest.fixture(scope="module")
def scores(finished) -> dict:
    return json.loads((finished[0] / "pretrain" / "scores.json").read_text())


@pytest.mark.slow
def test_every_stage_is_a_printed_command_with_its_seconds(finished):
    run, printed = finished
    assert "== tokenizer: done before" in printed
    for stage in STAGES[1:]:
        assert f"\n== {stage}\n$ " in printed and f"-- {stage} took " in printed
    assert [line.split("\t")[0] for line in (run / "stages.tsv").read_text().splitlines()] == STAGES
    assert "All stages together: " in printed and "Look at" in printed and "Try next" in printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_bits_per_byte_fall_and_end_below_the_5_gram(scores):
    models = [row["bits_per_byte"] for row in scores["models"]]
    assert len(models) == 4 and models == sorted(models, reverse=True) and len(set(models)) == 4
    same_text = {
        row["name"]: row["bits_per_byte"] for row in scores["baselines"] if row["step"] == scores["models"][-1]["step"]
    }
    assert models[-1] < same_text["5-gram"] < same_text["unigram"]


@pytest.mark.slow
def test_the_last_milestone_scores_the_same_where_this_package_cannot_be_imported(finished, scores):
    run, _ = finished
    texts = []
    for file in sorted((run / "data").glob("*/validation/*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            texts += [json.loads(line)["text"] for line in lines]
    last = run.parent / scores["models"][-1]["path"]
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(last)], input=json.dumps(texts), capture_output=True, text=True
    )
    assert float(done.stdout) == pytest.approx(scores["models"][-1]["bits_per_byte"], abs=1e-5), done.stderr


@pytest.mark.slow
def test_the_story_lies_there_with_its_pictures(finished):
    from PIL import Image

    report = finished[0] / "report"
    page = (report / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "bits per byte" in page
    for name in ("loss.png", "learning_rate.png", "trajectory.png"):
        with Image.open(report / name) as picture:
            assert picture.width > 800 and len(picture.convert("RGB").getcolors(1 << 24)) > 50, "an empty picture"


@pytest.mark.slow
def test_finished_it_does_nothing(finished):
    run, _ = finished
    before = (run / "stages.tsv").read_text()
    again = demo(run.parent)
    printed = again.communicate(timeout=60)[0]
    assert again.returncode == 0 and printed.count(": done before") == len(STAGES)
    assert (run / "stages.tsv").read_text() == before
