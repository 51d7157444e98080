"""The section on a series of milestones: what is fitted, what is drawn, and what the page says."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy.stats import binomtest

from tests.conftest import ROOT
from tests.hub.conftest import TASK_ITEMS, commonsense_scores
from tests.report.test_page import score_file
from tests.report.test_plots import assert_colors, legend, series
from tests.report.test_training import training_row, write
from tinyllama_hf.evaluation.series_forecast import fit_series
from tinyllama_hf.released import released
from tinyllama_hf.report import plots
from tinyllama_hf.report.page import write_report


PLACES = list(range(1000, 13_000, 1000))
MILESTONES = PLACES[::2]


def law(tokens: float) -> float:
    return 2.5 + 40 * tokens**-0.5


def series_run(folder: Path) -> Path:
    """A run with six milestones and a validation loss that follows a law exactly after the warm-up."""
    run = folder / "run"
    for tokens in MILESTONES:
        milestone = run / "milestones" / f"step-{tokens // 100}-token-{tokens}"
        milestone.mkdir(parents=True)
        record = {"step": tokens // 100, "tokens": tokens, "created": "2026", "code": {"tinyllama_hf": "0"}}
        record |= {"python": "3", "libraries": {}, "machine": {"processor": "x", "cores": 1}}
        (milestone / "provenance.json").write_text(json.dumps(record))
    config = yaml.safe_load((ROOT / "recipes" / "pretrain" / "micro.yaml").read_text())
    config["schedule"]["warmup_tokens"] = 1500
    config["training"]["total_tokens"] = 12_000
    (run / "training.yaml").write_text(yaml.safe_dump(config))
    rows = [training_row(tokens // 100) for tokens in PLACES]
    losses = [{"step": t // 100, "tokens": t, "validation_loss": law(t) if t > 1000 else 9.0} for t in PLACES]
    write(run, [row for pair in zip(rows, losses, strict=True) for row in pair])
    return run


def write_scores(run: Path, limit: int | None = None, **protocol) -> dict:
    """Task scores of the milestones, with bits per byte of the right answers."""
    scores = commonsense_scores([f"step-{i}" for i in range(6)], limit=limit)
    for number, (row, tokens) in enumerate(zip(scores["models"], MILESTONES, strict=True)):
        row |= {"step": tokens // 100, "tokens": tokens}
        for place, result in enumerate(row["results"].values()):
            bits = {"score": 2 - number / 10 + place / 100, "standard_error": 0.05}
            result["metrics"] = {"bits_per_byte": bits}
    scores["protocol"] |= protocol
    (run / "commonsense.json").write_text(json.dumps(scores))
    return scores


def test_fitted_series(tmp_path):
    """The point of the warm-up is left out; both back-tests and the forecast at twice the tokens are exact."""
    points = [(t, law(t) if t > 1000 else 9.0) for t in PLACES]
    fitted = fit_series("Loss", "nats", points, MILESTONES, 1500, 11_000)
    assert fitted.points == points and list(fitted.curve.tokens) == PLACES[1:]
    assert fitted.forecast.tokens == 24_000 and fitted.forecast.value == pytest.approx(law(24_000), rel=1e-6)
    assert [test.forecast.tokens for test in fitted.back_tests] == [9000, 11_000, 11_000]
    assert fitted.known == [7000, 7000, 9000], "the fourth of six, and the last but one"
    assert [test.miss for test in fitted.back_tests] == pytest.approx([0, 0, 0], abs=1e-3)
    unfinished = fit_series("Loss", "nats", points, MILESTONES, 1500, 50_000)
    assert unfinished.forecast.tokens == 50_000
    seven = fit_series("Loss", "nats", points, PLACES[5:], 1500, 1)
    assert seven.known == [PLACES[9], PLACES[9], PLACES[10]], "of seven, the fifth"


def test_the_last_value_of_a_number_of_tokens_counts():
    """As after a resumed run, which validates again."""
    fitted = fit_series("Loss", "nats", [(2, 5.0), (1, 9.0), (1, 8.0)], [], 0, 1)
    assert fitted.points == [(1, 8.0), (2, 5.0)]


def test_the_first_tenth_is_left_out_where_enough_remain():
    points = [(t, law(t)) for t in (100, 200, *PLACES)]
    assert fit_series("Loss", "nats", points, [], 0, 1).curve.tokens[0] == 2000
    assert fit_series("Loss", "nats", points[:8], [], 0, 1).curve.tokens[0] == 100, "four would remain of 1000 on"


def test_a_back_test_counts_only_known_points():
    """Eight are known at the first back-test, so the first two are fitted there; they are too early for the last."""
    points = [(t, law(t) * (1 + (t == 100) / 10)) for t in (100, 200, *PLACES)]
    first, _, last = fit_series("a", "b", points, [6000, 11_000, 12_000], 0, 1).back_tests
    assert abs(first.miss) > 1 and last.miss == pytest.approx(0, abs=1e-3)


def test_a_back_test_does_not_see_later_points():
    points = [(t, law(t) * (1 if t <= 7000 else 1.01)) for t in PLACES]
    fitted = fit_series("Loss", "nats", points, MILESTONES, 1500, 12_000)
    assert fitted.back_tests[0].forecast.value == pytest.approx(law(9000), rel=1e-6)
    assert fitted.back_tests[0].miss == pytest.approx(100 * (1 / 1.01 - 1), abs=1e-3)


def test_what_cannot_be_fitted_says_why():
    assert "No curve is fitted: 2 points are too few" in fit_series("a", "b", [(1, 2.0), (2, 1.0)], [], 0, 1).problem
    rising = fit_series("a", "b", [(t, t / 100) for t in PLACES], [], 0, 1)
    assert rising.curve is None and "do not decrease" in rising.problem
    few = fit_series("a", "b", [(t, law(t)) for t in PLACES], PLACES[:2], 0, 1)
    assert few.curve and "There is no back-test: the run has 2 milestones" in few.problem


def test_page_of_a_published_series(tmp_path, drawn):
    run = series_run(tmp_path)
    scores = write_scores(run)
    (run / "scores.json").write_text(json.dumps(score_file(run, tuple(MILESTONES)) | {"baselines": []}))
    page = write_report(run, tmp_path / "report").read_text()
    for fact in (
        "<b>The dashed part is a forecast</b>",
        "follows the schedule cosine, which bends its curve",
        '<td class="n">24,000 tokens</td>',
        '<td class="n">2.758</td>',
        '<td>Validation loss</td><td class="n">7,000</td><td class="n">9,000</td>',
        "The published series of TinyLlama and its peer are drawn",
        "Right answers, mean of the tasks, bits per byte",
    ):
        assert fact in page, fact
    scaling, tasks, answers = drawn[3:]
    above, bits, right, below, *_ = scaling.axes
    assert series(above, "not fitted") == ([1000], [9.0])
    assert series(above, "measured") == (PLACES[1:], pytest.approx([law(t) for t in PLACES[1:]]))
    ahead, values = series(above, "forecast, 95 %")
    assert (ahead[0], ahead[-1]) == pytest.approx((12_000, 24_000)) and values[-1] == pytest.approx(law(24_000))
    assert series(above, "fitted curve")[1] == pytest.approx([law(t) for t in series(above, "fitted curve")[0]])
    assert "Validation loss" in above.get_title() and "Held-out text" in bits.get_title()
    assert series(right, "not fitted") == ([1000], [pytest.approx(2.03)]), "the mean of seven tasks"
    assert series(right, "measured") == (MILESTONES[1:], pytest.approx([2.03 - i / 10 for i in range(1, 6)]))
    assert below.get_ylabel() == "residual, %"
    panel = tasks.axes[0]
    assert panel.get_title() == "hellaswag" and [axes.get_title() for axes in tasks.axes[:8]][-1] == "average"
    result = scores["models"][0]["results"]["hellaswag"]
    [bars] = panel.containers[0].lines[2]
    low, high = bars.get_segments()[0][:, 1]
    right_items = round(result["score"] / 100 * result["items"])
    expected = binomtest(right_items, result["items"]).proportion_ci(0.95, "wilson")
    assert (low, high) == pytest.approx((100 * expected.low, 100 * expected.high), abs=0.01)
    base = [row for row in released() if row.kind == "base" and row.scores]
    peer = next(row for row in released() if row.kind == "peer")
    drawn_rows = set(zip(*series(panel, "TinyLlama, published"), strict=True))
    assert drawn_rows == {(row.tokens, row.scores["hellaswag"]) for row in base} and len(base) == 10
    assert series(tasks.axes[7], "pythia-1b, published") == ([peer.tokens], [pytest.approx(peer.average)])
    assert panel.get_xscale() == "log"
    assert [text.get_text() for text in tasks.legends[0].get_texts()] == [
        "TinyLlama, published", "pythia-1b, published", "this run"]  # fmt: skip
    tasks.canvas.draw()
    above_legend = tasks.legends[0].get_window_extent().y1
    assert all(axes.get_tightbbox().y0 >= above_legend for axes in tasks.axes), "it covers nothing"
    assert [axes.get_xlabel() for axes in tasks.axes] == [""] * 4 + ["tokens"] * 4
    assert answers.axes[6].get_title() == "piqa" and answers.axes[6].get_xscale() == "linear"
    for name in ("scaling", "tasks", "answers"):
        assert f'alt="{name}"' in page
        with Image.open(tmp_path / "report" / f"{name}.png") as picture:
            assert picture.size[0] > 1000
    assert_colors(tmp_path / "report" / "tasks.png", plots._PUBLISHED_COLORS["base"], plots._COLORS["model"])


@pytest.mark.parametrize(
    ("limit", "protocol", "reason"),
    [
        (100, {}, "100 of 10042 items of hellaswag"),
        (None, {"sample": True}, "made-up items"),
        (None, {"name": "modern"}, "Here: the protocol &#39;modern&#39;."),
    ],
)
def test_the_published_series_is_not_drawn_with_other_scores(tmp_path, drawn, limit, protocol, reason):
    run = series_run(tmp_path)
    write_scores(run, limit, **protocol)
    page = write_report(run, tmp_path / "report").read_text()
    assert "The published series is not drawn" in page and reason in page
    panel = drawn[3].axes[0]
    assert len(panel.lines) == 3, "a line and the caps of its bars"
    assert panel.get_xscale() == "linear"


def test_a_metric_that_is_no_share_keeps_its_unit_and_its_standard_error(tmp_path, drawn):
    run = series_run(tmp_path)
    scores = write_scores(run)
    for row in scores["models"]:
        row["results"]["boolq"] |= {"metric": "f1", "score": 60.0, "standard_error": 2.0}
        row["results"]["piqa"] |= {"metric": "bleu", "score": 12.0, "standard_error": 1.0}
    scores["protocol"]["name"] = "modern"
    (run / "commonsense.json").write_text(json.dumps(scores))
    write_report(run, tmp_path / "report")
    tasks = drawn[3]
    assert tasks.get_supylabel() == "score, with 95 % intervals"
    panel = next(axes for axes in tasks.axes if axes.get_title() == "boolq")
    [bars] = panel.containers[0].lines[2]
    assert bars.get_segments()[0][:, 1] == pytest.approx([60 - 3.92, 60 + 3.92], abs=0.01)


def test_a_score_without_items_right_has_an_interval(tmp_path, drawn):
    run = series_run(tmp_path)
    scores = write_scores(run)
    scores["models"][0]["results"]["boolq"] |= {"score": 0.0, "standard_error": None}
    scores["models"][0] |= {"average_standard_error": None}
    (run / "commonsense.json").write_text(json.dumps(scores))
    write_report(run, tmp_path / "report")
    panel = next(axes for axes in drawn[3].axes if axes.get_title() == "boolq")
    low, high = panel.containers[0].lines[2][0].get_segments()[0][:, 1]
    assert low == pytest.approx(0) and high == pytest.approx(100 * 3.8415 / (TASK_ITEMS["boolq"] + 3.8415), rel=1e-3)
    average = next(axes for axes in drawn[3].axes if axes.get_title() == "average")
    segments = average.containers[0].lines[2][0].get_segments()
    assert np.ptp(segments[0][:, 1]) == 0 < np.ptp(segments[1][:, 1])


def test_a_short_run_says_why_there_is_no_curve(tmp_path):
    run = series_run(tmp_path)
    rows = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("".join(f"{row}\n" for row in rows[:6]))
    page = write_report(run, tmp_path / "report").read_text()
    assert "Validation loss: No curve is fitted: 2 points are too few" in page
    assert 'alt="scaling"' not in page and "Back-test" not in page


def test_legend_of_a_curve(drawn, tmp_path):
    fitted = fit_series("Loss", "nats", [(t, law(t)) for t in PLACES], [], 0, 1)
    plots.scaling_curves([fitted], tmp_path / "x.png")
    assert legend(drawn[0].axes[0]) == ["not fitted", "measured", "fitted curve", "forecast, 95 %"]
    assert_colors(tmp_path / "x.png", plots._COLORS["model"], plots._COLORS["validation"])
    same = copy.copy(fitted)
    plots.scaling_curves([fitted, same], tmp_path / "y.png")
    assert len(drawn[1].axes) == 4
