"""The comparison of runs matches their files: one resumed and scored, one still training, a branch, an early one."""

import itertools
import json
import re
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import write_recipe
from tests.pretrain.runs import pretrain, read_metrics, run, signal_after
from tests.report.test_plots import series
from tinyllama_hf.errors import InputError
from tinyllama_hf.evaluation.series import score
from tinyllama_hf.files import read_json
from tinyllama_hf.pretrain.config import load_pretrain_config
from tinyllama_hf.pretrain.loop import Hooks
from tinyllama_hf.pretrain.metrics import duration
from tinyllama_hf.pretrain.milestones import list_milestones
from tinyllama_hf.pretrain.setup import architecture, shapes_only
from tinyllama_hf.pretrain.signals import Stopped
from tinyllama_hf.report.comparison import write_comparison
from tinyllama_hf.report.run_names import name_runs


EARLY_RUN = Path(__file__).parents[1] / "pretrain" / "data" / "run_7775f20" / "run"
WIDER = (
    "model.overrides.hidden_size=128",
    "model.overrides.tie_word_embeddings=true",
    "schedule.peak=1.0e-2",
    "training.micro_batch_size=2",
)
RESULTS = ["run", "parameters", "tokens", "time of training", "tokens per second", "training loss", "validation loss"]


def stopped(recipe: Path, *overrides: str) -> Path:
    """A run that is stopped in the step after its first checkpoint, step 5 of 12."""
    config = load_pretrain_config(recipe, overrides)
    with pytest.raises(Stopped):
        pretrain(config, hooks=Hooks(after_checkpoint=signal_after(1, signal.SIGTERM)))
    return Path(config.output_dir)


@pytest.fixture(scope="module")
def finished(prepared, tokenizer_folder, tmp_path_factory) -> Path:
    """A run that logged every third step, was resumed after step 5, and is scored."""
    recipe = write_recipe(tmp_path_factory.mktemp("finished"), prepared, tokenizer_folder)
    overrides = ("logging.every_steps=3", "milestones.keep_training_state=true")
    stopped(recipe, *overrides)
    folder = run(recipe, *overrides)
    score([str(folder)], output=folder / "scores.json", show_progress=False)
    return folder


@pytest.fixture(scope="module")
def training(prepared, tokenizer_folder, tmp_path_factory) -> Path:
    """A wider run with tied embeddings that is not finished and has no milestone."""
    return stopped(write_recipe(tmp_path_factory.mktemp("training"), prepared, tokenizer_folder), *WIDER)


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "copy" / "run")


def compared(output: Path, *runs: Path) -> tuple[str, list[list[list[str]]]]:
    """The page without its picture, and the text of the cells of its tables."""
    page = write_comparison(runs, output, lambda line: None).read_text()
    page, pictures = re.subn('src="data:image/png;base64,[^"]+"', "", page)
    assert pictures == 1
    tables = [re.findall("<tr>(.*?)</tr>", part, re.DOTALL) for part in page.split("<table>")[1:]]
    cells = [[re.findall("<t[hd].*?>(.*?)</t[hd]>", row, re.DOTALL) for row in table] for table in tables]
    return page, [[[" ".join(re.sub("<.*?>", " ", cell).split()) for cell in row] for row in table] for table in cells]


def seconds(folder: Path, start: int = 0) -> float:
    """The time of the steps, from the logged rates."""
    rows = [row for row in read_metrics(folder) if "loss" in row]
    before = [start, *(row["tokens"] for row in rows[:-1])]
    return sum((row["tokens"] - b) / row["tokens_per_second"] for row, b in zip(rows, before, strict=True))


def last(folder: Path, key: str) -> float:
    return next(row[key] for row in reversed(read_metrics(folder)) if key in row)


def test_results(finished, training, tmp_path):
    page, [[head, *rows], _] = compared(tmp_path / "report", finished, training)
    assert "http" not in page and "not comparable" not in page
    milestone, scored = list_milestones(finished)[-1], read_json(finished / "scores.json")["models"][-1]
    config = load_pretrain_config(training.parent / "recipe.yaml", WIDER)
    expected = [
        (
            finished,
            sum(tensor.numel() for tensor in load_file(milestone / "model.safetensors").values()),
            3072,
            ["3,072", f"{last(finished, 'validation_loss'):.3f}"],
            f"{scored['bits_per_byte']:.3f} {milestone.name}, context 32",
        ),
        (
            training,
            sum(p.numel() for p in shapes_only(architecture(config, 512)).parameters()),
            1280,
            ["1,280 of 3,072", f"{last(training, 'validation_loss'):.3f} at 1,024 tokens"],
            "—",
        ),
    ]
    assert head == [*RESULTS, "bits per byte"]
    for row, (folder, parameters, tokens, (progress, validation), bits) in zip(rows, expected, strict=True):
        speed = f"{tokens / seconds(folder):,.0f}"
        assert row == [
            *(f"{folder.parent.name}/run {folder}", f"{parameters:,}", progress, duration(seconds(folder)), speed),
            *(f"{last(folder, 'loss'):.3f}", validation, bits),
        ]
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["index.html", "losses.png"]


