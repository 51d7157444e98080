"""Which rows of a task score file are kept, copied or scored again, and what their protocol says."""

import pytest

from tests.evaluation.simulated_scores import simulate, write
from tinyllama_hf.evaluation.score_files import TaskScoreFile, read_scores
from tinyllama_hf.evaluation.scored_items import ScoredItem, read_scored_items


def test_items_with_line_separators_of_unicode_are_read(tmp_path):
    """Regression: the file was split at U+2028, U+2029 and U+0085, and so taken for damaged."""
    text = "one\u2028two\u2029three\x85four\x0bfive\x1csix\r\nseven"
    items = [
        ScoredItem(
            task="piqa", index=0, doc="a", metrics={"acc_norm": 1.0}, question=text, choices=[text], replies=[text]
        )
    ]
    path = write(tmp_path / "scores.json", {"model": [*items, *simulate(0.0, 1)]})
    (row,) = read_scores(path, TaskScoreFile).models
    assert read_scored_items(path, row)[:1] == items
