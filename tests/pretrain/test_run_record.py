"""`run.json`, and a run of commit 7775f20 without one, which can be used although its recipe is no longer valid.

The run in data/run_7775f20 was trained with that commit's recipes/pretrain.py. The expected scores are from that
commit's evaluation.
"""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.hub.conftest import files_on_hub, hub, online
from tests.pretrain.runs import run
from tinyllama_hf.errors import InputError
from tinyllama_hf.evaluation.series import score, watch
from tinyllama_hf.files import read_json
from tinyllama_hf.hub.publish import publish
from tinyllama_hf.pretrain.config import load_pretrain_config
from tinyllama_hf.pretrain.milestones import list_milestones
from tinyllama_hf.pretrain.run_record import RunRecord, read_run_record
from tinyllama_hf.report.page import write_report


__all__ = ["hub", "online"]  # fixtures
NAMES = ["step-6-token-0.002M", "step-12-token-0.003M"]
FINGERPRINT = "5c7718381b1aa4c8e479b5b6c92a6ac8bc6df4d07f74d0f5c1d354c04d12f6b8"


@pytest.fixture
def early_run(tmp_path, monkeypatch) -> Path:
    """A copy of the run of 7775f20; its recipe has paths relative to the working directory."""
    folder = shutil.copytree(Path(__file__).parent / "data" / "run_7775f20", tmp_path / "early")
    monkeypatch.chdir(folder)
    return Path("run")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_written_at_the_start(recipe):
    output = run(recipe, "milestones.steps=[3]")
    written = json.loads((output / "run.json").read_text())
    data = read_json(list_milestones(output)[0] / "provenance.json")["data"]
    [source] = written["sources"]
    assert written["format_version"] == 1 and data == {source["path"]: source["fingerprint"]}
    assert [milestone["name"] for milestone in written["milestones"]] == [m.name for m in list_milestones(output)]
    assert written["num_steps"] == written["milestones"][-1]["step"] == 12 and written["num_tokens"] == 12 * 256
    record = read_run_record(output)
    (output / "run.json").unlink()
    assert read_run_record(output) == record, "the same facts from training.yaml"


@pytest.mark.parametrize(("record", "message"), [("{}", "has no step"), ("[]", "damaged, not a JSON object")])
def test_a_milestone_without_a_step_is_named(tmp_path, record, message):
    (tmp_path / "milestones" / "step-1-token-1M").mkdir(parents=True)
    (tmp_path / "milestones" / "step-1-token-1M" / "provenance.json").write_text(record)
    with pytest.raises(InputError, match=rf"step-1-token-1M/provenance\.json: {message}"):
        list_milestones(tmp_path)


def test_an_early_run_is_scored(early_run):
    with pytest.raises(
        InputError, match=r"evaluate_at_milestones: 'watch'.*use off, and run `tinyllama-hf eval text RUN --watch`"
    ):
        load_pretrain_config(early_run / "training.yaml")
    before = contents(early_run)
    scores = score([str(early_run)], baselines=True, device="cpu", show_progress=False)
    assert [row.name for row in scores.models] == NAMES
    assert [row.bits_per_byte for row in scores.models] == pytest.approx([5.807368393255524, 5.640636664268547])
    counted = {(row.name, row.step): row.bits_per_byte for row in scores.baselines}
    assert counted == pytest.approx(
        {
            ("unigram", 6): 4.296213020720292,
            ("5-gram", 6): 3.4288782690963866,
            ("unigram", 12): 4.271312810424004,
            ("5-gram", 12): 2.957762571368068,
        }
    )
    lines: list[str] = []
    watch(early_run, "cpu", early_run.parent / "scores.json", 0.1, lines.append)
    assert [line.split()[-1] for line in lines] == NAMES
    assert contents(early_run) == before


def test_an_early_run_is_reported_and_published(early_run, online):
    before = contents(early_run)
    page = write_report(early_run, Path("report")).read_text()
    assert all(fact in page for fact in ("100% data", "2 milestones", f"{NAMES[1]} was created on"))
    publish(early_run, "demo/early")
    published = files_on_hub(online, "demo/early")
    assert published.keys() == {"main", *NAMES}
    for branch, folder in [*zip(NAMES, NAMES, strict=True), ("main", NAMES[1])]:
        for file in ("model.safetensors", "tokenizer.json", "config.json"):
            assert published[branch][file] == before[f"milestones/{folder}/{file}"]
    assert contents(early_run) == before


def test_the_record_of_an_early_run(early_run):
    record = read_run_record(early_run)
    assert isinstance(record, RunRecord) and record.sources[0].fingerprint == FINGERPRINT
    assert [(m.step, m.tokens, m.name) for m in record.milestones] == [(6, 1536, NAMES[0]), (12, 3072, NAMES[1])]


def test_an_early_run_without_milestones_or_optional_keys(early_run):
    """Its recipe lacks keys that a recipe of another version may lack."""
    shutil.rmtree(early_run / "milestones")
    recipe = yaml.safe_load((early_run / "training.yaml").read_text())
    del recipe["data"]["mixture_changes"], recipe["training"]["batch_changes"], recipe["milestones"]["steps"]
    (early_run / "training.yaml").write_text(yaml.safe_dump(recipe | {"a_later_section": {}}))
    record = read_run_record(early_run)
    assert record.sources[0].fingerprint is None and record.num_steps == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, r"run\.json: format_version 2"),
        ({"format_version": None}, r"run\.json: format_version None"),
        ({"milestones": [{"step": 1}]}, r"run\.json: damaged"),
        ({"sources": None}, r"run\.json: damaged"),
        ({"something": 1}, r"run\.json: damaged"),
    ],
)
def test_a_record_that_cannot_be_read(recipe, change, message):
    output = run(recipe, "training.total_tokens=1024", "milestones.tokens=[]")
    values = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps(values | change))
    with pytest.raises(InputError, match=message):
        read_run_record(output)


@pytest.mark.parametrize("text", ["a: [1", "model: {}", "- 1", ""])
def test_a_recipe_that_cannot_be_read(early_run, text):
    (early_run / "training.yaml").write_text(text)
    with pytest.raises(InputError, match=r"training\.yaml: damaged"):
        read_run_record(early_run)
    with pytest.raises(InputError, match="is not a run folder"):
        read_run_record(early_run / "milestones")
