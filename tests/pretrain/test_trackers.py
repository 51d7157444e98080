"""Trackers through accelerate: logged values can be read back, also after a resume."""

import importlib.util
import json
import os
import signal
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate import Accelerator

from tests.conftest import ROOT
from tests.pretrain.runs import pretrain, read_metrics
from tests.pretrain.test_resume import signal_after
from tinyllama_hf.errors import InputError
from tinyllama_hf.pretrain.config import load_pretrain_config
from tinyllama_hf.pretrain.loop import Hooks
from tinyllama_hf.pretrain.metrics import RUN_ID_FILE, row_values, start_trackers
from tinyllama_hf.pretrain.signals import Stopped


def scalars(run: Path, name: str) -> list[tuple[int, float]]:
    """The steps and values that tensorboard shows, in its order."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [folder] = (run / "tensorboard").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def train_and_resume(recipe: Path, tracker: str, folder: Path) -> Path:
    """A stopped and resumed run, in two processes; the first one, with `-c`, sends itself a signal."""
    code = (
        "import sys, signal; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from tests.pretrain.test_resume import signal_after\n"
        "from tinyllama_hf.pretrain.config import load_pretrain_config\n"
        "from tinyllama_hf.pretrain.loop import Hooks\n"
        "from tests.pretrain.runs import pretrain\n"
        "from tinyllama_hf.pretrain.signals import Stopped\n"
        "config = load_pretrain_config(sys.argv[2], [f'logging.trackers=[{sys.argv[3]}]'])\n"
        "try: pretrain(config, hooks=Hooks(after_checkpoint=signal_after(1, signal.SIGTERM)))\n"
        "except Stopped: print('stopped')\n"
    )
    own = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio")}
    for goes_on in (False, True):
        command = [sys.executable, "-c", code, str(ROOT), str(recipe), tracker]
        if goes_on:
            command = [
                sys.executable,
                str(ROOT / "recipes" / "pretrain.py"),
                str(recipe),
                f"logging.trackers=[{tracker}]",
            ]
        done = subprocess.run(command, cwd=folder, env=os.environ | own, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and ("stopped" in done.stdout) != goes_on, done.stderr
    return recipe.parent / "run"


def test_tensorboard_across_a_resume(recipe):
    pytest.importorskip("tensorboard")
    config = load_pretrain_config(recipe, ["logging.trackers=[tensorboard]"])
    with pytest.raises(Stopped):
        pretrain(config, hooks=Hooks(after_checkpoint=signal_after(1, signal.SIGTERM)))
    pretrain(config)
    run = Path(config.output_dir)
    rows = {row["step"]: row["loss"] for row in read_metrics(run) if "loss" in row}
    assert dict(scalars(run, "loss")) == pytest.approx(rows)
    assert {step for step, _ in scalars(run, "validation_loss")} == {4, 6, 8, 12}


def started_folder(recipe: Path, output: Path) -> str:
    """Where a launch in a folder writes its tensorboard files, relative to it."""
    accelerator = Accelerator(cpu=True, log_with=["tensorboard"], project_dir=output)
    start_trackers(accelerator, load_pretrain_config(recipe), ["tensorboard"], output)
    accelerator.end_training()
    folders = {file.parent for file in output.rglob("events.out.tfevents.*")}
    [folder] = [folder for folder in folders if folder.parent not in folders]  # settings are in a folder below
    return folder.relative_to(output).as_posix()


def test_tensorboard_shows_the_name_of_each_run(recipe, tmp_path):
    """Also if runs have folders of one name. A run keeps its name when its folder is renamed, and so do early runs."""
    pytest.importorskip("tensorboard")
    names = []
    for output in (tmp_path / "a" / "my-run", tmp_path / "b" / "my-run"):
        output.mkdir(parents=True)
        names.append(started_folder(recipe, output))
        run_id = json.loads((output / RUN_ID_FILE).read_text())["id"]
        assert names[-1] == f"tensorboard/my-run-{run_id}"
    assert names[0] != names[1]
    assert started_folder(recipe, (tmp_path / "a" / "my-run").rename(tmp_path / "renamed")) == names[0]
    early = tmp_path / "early"
    (early / "tinyllama_hf").mkdir(parents=True)
    assert started_folder(recipe, early) == "tinyllama_hf"


def test_tensorboard_shows_a_step_once_that_a_killed_process_had_logged(recipe, tmp_path):
    """Steps 1 to 5, of which a checkpoint kept 3: the second process logs 4 and 5 again."""
    pytest.importorskip("tensorboard")
    config = load_pretrain_config(recipe, ["logging.trackers=[tensorboard]"])
    for goes_on_after, steps in ((0, range(1, 6)), (3, range(4, 8))):
        accelerator = Accelerator(log_with=["tensorboard"], project_dir=tmp_path)
        start_trackers(accelerator, config, config.logging.trackers, tmp_path, goes_on_after)
        for step in steps:
            accelerator.log({"loss": 10 * goes_on_after + step}, step=step)
        accelerator.end_training()
    assert scalars(tmp_path, "loss") == [(1, 1), (2, 2), (3, 3), (4, 34), (5, 35), (6, 36), (7, 37)]


@pytest.mark.slow
def test_wandb_goes_on_in_the_same_run(recipe, tmp_path):
    """Offline: two folders with one id, which `wandb sync` joins, in the folder of the run."""
    pytest.importorskip("wandb")
    run = train_and_resume(recipe, "wandb", tmp_path)
    run_id = json.loads((run / RUN_ID_FILE).read_text())["id"]
    logs = sorted((run / "wandb").glob("offline-run-*"))
    assert len(logs) == 2 and all((log / f"run-{run_id}.wandb").stat().st_size > 0 for log in logs)
    assert not (tmp_path / "wandb").exists()
    logged = [row for log in logs for row in wandb_history(log / f"run-{run_id}.wandb") if "loss" in row]
    rows = [row for row in read_metrics(run) if "loss" in row]
    assert [(row["_step"], row["loss"]) for row in logged] == [(row["step"], row["loss"]) for row in rows]


def wandb_history(log: Path) -> list[dict]:
    """The rows of an offline log: after 7 bytes, LevelDB's blocks of 32 KiB with records in one or several parts."""
    from wandb.proto.wandb_internal_pb2 import Record

    contents, position, record, rows = log.read_bytes(), 7, b"", []
    while position + 7 <= len(contents):
        if (left := -position % 32768) and left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", contents, position)
        record += contents[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            parsed, record = Record.FromString(record), b""
            if parsed.HasField("history"):
                rows.append({item.nested_key[0]: json.loads(item.value_json) for item in parsed.history.item})
    return rows


@pytest.mark.slow
def test_trackio_goes_on_in_the_same_run(recipe, tmp_path):
    pytest.importorskip("trackio")
    run = train_and_resume(recipe, "trackio", tmp_path)
    run_id = json.loads((run / RUN_ID_FILE).read_text())["id"]
    with sqlite3.connect(tmp_path / "trackio" / "tinyllama_hf.db") as database:
        logged = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, _, _ in logged} == {f"run-{run_id}"}
    losses = {step: json.loads(values)["loss"] for _, step, values in logged if "loss" in json.loads(values)}
    assert losses == pytest.approx({row["step"]: row["loss"] for row in read_metrics(run) if "loss" in row})


