"""An untrusted run folder cannot run code, from any of its files. The payload is a real command."""

import io
import json
import os
import pickle
import shutil
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from tests.conftest import write_recipe
from tests.pretrain.runs import run
from tinyllama_hf.errors import InputError
from tinyllama_hf.pretrain.checkpoints import find_damage
from tinyllama_hf.pretrain.milestones import list_milestones


SHORT = (
    "training.total_tokens=768",
    "milestones.tokens=[512]",
    "milestones.keep_training_state=true",
    "validation.every_tokens=768",
    "schedule.warmup_tokens=0",
)
SETTING, TENSOR = "optimizer.param_groups.0.lr", "guards.counted"


@pytest.fixture(scope="module")
def base(prepared, tokenizer_folder, tmp_path_factory) -> Path:
    """A run of three steps with a checkpoint after the second and the third."""
    return run(write_recipe(tmp_path_factory.mktemp("base"), prepared, tokenizer_folder), *SHORT)


class Checkpoint:
    """The checkpoint after step 2 of a copied run, from which a resumed run and a branch start."""

    def __init__(self, base: Path, folder: Path):
        self.run, self.mark = folder / "run", folder / "mark"
        shutil.copytree(base, self.run)
        shutil.rmtree(self.run / "checkpoints" / "step-3")
        self.path = self.run / "checkpoints" / "step-2"
        (self.data,) = self.path.glob("*.distcp")

    @property
    def metadata(self) -> Metadata:
        return pickle.loads((self.path / ".metadata").read_bytes())

    def write(self, metadata: object) -> None:
        (self.path / ".metadata").write_bytes(pickle.dumps(metadata))

    def append(self, index: MetadataIndex, metadata: Metadata) -> None:
        """Appends an entry that runs a command to the data."""
        payload = io.BytesIO()
        torch.save(self, payload)
        offset = self.data.stat().st_size
        with self.data.open("ab") as file:
            file.write(payload.getvalue())
        metadata.storage_data[index] = _StorageInfo(self.data.name, offset, len(payload.getvalue()))
        self.write(metadata)

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)

    def seal(self) -> None:
        """Updates the sizes and checksums in the record, here and in the training state of the milestone."""
        record = json.loads((self.path / "checkpoint.json").read_text())
        for name in record["files"]:
            data = (self.path / name).read_bytes()
            record["files"][name] = [len(data), zlib.crc32(data)]
        (self.path / "checkpoint.json").write_text(json.dumps(record))
        assert find_damage(self.path) is None
        state = self.run / "training_state" / list_milestones(self.run)[0].name
        shutil.rmtree(state)
        shutil.copytree(self.path, state)


@pytest.fixture
def checkpoint(base, tmp_path) -> Checkpoint:
    return Checkpoint(base, tmp_path)


def metadata_that_calls(checkpoint: Checkpoint) -> str:
    checkpoint.write(checkpoint)
    return r"\.metadata: .*posix\.system"


def metadata_that_holds_a_call(checkpoint: Checkpoint) -> str:
    metadata = checkpoint.metadata
    metadata.planner_data = [checkpoint]
    checkpoint.write(metadata)
    return r"\.metadata: .*posix\.system"


def metadata_that_leads_out(checkpoint: Checkpoint) -> str:
    metadata = checkpoint.metadata
    for entry in metadata.storage_data.values():
        entry.relative_path = f"../step-2/{entry.relative_path}"
    checkpoint.write(metadata)
    return r"\.metadata: names '\.\./step-2/.*distcp'"


def no_metadata_at_all(checkpoint: Checkpoint) -> str:
    checkpoint.write([1])
    return r"\.metadata: not valid checkpoint metadata"


def entry_in_place_of_a_tensor(checkpoint: Checkpoint) -> str:
    metadata = checkpoint.metadata
    metadata.state_dict_metadata[TENSOR] = BytesStorageMetadata()
    checkpoint.append(MetadataIndex(TENSOR), metadata)
    return rf"distcp: {TENSOR} is not a tensor"


def tensor_that_is_a_call(checkpoint: Checkpoint) -> str:
    metadata = checkpoint.metadata
    index = next(index for index in metadata.storage_data if index.fqn == TENSOR)
    checkpoint.append(index, metadata)
    return r": cannot be loaded \(UnpicklingError"


HARM = [
    metadata_that_calls,
    metadata_that_holds_a_call,
    metadata_that_leads_out,
    no_metadata_at_all,
    entry_in_place_of_a_tensor,
    tensor_that_is_a_call,
]


@pytest.mark.parametrize(
    ("way", "harm"),
    [*(("resume", harm) for harm in HARM), ("branch", metadata_that_calls), ("branch", entry_in_place_of_a_tensor)],
)
def test_nothing_runs(checkpoint, recipe, way, harm):
    message = harm(checkpoint)
    checkpoint.seal()
    branch = f"branch={{from: {list_milestones(checkpoint.run)[0]}, schedule: continue}}"
    asked = [f"output_dir={checkpoint.run}2", branch] if way == "branch" else [f"output_dir={checkpoint.run}"]
    with pytest.raises(InputError, match=message):
        run(recipe, *SHORT, *asked)
    assert not checkpoint.mark.exists()


def test_settings_in_the_file_are_not_read(checkpoint, recipe):
    """Only the moments of the optimizer are loaded; its settings are those of the recipe."""
    checkpoint.append(MetadataIndex(SETTING), checkpoint.metadata)
    checkpoint.seal()
    run(recipe, *SHORT, f"output_dir={checkpoint.run}")
    assert not checkpoint.mark.exists() and (checkpoint.run / "checkpoints" / "step-3").is_dir()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("harm", [metadata_that_holds_a_call, entry_in_place_of_a_tensor])
def test_torch_still_runs_what_a_checkpoint_names(checkpoint, harm):
    """Why `checkpoint_reader.py` exists (torch 2.13). Remove it when this fails. Also shows that the payload works."""
    harm(checkpoint)
    dcp.load({"guards": {"counted": torch.zeros((), dtype=torch.int64)}}, checkpoint_id=checkpoint.path, no_dist=True)
    assert checkpoint.mark.exists()


@pytest.mark.parametrize(
    ("key", "value"), [("files", ["a"]), ("files", {"../a": [1, 1]}), ("step", "2"), ("identity", None)]
)
def test_a_record_of_another_shape_is_damaged(checkpoint, key, value):
    record = json.loads((checkpoint.path / "checkpoint.json").read_text())
    (checkpoint.path / "checkpoint.json").write_text(json.dumps(record | {key: value}))
    assert "checkpoint.json" in find_damage(checkpoint.path)
