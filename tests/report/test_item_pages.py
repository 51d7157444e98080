"""The pages of wrong items: the first ones of each task, their choices, likelihoods, and nothing unescaped."""

import json
import re
from pathlib import Path

import pytest

from tests.hub.conftest import commonsense_scores
from tests.report.test_series_section import series_run
from tinyllama_hf.evaluation.score_files import TaskScoreFile, read_scores
from tinyllama_hf.evaluation.scored_items import ScoredItem, items_file_name, write_scored_items
from tinyllama_hf.report.page import write_report


ITEMS = [
    ScoredItem(
        task="piqa", index=0, doc="a", metrics={"acc": 1.0, "acc_norm": 1.0}, log_likelihoods=[-1.0, -2.0],
        chosen=0, gold=0,
    ),
    ScoredItem(
        task="piqa", index=1, doc="b", metrics={"acc": 1.0, "acc_norm": 0.0}, log_likelihoods=[-12.3456, -7.5, -8.0],
        chosen=0, gold=1, also_right=[2], question="How <b>many</b> & why?",
        choices=["<script>alert(1)</script>", "just two", "a pair"],
    ),
    ScoredItem(task="piqa", index=3, doc="e", metrics={"acc": 1.0, "acc_norm": 1.0}, chosen=1, gold=0, also_right=[1]),
    ScoredItem(task="piqa", index=2, doc="c", metrics={"acc": 0.0, "acc_norm": 0.0}, chosen=1, gold=0),
    ScoredItem(
        task="gsm8k", index=7, doc="d", metrics={"exact_match,strict-match": 0.0}, replies=["It is <5>."],
        question="What is 2 + 2?",
    ),
]  # fmt: skip


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with three scored models, of which two have items."""
    run = series_run(tmp_path)
    scores = commonsense_scores(["step-10", "step-30 (nf4)", "step-50"], limit=None)
    generation = {"metric": "exact_match,strict-match", "score": 0.0, "standard_error": None, "items": 1, "version": 3}
    for number, row in enumerate(scores["models"]):
        row |= {"fingerprint": f"{number}" * 64, "tokens": 1000 * number + 1000, "step": 10}
        row["results"]["gsm8k"] = generation
    path = run / "commonsense.json"
    path.write_text(json.dumps(scores))
    rows = read_scores(path, TaskScoreFile).models
    for number in (0, 1):
        scores["models"][number]["items_file"] = items_file_name(path, rows[number])
        write_scored_items(run / scores["models"][number]["items_file"], ITEMS)
    path.write_text(json.dumps(scores))
    return run


def test_pages(run, tmp_path):
    index = write_report(run, tmp_path / "report").read_text()
    assert '<a href="items-step-10.html">step-10</a>, published: 3 of 5 items' in index
    assert '<a href="items-step-30-nf4.html">step-30 (nf4)</a>, published: 3 of 5 items' in index
    assert "step-50" not in index.split("Wrong answers")[1].split("</ul>")[0], "it has no items"
    page = (tmp_path / "report" / "items-step-10.html").read_text()
    assert re.findall("<h3>(.*)</h3>", page) == ["Item 1", "Item 7"], "those with a question, without the right ones"
    for fact in (
        "Wrong answers of step-10",
        "How &lt;b&gt;many&lt;/b&gt; &amp; why?",
        '<td>&lt;script&gt;alert(1)&lt;/script&gt;</td><td class="n">-12.346</td><td>chosen</td>',
        '<td>just two</td><td class="n">-7.500</td><td>right</td>',
        '<td>a pair</td><td class="n">-8.000</td><td>right</td>',
        "2 of 4 items are wrong, 1 of them are shown",
        "1 of 1 items are wrong, 1 of them are shown",
        "It is &lt;5&gt;.",
        "under the protocol published (float32)",
    ):
        assert fact in page, fact
    assert "<script>" not in page and "<b>many" not in page


def test_scores_of_other_tasks_have_pages_too(run, tmp_path):
    """Also without the scores of the seven tasks, which are a table of their own."""
    scores = json.loads((run / "commonsense.json").read_text())
    scores["protocol"]["name"] = "modern"
    (run / "tasks-modern.json").write_text(json.dumps(scores))
    write_report(run, tmp_path / "report")
    assert len(list((tmp_path / "report").glob("items-step-10*.html"))) == 2
    assert "protocol modern" in (tmp_path / "report" / "items-step-10-2.html").read_text()
    (run / "commonsense.json").unlink()
    index = write_report(run, tmp_path / "alone").read_text()
    assert "step-10</a>, modern: 3 of 5 items" in index and "Task scores over tokens" in index
    assert "Commonsense, by lm-eval" not in index


def test_missing_items_are_named_on_the_page(run, tmp_path):
    """The scores are complete without them."""
    for file in run.glob("commonsense.items/0*"):
        file.unlink()
    for file in run.glob("commonsense.items/1*"):
        file.write_bytes(b"damaged")
    index = write_report(run, tmp_path / "report").read_text()
    section = index.split("Wrong answers")[1]
    assert "missing; it has the items of step-10" in section and "damaged. Score" in section
    assert "<a href" not in section and not list((tmp_path / "report").glob("items-*"))


def test_names_that_give_the_same_file(run, tmp_path):
    path = run / "commonsense.json"
    scores = json.loads(path.read_text())
    scores["models"][1]["name"] = "step/10"
    scores["models"][0]["name"] = "step 10"
    path.write_text(json.dumps(scores))
    write_report(run, tmp_path / "report")
    assert {file.name for file in (tmp_path / "report").glob("items-*")} == {
        "items-step-10.html", "items-step-10-2.html"}  # fmt: skip
    assert "Wrong answers of step/10" in (tmp_path / "report" / "items-step-10-2.html").read_text()