def test_differences_of_the_recipes(finished, training, tmp_path):
    _, [_, differences] = compared(tmp_path / "report", finished, training)
    assert differences == [
        ["key", f"{finished.parent.name}/run", f"{training.parent.name}/run"],
        ["model.overrides.hidden_size", "64", "128"],
        ["model.overrides.tie_word_embeddings", "—", "true"],
        ["schedule.peak", "0.005", "0.01"],
        ["training.micro_batch_size", "4", "2"],
        ["milestones.keep_training_state", "true", "false"],
        ["logging.every_steps", "3", "1"],
    ]


def test_picture(finished, training, tmp_path, drawn):
    """A resumed run has the hours of both launches."""
    lines: list[str] = []
    write_comparison([finished, training], tmp_path / "report", lines.append)
    assert lines == [f"reading {finished}", f"reading {training}"]
    [figure] = drawn
    for folder in (finished, training):
        name, logged = f"{folder.parent.name}/run", read_metrics(folder)
        rows = [row for row in logged if "loss" in row]
        validations = [row for row in logged if "loss" not in row]
        for axes, unit in zip(figure.axes, ("tokens", "hours"), strict=True):
            place, losses = series(axes, name)
            assert losses == pytest.approx([row["loss"] for row in rows])
            validated, validation_losses = series(axes, f"{name}, validation")
            assert validation_losses == [row["validation_loss"] for row in validations]
            if unit == "tokens":
                assert place == [row["tokens"] for row in rows]
                assert validated == [row["tokens"] for row in validations]
            else:
                assert place[-1] == pytest.approx(seconds(folder) / 3600)
                assert all(0 < early < late for early, late in itertools.pairwise(place))
    assert series(figure.axes[1], f"{finished.parent.name}/run, validation")[0][-1] == pytest.approx(
        seconds(finished) / 3600
    )


def test_scores_of_different_texts_are_not_in_one_column(finished, copy, tmp_path):
    moved = {"path": "moved/prepared"}
    _edit(copy / "scores.json", lambda scores: scores["data"][0].update(moved))
    page, [results] = compared(tmp_path / "report", finished, copy)
    assert results[0][-1] == "bits per byte" and results[1][-1] == results[2][-1] != "—"
    assert "not comparable" not in page and "context 32, bfloat16" not in page
    _edit(copy / "scores.json", lambda scores: scores["models"][-1]["protocol"].update(dtype="bfloat16"))
    assert "context 32, bfloat16" in compared(tmp_path / "report", finished, copy)[0]
    _edit(copy / "scores.json", lambda scores: scores["models"][-1]["protocol"].update(dtype="float32"))

    _edit(copy / "scores.json", lambda scores: scores["data"][0].update(bytes=900, max_bytes=900))
    page, [results] = compared(tmp_path / "report", finished, copy)
    assert len(results[0]) == len(RESULTS) + 2 and "not comparable" in page, "a sample is another text"

    _edit(copy / "scores.json", lambda scores: scores["data"][0].update(fingerprint="other"))
    page, [results] = compared(tmp_path / "report", finished, copy)
    assert results[0][-2:] == ["bits per byte, text 1", "bits per byte, text 2"]
    assert results[1][-1] == results[2][-2] == "—" and results[1][-2] == results[2][-1] != "—"
    assert "Bits per byte of different texts are not comparable" in page and "moved/prepared" in page

    _edit(
        copy / "scores.json", lambda scores: scores.update(models=[], data=read_json(finished / "scores.json")["data"])
    )
    page, [results] = compared(tmp_path / "report", finished, copy)
    assert results[1][-1] != results[2][-1] == "—"


