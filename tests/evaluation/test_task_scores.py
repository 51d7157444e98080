"""Which rows of a task score file are kept, copied or scored again, and what their protocol says."""

import dataclasses
import gzip
import json
import re
import shutil

import pytest
import torch

from tests.evaluation.simulated_scores import simulate, write
from tests.evaluation.test_commonsense import save
from tinyllama_hf.errors import InputError
from tinyllama_hf.evaluation import models, task_scores
from tinyllama_hf.evaluation.known_rows import model_fingerprints
from tinyllama_hf.evaluation.models import describe_model, load_eval_model
from tinyllama_hf.evaluation.score_files import TaskScoreFile, read_scores
from tinyllama_hf.evaluation.scored_items import ScoredItem, read_scored_items
from tinyllama_hf.evaluation.task_scores import score_tasks
from tinyllama_hf.evaluation.tasks.protocol_definitions import define_protocol


PIQA = define_protocol(tasks=["piqa"])


@pytest.fixture
def folder(tokenizer_folder, tmp_path):
    """A model folder."""
    return save(tmp_path / "model", tokenizer_folder, 1)


@pytest.fixture
def score(tmp_path):
    """Scores models on two items of PIQA into one file, and returns their rows and all notes."""

    def run(*folders, **options):
        notes = []
        options = {"definition": PIQA, "limit": 2, "output": tmp_path / "scores.json", "note": notes.append} | options
        return score_tasks([str(folder) for folder in folders], "embedded:sample", **options).file.models, notes

    return run


def protocol_of(path) -> dict:
    return json.loads(path.read_text())["protocol"]


def test_items_with_line_separators_of_unicode_are_read(tmp_path):
    """Regression: the file was split at U+2028, U+2029 and U+0085, and so taken for damaged."""
    text = "one\u2028two\u2029three\x85four\x0bfive\x1csix\r\nseven"
    texts = {"question": text, "choices": [text], "replies": [text]}
    items = [ScoredItem(task="piqa", index=0, doc="a", metrics={"acc_norm": 1.0}, **texts)]
    path = write(tmp_path / "scores.json", {"model": [*items, *simulate(0.0, 1)]})
    (row,) = read_scores(path, TaskScoreFile).models
    assert read_scored_items(path, row)[:1] == items


def test_a_model_without_a_context_has_that_of_llama(folder, score, tmp_path):
    """Regression: the file had none, and was refused as damaged when it was read again."""
    fields = json.loads((folder / "config.json").read_text())
    del fields["max_position_embeddings"]
    (folder / "config.json").write_text(json.dumps(fields))
    score(folder)
    assert protocol_of(tmp_path / "scores.json")["context_length"] == 2048
    assert "already scored" in score(folder)[1][0]


def test_the_protocol_has_the_dtype_of_int4(folder, score, monkeypatch, tokenizer_folder, tmp_path):
    """Regression: it was that of the other models, although the kernels compute in bf16."""
    dtypes, other = [], save(tmp_path / "other", tokenizer_folder, 2)
    list_models = task_scores.list_eval_models

    def list_as_int4(names, *options):
        return [dataclasses.replace(m, quantization="int4" if m.folder == folder else "none")
                for m in list_models(names, *options)]  # fmt: skip

    def load_plain(model, device, dtype):
        dtypes.append(dtype)
        return load_eval_model(dataclasses.replace(model, quantization="none"), device)

    monkeypatch.setattr(task_scores, "list_eval_models", list_as_int4)
    monkeypatch.setattr(task_scores, "load_eval_model", load_plain)
    with pytest.raises(InputError, match=r"dtypes of the models differ \(.*model: bfloat16, .*other: float32\)"):
        score(folder, other)
    score(folder)
    assert dtypes == [torch.bfloat16] and protocol_of(tmp_path / "scores.json")["dtype"] == "bfloat16"
    with pytest.raises(InputError, match=r"another protocol \(different: dtype \(bfloat16, not float32\)\)"):
        score(other)


def test_an_adapter_on_int4_is_not_ignored(folder, monkeypatch):
    """Regression: the model was scored without it. `load` refuses it."""
    model = dataclasses.replace(describe_model(folder, adapter="adapter"), quantization="int4")
    monkeypatch.setattr(models, "load_stock", lambda *_: pytest.fail("loaded without the adapter"))

    def load(folder, *options, adapter, **others):
        raise InputError(f"--adapter {adapter}")

    monkeypatch.setattr(models, "load", load)
    with pytest.raises(InputError, match="--adapter adapter"):
        load_eval_model(model, "cpu")


