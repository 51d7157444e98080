"""Records of where things come from, on machines that lack what they would like to name."""

import json

from tinyllama_hf import provenance


def test_a_record_is_json_and_names_everything():
    record = json.loads(json.dumps(provenance.collect(step=3)))
    assert record["step"] == 3
    assert record["libraries"]["transformers"] and record["machine"]["cores"] and record["code"]["tinyllama_hf"]


def test_a_clone_on_a_machine_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    version = provenance.code_version.__wrapped__()
    assert version["tinyllama_hf"] and version.get("commit") is None and version.get("modified") is None