@pytest.mark.parametrize(
    ("file", "edit", "key"),
    [
        ("run.json", lambda record: record["sources"][0].update(fingerprint="other"), "data"),
        ("run.json", lambda record: record["sources"][0].update(weight=0.5), "data"),
        ("run.json", lambda record: record.update(sequence_length=16), "data.sequence_length"),
    ],
)
def test_losses_on_different_text_are_named(finished, copy, tmp_path, file, edit, key):
    _edit(copy / file, edit)
    page, _ = compared(tmp_path / "report", finished, copy)
    assert f"The losses are not comparable, since the runs differ in {key}.</b>" in page
    assert "The recipes are equal, except for" in page


def _edit(file: Path, change) -> None:
    contents = read_json(file)
    change(contents)
    file.write_text(json.dumps(contents))


def test_a_branch_and_a_run_without_checkpoints(finished, prepared, tokenizer_folder, copy, tmp_path):
    """A branch has the tokens of its base, and its own time; without a checkpoint its first interval is unknown."""
    milestone = list_milestones(finished)[0]
    base = read_json(milestone / "provenance.json")["tokens"]
    recipe = write_recipe(tmp_path, prepared, tokenizer_folder)
    branch = run(recipe, f"branch={{from: {milestone}, schedule: continue}}", "milestones.tokens=[]")
    _, [results, _] = compared(tmp_path / "report", branch, finished)
    assert results[1][2:4] == [f"3,072 from {base:,} on", duration(seconds(branch, base))]
    assert results[1][4] == f"{(3072 - base) / seconds(branch, base):,.0f}"

    shutil.rmtree(branch / "checkpoints")
    first = next(row["tokens"] for row in read_metrics(branch) if "loss" in row)
    _, [results, _] = compared(tmp_path / "report", branch, finished)
    assert results[1][2:4] == ["3,072", duration(seconds(branch, first))]


def test_a_damaged_or_missing_checkpoint_hides_no_run(training, tmp_path, finished):
    damaged = shutil.copytree(training, tmp_path / "damaged")
    for metadata in damaged.glob("checkpoints/*/.metadata"):
        metadata.write_bytes(b"x")
    _, [results, _] = compared(tmp_path / "report", damaged, finished)
    assert results[1][1] == "—" and results[2][1] != "—"


def test_an_early_run(finished, tmp_path):
    """Its recipe has values and lacks keys that a recipe of this version cannot."""
    early = shutil.copytree(EARLY_RUN, tmp_path / "early")
    page, [results, differences] = compared(tmp_path / "report", early, finished)
    assert results[1][0] == f"early {early}" and results[1][2] == "3,072"
    assert ["evaluate_at_milestones", "watch", "off"] in differences
    assert "since the runs differ in data" in page


def test_names_are_different(tmp_path):
    folders = [tmp_path / name for name in ("a/x/run", "b/x/run", "other")]
    for folder in folders:
        folder.mkdir(parents=True)
    assert list(name_runs(folders[1:])) == ["run", "other"]
    names = ["a/x/run", "b/x/run", f"{tmp_path.parent.name}/{tmp_path.name}/other"]
    assert name_runs(folders) == dict(zip(names, folders, strict=True))
    with pytest.raises(InputError, match=r"a/x/../x/run: is given twice"):
        name_runs([*folders, tmp_path / "a" / "x" / ".." / "x" / "run"])
    with pytest.raises(InputError, match="nowhere: no such folder"):
        name_runs([folders[0], tmp_path / "nowhere"])
    many = [tmp_path / str(number) for number in range(11)]
    for folder in many:
        folder.mkdir()
    assert len(name_runs(many[:10])) == 10
    with pytest.raises(InputError, match="11 runs: a comparison has at most 10"):
        name_runs(many)


def test_refusals(finished, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="empty: is not a run folder"):
        compared(tmp_path / "report", finished, empty)
    (empty / "training.yaml").write_text((finished / "training.yaml").read_text())
    with pytest.raises(InputError, match=r"metrics\.jsonl is missing"):
        compared(tmp_path / "report", finished, empty)
    (empty / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="empty: no training step is logged yet"):
        compared(tmp_path / "report", finished, empty)
    shutil.copy(finished / "run.json", empty)
    (empty / "training.yaml").write_text("a: [1")
    with pytest.raises(InputError, match=r"training\.yaml: damaged"):
        compared(tmp_path / "report", finished, empty)
    assert not (tmp_path / "report").exists()
    (tmp_path / "report").write_text("")
    with pytest.raises(InputError, match="report is a file"):
        compared(tmp_path / "report", finished, empty)
