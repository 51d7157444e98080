"""What is kept of the answers of a model: right and wrong choices, and the texts of wrong items."""

import pytest
from lm_eval.api.model import LM

from tests.evaluation.task_folders import write_rows
from tinyllama_hf.evaluation.harness.harness_results import run_tasks
from tinyllama_hf.evaluation.score_metrics import is_wrong
from tinyllama_hf.evaluation.scored_items import ScoredItem
from tinyllama_hf.evaluation.tasks.protocol_definitions import define_protocol
from tinyllama_hf.evaluation.tasks.suite import open_suite


OWN = """
task: neighbors
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "A neighbor of {{{{country}}}} is"
doc_to_choice: "{{{{names}}}}"
doc_to_target: right
metric_list:
  - metric: acc
"""


class Favorite(LM):
    """A model that prefers one word to all others."""

    def loglikelihood(self, requests):
        return [(-1.0 if "Niger" in request.args[1] else -4.0, False) for request in requests]

    loglikelihood_rolling = generate_until = None


def test_several_right_choices(tmp_path):
    """Each of them is right, and all of them are kept; of one right choice, nothing is added."""
    rows = [
        {"country": "Chad", "names": ["Sudan", "Oslo", "Niger"], "right": [0, 2]},
        {"country": "Norway", "names": ["Niger", "Sweden", "Finland"], "right": [1, 2]},
        {"country": "Mali", "names": ["Niger", "Sweden", "Peru"], "right": [0]},
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "neighbors.yaml").write_text(OWN.format(file=file))
    definition = define_protocol("modern", ["neighbors"], tmp_path / "own")
    with open_suite(None, definition, tmp_path / "own") as suite:
        found = run_tasks(Favorite(), suite, None)
    assert found.results["neighbors"].score == pytest.approx(200 / 3)
    assert [(item.chosen, item.right_choices) for item in found.items] == [(2, [0, 2]), (0, [1, 2]), (0, [0])]
    assert [is_wrong(item, "acc") for item in found.items] == [False, True, False]
    assert [item.question is not None for item in found.items] == [False, True, False]
    assert found.items[1].to_json()["also_right"] == [2] and "also_right" not in found.items[2].to_json()


def scored(metrics, **fields) -> ScoredItem:
    return ScoredItem(task="t", index=0, doc="d", metrics=metrics, **fields)


@pytest.mark.parametrize(
    ("item", "metric", "wrong"),
    [
        (scored({"acc": 1.0}, chosen=1, gold=0), "acc", False),  # of several right ones, before all were kept
        (scored({"exact_match,strict": 0.0, "exact_match,loose": 1.0}), "exact_match,strict", True),
        (scored({"f1": 0.5}), "f1", True),
        (scored({"f1": 1.0}), "f1", False),
        (scored({}, chosen=1, gold=0, also_right=[1]), "mcc", False),
        (scored({}, chosen=2, gold=0, also_right=[1]), "mcc", True),
        (scored({"brier_score": 0.0}, chosen=0, gold=0), "brier_score", False),
        (scored({"perplexity": 3.0}), "perplexity", False),
    ],
)
def test_what_is_wrong(item, metric, wrong):
    assert is_wrong(item, metric) == wrong
