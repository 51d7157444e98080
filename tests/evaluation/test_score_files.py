"""Score files: one row per model, errors, and files of early versions."""

import json

import pytest

from tinyllama_hf.errors import InputError
from tinyllama_hf.evaluation.score_files import (
    BaselineRow,
    TextProtocol,
    TextRow,
    TextScoreFile,
    TextSource,
    read_run_scores,
    read_scores,
    replace_rows,
    write_scores,
)
from tinyllama_hf.files import write_json


# As the first versions wrote it: no quantization, no time of the folder, no libraries.
EARLY_ROW = {
    "name": "step-6-token-0.0015M",
    "path": "runs/demo/milestones/step-6-token-0.0015M",
    "step": 6,
    "tokens": 1536,
    "bits_per_byte": 2.5,
    "by_source": {"data/prose": 2.5},
    "protocol": {"context": 32, "stride": 16, "bos": True, "dtype": "float32"},
    "seconds": 1.5,
}
PROTOCOL = TextProtocol(32, 16, True, "float32")


SOURCE = TextSource("data/prose", "f" * 64, 6, 31415, total_documents=60, total_bytes=314_159, max_bytes=31416)


def row(path: str, bits: float = 3.0) -> TextRow:
    return TextRow(name=path, path=path, bits_per_byte=bits, by_source={}, protocol=PROTOCOL, seconds=1.0)


def test_the_layout_on_disk(tmp_path):
    later = {"quantization": "nf4", "scored_with": {"torch": "2.13.0"}, "created": "2026-11-01T00:00:00+00:00"}
    first = TextRow(**EARLY_ROW | later | {"protocol": PROTOCOL})
    file = TextScoreFile(data=[SOURCE], models=[first, row("other")])
    write_scores(tmp_path / "new" / "scores.json", file)
    written = json.loads((tmp_path / "new" / "scores.json").read_text())
    assert list(written) == ["task", "data", "models", "baselines", "provenance"] and written["baselines"] == []
    sample = {"documents": 6, "bytes": 31415, "total_documents": 60, "total_bytes": 314_159, "max_bytes": 31416}
    assert written["data"] == [{"path": "data/prose", "fingerprint": "f" * 64, **sample}]
    assert written["models"][0] == {**EARLY_ROW, **later}
    assert written["models"][1].keys() == written["models"][0].keys() - {"step", "tokens"}
    assert written["models"][1]["created"] is None and written["provenance"] == file.provenance
    assert read_scores(tmp_path / "new" / "scores.json", TextScoreFile) == file


def test_a_row_replaces_that_of_the_same_model_and_no_other():
    rows = [row("a", 1.0), row("b", 2.0), row("a", 1.5), row("c", 4.0)]
    replace_rows(rows, [rows[0], rows[2]], row("a", 3.0))
    assert [(r.name, r.bits_per_byte) for r in rows] == [("a", 3.0), ("b", 2.0), ("c", 4.0)]
    replace_rows(rows, [], row("d"))
    assert [r.name for r in rows] == ["a", "b", "c", "d"]


def test_a_file_of_an_early_version_is_read_and_kept(tmp_path):
    path = tmp_path / "scores.json"
    counted = {
        "name": "unigram",
        "step": 6,
        "tokens": 1536,
        "distinct_tokens": 9,
        "bits_per_byte": 4.0,
        "by_source": {},
    }
    write_json(path, {"task": "bits_per_byte", "data": [], "models": [EARLY_ROW], "baselines": [counted]})
    file = read_scores(path, TextScoreFile)
    assert file.models[0].quantization == "none" and file.models[0].scored_with == {}
    assert file.baselines == [BaselineRow(**counted)]
    write_scores(path, file)
    written = json.loads(path.read_text())
    assert written["models"][0].items() >= EARLY_ROW.items() and written["baselines"] == [counted]


def test_the_scores_of_a_folder_and_of_one_model(tmp_path):
    write_scores(tmp_path / "scores.json", TextScoreFile(data=[SOURCE], models=[row("a"), row("b")]))
    scores = read_run_scores(tmp_path)
    assert [r.name for r in scores.text.models] == ["a", "b"] and scores.commonsense is scores.replies is None
    assert [r.name for r in scores.of_model("b").text.models] == ["b"] and scores.of_model("c").text is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"task": "bits_per_byte", "models": [', r"scores\.json: damaged, not valid JSON"),
        ("[]", r"scores\.json: is not a file of bits_per_byte scores"),
        ('{"task": "commonsense", "models": []}', r"scores\.json: is not a file of bits_per_byte scores"),
        ('{"task": "bits_per_byte", "data": []}', r"scores\.json: models: Field required"),
        (
            '{"task": "bits_per_byte", "data": [], "models": [{"name": "a"}]}',
            r"scores\.json: models\.0\.path: Field required",
        ),
        (
            json.dumps({"task": "bits_per_byte", "data": [], "models": [EARLY_ROW | {"bits_per_byte": "two"}]}),
            r"scores\.json: models\.0\.bits_per_byte: Input should be a valid number",
        ),
    ],
)
def test_a_damaged_file_or_one_of_another_task_is_left_as_it_is(tmp_path, text, message):
    path = tmp_path / "scores.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_scores(path, TextScoreFile)
    assert path.read_text() == text
    assert read_scores(path, TextScoreFile, rescore=True) is None


def test_a_folder_is_refused(tmp_path):
    for rescore in (False, True):
        with pytest.raises(InputError, match="is a folder"):
            read_scores(tmp_path, TextScoreFile, rescore)