def rows_of(path) -> list[tuple]:
    return [(row.path, row.results, row.items_file) for row in read_scores(path, TaskScoreFile).models]


def test_a_copy_keeps_its_own_row(folder, score, tmp_path):
    """Regression: the row of an equal model was taken over, so that the file had only one of the two."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    for _ in range(2):
        score(folder, copy)
        (path, *first), (other, *second) = rows_of(tmp_path / "scores.json")
        assert (path, other) == (str(folder), str(copy)) and first == second
    shutil.move(copy, tmp_path / "moved")
    (row,), notes = score(tmp_path / "moved")
    assert "already scored" in notes[0] and row.name == "moved"
    assert [path for path, *_ in rows_of(tmp_path / "scores.json")] == [str(folder), str(tmp_path / "moved")]


def test_one_folder_has_one_row(folder, score, tmp_path, monkeypatch):
    """By whichever path, and also after its weights have changed."""
    monkeypatch.chdir(tmp_path)
    score(folder)
    (row,), _ = score("model")
    assert row.path == "model" and [path for path, *_ in rows_of(tmp_path / "scores.json")] == ["model"]
    shutil.copyfile(folder / "generation_config.json", folder / "added.safetensors")
    assert score(folder)[1] == [] and [path for path, *_ in rows_of(tmp_path / "scores.json")] == [str(folder)]


@pytest.mark.parametrize("damage", ["missing", "torn", "none"])
def test_a_model_without_items_is_scored_again(folder, score, tmp_path, damage):
    """Regression: messages said so, and the command answered that it was already scored."""
    score(folder)
    ((_, _, name),) = rows_of(tmp_path / "scores.json")
    items = (tmp_path / name).read_bytes()
    if damage == "missing":
        shutil.rmtree((tmp_path / name).parent)
    elif damage == "torn":
        (tmp_path / name).write_bytes(items[:-20])
    (note,) = score(folder)[1]
    assert ("already scored" if damage == "none" else f"items ({tmp_path / name}) are missing or damaged") in note
    assert (tmp_path / name).read_bytes() == items


def test_rescore(folder, score, tokenizer_folder, tmp_path, monkeypatch):
    """Scores of other models are kept, and an interrupted call resumes without it."""
    path, copy = tmp_path / "scores.json", shutil.copytree(folder, tmp_path / "copy")
    score(folder, copy, save(tmp_path / "other", tokenizer_folder, 2))
    before = {name: rest for name, *rest in rows_of(path)}
    file = tmp_path / before[str(folder)][1]
    items = file.read_bytes()
    file.write_bytes(gzip.compress(re.sub(rb'"acc": ...', b'"acc": NaN', gzip.decompress(items))))
    assert "already scored" in score(folder)[1][0]
    with monkeypatch.context() as patch:
        patch.setattr(task_scores, "load_eval_model", lambda *_: pytest.fail("interrupted"))
        with pytest.raises(pytest.fail.Exception):
            score(folder, rescore=True)
    assert {name: rest for name, *rest in rows_of(path)} == {k: v for k, v in before.items() if k != str(folder)}
    assert score(folder, rescore=True)[1] == [] and file.read_bytes() == items
    assert {name: rest for name, *rest in rows_of(path)} == before


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json", "generation_config.json"])
def test_a_changed_file_of_the_tokenizer_or_of_generation(folder, score, tmp_path, name):
    """Regression: the model counted as unchanged."""
    (folder / "generation_config.json").unlink()
    score(folder)
    (folder / name).write_text("{}")
    assert score(folder)[1] == [] and "already scored" in score(folder)[1][0]


def test_a_row_of_an_early_version_is_kept(folder, score, tmp_path):
    """Its fingerprint leaves out some files. It gets a whole one, so that a later change is seen."""
    (folder / "special_tokens_map.json").write_text("{}")
    score(folder)
    contents = json.loads((tmp_path / "scores.json").read_text())
    whole, early = model_fingerprints(describe_model(folder))
    assert contents["models"][0]["fingerprint"] == whole != early
    contents["models"][0]["fingerprint"] = early
    (tmp_path / "scores.json").write_text(json.dumps(contents))
    (row,), notes = score(folder)
    assert "already scored" in notes[0] and row.fingerprint == whole
    (folder / "special_tokens_map.json").write_text('{"pad_token": "<unk>"}')
    assert score(folder)[1] == []