def test_wandb_without_a_login_is_bad_input(recipe, tmp_path):
    pytest.importorskip("wandb")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "pretrain.py"), str(recipe), "logging.trackers=[wandb]"],
        env=clean | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and "error: logging.trackers: wandb: cannot be started (UsageError" in done.stderr
    assert not (recipe.parent / "run" / "metrics.jsonl").exists(), "before the first step"


def test_a_run_that_is_overwritten_begins_another(recipe):
    """By another id: wandb discards rows of steps that the old run already has."""
    pytest.importorskip("tensorboard")
    config = load_pretrain_config(recipe, ["logging.trackers=[tensorboard]"])
    file = Path(config.output_dir) / RUN_ID_FILE
    with pytest.raises(Stopped):
        pretrain(config, hooks=Hooks(after_checkpoint=signal_after(1, signal.SIGTERM)))
    first = file.read_text()
    pretrain(config)
    assert file.read_text() == first
    pretrain(config, overwrite=True)
    assert file.read_text() != first


def test_settings_name_no_place_of_this_machine(recipe, tmp_path, monkeypatch):
    """Some trackers upload them."""
    sent = {}
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, project, settings, **_: sent.update(settings))
    config = load_pretrain_config(recipe, ["logging.trackers=[tensorboard]"])
    assert str(tmp_path) in str(config.model_dump(mode="json"))
    start_trackers(Accelerator(cpu=True), config, config.logging.trackers, tmp_path)
    assert sent["output_dir"] == Path(config.output_dir).name
    assert sent["training.total_tokens"] == config.training.total_tokens
    assert str(tmp_path) not in str(sent)


def test_a_missing_package_is_known_before_the_first_step(recipe):
    missing = [name for name in ("trackio", "wandb") if importlib.util.find_spec(name) is None]
    if not missing:
        pytest.skip("all trackers are installed here")
    with pytest.raises(InputError, match=rf"needs the package {missing[0]}: pip install 'tinyllama_hf\[trackers\]'"):
        pretrain(load_pretrain_config(recipe, [f"logging.trackers=[{missing[0]}]"]))
    assert not (recipe.parent / "run").exists()


def test_rows_are_flat():
    row = {"step": 3, "loss": 1.5, "mfu": None, "blocks": [0, 8], "validation_loss_by_source": {"a": 2.0}}
    assert row_values(row) == {"loss": 1.5, "validation_loss_by_source.a": 2.0}
