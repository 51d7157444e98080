"""Score files: one row per model, errors, and files of early versions."""

import json

import pytest

from tinyllama_hf.errors import InputError
from tinyllama_hf.evaluation.score_files import (
    BaselineRow,
    CommonsenseRow,
    ScoreFile,
    TextProtocol,
    TextRow,
    read_records,
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


def open_file(path, **options):
    settings = {"data": [{"path": "data/prose", "fingerprint": "f" * 64, "documents": 6, "bytes": 31415}]}
    return ScoreFile(path, "bits_per_byte", settings, TextRow, lambda row: {row.path}, extra=["baselines"], **options)


def row(path: str, bits: float = 3.0) -> TextRow:
    return TextRow(name=path, path=path, bits_per_byte=bits, by_source={}, protocol=PROTOCOL, seconds=1.0)


def test_the_layout_on_disk(tmp_path):
    file = open_file(tmp_path / "new" / "scores.json")
    later = {"quantization": "nf4", "scored_with": {"torch": "2.13.0"}, "created": "2026-11-01T00:00:00+00:00"}
    file.add(TextRow(**EARLY_ROW | later | {"protocol": PROTOCOL}))
    file.add(row("other"))
    written = json.loads((tmp_path / "new" / "scores.json").read_text())
    assert list(written) == ["task", "data", "models", "baselines", "provenance"] and written["baselines"] == []
    assert written["models"][0] == {**EARLY_ROW, **later}
    assert written["models"][1].keys() == written["models"][0].keys() - {"step", "tokens"}
    assert written["models"][1]["created"] is None
    assert {key: value for key, value in file.contents().items() if key != "provenance"} == {
        key: value for key, value in written.items() if key != "provenance"
    }


def test_a_row_replaces_that_of_the_same_model_and_no_other(tmp_path):
    path = tmp_path / "scores.json"
    file = open_file(path)
    for name, bits in (("a", 1.0), ("b", 2.0), ("a", 3.0)):
        file.add(row(name, bits))
        assert json.loads(path.read_text()) | {"provenance": None} == file.contents() | {"provenance": None}
    assert [(r.name, r.bits_per_byte) for r in open_file(path).rows] == [("a", 3.0), ("b", 2.0)]
    assert file.find("a").bits_per_byte == 3.0 and file.find("c") is None
    file.keep([file.find("a")])
    assert [r.name for r in open_file(path).rows] == ["a"]
    assert open_file(path, rescore=True).rows == []


def test_a_model_is_the_same_by_its_path_or_by_its_files():
    def scored(path, fingerprint):
        figures = {"results": {}, "average": 1.0, "average_standard_error": 1.0, "cut_requests": 0, "seconds": 1.0}
        return CommonsenseRow(name=path, path=path, fingerprint=fingerprint, **figures)

    file = ScoreFile(None, "commonsense", {}, CommonsenseRow, lambda row: {row.path, row.fingerprint})
    for model in (("a", "1"), ("b", "2"), ("c", "3"), ("b", "1")):
        file.add(scored(*model))
    assert [(row.path, row.fingerprint) for row in file.rows] == [("b", "1"), ("c", "3")]


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
    file = open_file(path)
    assert file.rows[0].quantization == "none" and file.rows[0].scored_with == {}
    file.add(row("other"))
    written = json.loads(path.read_text())
    assert written["models"][0].items() >= EARLY_ROW.items() and written["baselines"] == [counted]
    assert read_records(written["baselines"], BaselineRow, "") == [BaselineRow(**counted)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"task": "bits_per_byte", "models": [', r"scores\.json: damaged, not valid JSON"),
        ("[]", r"scores\.json: is not a file of bits_per_byte scores"),
        ('{"task": "commonsense", "models": []}', r"scores\.json: is not a file of bits_per_byte scores"),
        ('{"task": "bits_per_byte"}', r"scores\.json: models: Input should be a valid list"),
        ('{"task": "bits_per_byte", "models": [{"name": "a"}]}', r"scores\.json: models\.0\.path: Field required"),
        (
            json.dumps({"task": "bits_per_byte", "models": [EARLY_ROW | {"bits_per_byte": "two"}]}),
            r"scores\.json: models\.0\.bits_per_byte: Input should be a valid number",
        ),
    ],
)
def test_a_damaged_file_or_one_of_another_task_is_left_as_it_is(tmp_path, text, message):
    path = tmp_path / "scores.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        open_file(path)
    assert path.read_text() == text


def test_other_settings_are_refused(tmp_path):
    def refuse(before):
        raise InputError(f"of {before['task']}, on {before['data'][0]['path']}")

    path = tmp_path / "scores.json"
    open_file(path, check_settings=refuse).add(row("a"))
    with pytest.raises(InputError, match="of bits_per_byte, on data/prose"):
        open_file(path, check_settings=refuse)
    with pytest.raises(InputError, match="is a folder"):
        open_file(tmp_path)
