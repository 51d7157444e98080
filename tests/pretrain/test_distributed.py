"""Several processes (DistributedDataParallel, FSDP2, hybrid sharding), over gloo on CPUs.

Reference: one process."""

import datetime
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file

from tests.conftest import ROOT, write_recipe
from tests.pretrain.runs import pretrain, read_metrics
from tinyllama_hf.errors import InputError
from tinyllama_hf.pretrain import launch
from tinyllama_hf.pretrain.config import load_pretrain_config
from tinyllama_hf.pretrain.milestones import list_milestones


# A small rate: AdamW's first steps are of the size of the rate for any gradient, and amplify rounding.
QUIET = ["schedule.peak=1e-4", "schedule.floor=1e-5", "training.micro_batch_size=2"]
PORT = iter(range(29510, 29600))


def launched(recipe: Path, config: str, processes: int, *overrides: str, options: tuple[str, ...] = ()) -> str:
    """Runs a recipe through `accelerate launch` on CPUs, and returns what it printed."""
    command = [
        Path(sys.executable).parent / "accelerate",
        "launch",
        "--quiet",
        "--config_file",
        ROOT / "recipes" / "accelerate" / config,
        "--num_processes",
        processes,
        "--num_machines",
        1,
        "--main_process_port",
        next(PORT),
        *options,
        ROOT / "recipes" / "pretrain.py",
        recipe,
        *overrides,
    ]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(c) for c in command], env=env, cwd=recipe.parent, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert f"{processes} process(es)" in done.stdout
    return done.stdout


def run(recipe: Path, *overrides: str) -> Path:
    config = load_pretrain_config(recipe, overrides)
    pretrain(config)
    return Path(config.output_dir)


def largest_difference(a: Path, b: Path) -> float:
    """The largest difference between the weights of the milestones, which must be the same ones."""
    folders = [list_milestones(x) for x in (a, b)]
    assert [f.name for f in folders[0]] == [f.name for f in folders[1]]
    pairs = [[load_file(f / "model.safetensors") for f in pair] for pair in zip(*folders, strict=True)]
    assert all(x.keys() == y.keys() for x, y in pairs)
    return max((x[name] - y[name]).abs().max().item() for x, y in pairs for name in x)


@pytest.mark.parametrize("sharded", [False, True])
def test_processes_wait_two_hours_for_each_other(recipe, monkeypatch, sharded):
    """Scoring a milestone may take longer than the default timeouts of ten minutes (nccl) and half an hour (gloo)."""

    class Reached(Exception):
        pass

    given = []

    def init_process_group(**options):
        given.append(options.get("timeout"))
        raise Reached

    env = {
        "ACCELERATE_USE_CPU": "true",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29499",
        "ACCELERATE_USE_FSDP": str(sharded).lower(),
    }
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", init_process_group)
    for state in (AcceleratorState, PartialState):
        monkeypatch.setattr(state, "_shared_state", {})
    with pytest.raises(Reached):
        launch.make_accelerator(load_pretrain_config(recipe))
    assert given == [datetime.timedelta(hours=2)]


def rows(output: Path, *names: str) -> list[list]:
    return [[row[name] for name in names] for row in read_metrics(output) if "loss" in row]


def column(output: Path, name: str) -> list[float]:
    return [row[name] for row in read_metrics(output) if "loss" in row]


@pytest.fixture(scope="module")
def recipe_of_module(prepared, tokenizer_folder, tmp_path_factory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("distributed"), prepared, tokenizer_folder)


@pytest.fixture(scope="module")
def one(recipe_of_module) -> Path:
    """A run of one process."""
    return run(recipe_of_module, *QUIET, f"output_dir={recipe_of_module.parent / 'one'}")


HYBRID = ("--parallelism_config_dp_replicate_size", "2", "--parallelism_config_dp_shard_size", "2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "processes", "options"),
    [("cpu2.yaml", 2, ()), ("fsdp2.yaml", 2, ()), ("hybrid.yaml", 4, HYBRID)],
    ids=["ddp", "fsdp2", "hybrid"],
)
def test_equals_one_process(recipe_of_module, one, config, processes, options):
    """Milestones within 1e-6, the same blocks and losses; then one process resumes the checkpoint of several."""
    output = recipe_of_module.parent / config
    launched(recipe_of_module, config, processes, *QUIET, f"output_dir={output}", options=options)
    assert rows(output, "step", "tokens", "learning_rate", "blocks", "block_ids") == rows(
        one, "step", "tokens", "learning_rate", "blocks", "block_ids"
    )
    for name in ("loss", "gradient_norm"):
        assert column(output, name) == pytest.approx(column(one, name), abs=2e-5)
    assert largest_difference(one, output) < 1e-6
    newest = output / "checkpoints" / "step-12"
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    run(recipe_of_module, *QUIET, f"output_dir={output}")
    assert largest_difference(one, output) < 1e-6


@pytest.mark.slow
def test_resumed_sharded_from_one_process(recipe_of_module, one):
    """The reverse: a checkpoint of one process is resumed on two, sharded, with a warning about rounding."""
    output = recipe_of_module.parent / "one-then-two"
    run(recipe_of_module, *QUIET, f"output_dir={output}")
    for path in (output / "checkpoints" / "step-12").iterdir():
        path.unlink()
    (output / "checkpoints" / "step-12").rmdir()
    printed = launched(recipe_of_module, "fsdp2.yaml", 2, *QUIET, f"output_dir={output}")
    assert "step 8: resuming" in printed
    assert re.search(r"only within rounding \(processes: was 1, is 2", printed)
    assert largest_difference(one, output) < 1e-6
    assert rows(output, "block_ids") == rows(one, "block_ids")


@pytest.mark.slow
def test_sharded_in_bf16(recipe_of_module):
    """Weights are gathered in bf16, gradients reduced in fp32; the milestone is fp32, close to the unsharded one."""
    folder = recipe_of_module.parent
    settings = ["training.precision=bf16", "training.micro_batch_size=2"]
    sharded = folder / "sharded-bf16"
    launched(recipe_of_module, "fsdp2.yaml", 2, *settings, f"output_dir={sharded}")
    single = run(recipe_of_module, *settings, f"output_dir={folder / 'single-bf16'}")
    losses = [column(x, "loss") for x in (single, sharded)]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)
    assert {t.dtype for t in load_file(list_milestones(sharded)[-1] / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda p: p.name)
def test_configurations_leave_the_recipe_its_decisions(path):
    """accelerate reads each of them, and none sets what belongs to a recipe."""
    from accelerate.commands.config.config_args import load_config_from_file

    values = yaml.safe_load(path.read_text())
    assert load_config_from_file(str(path)).num_processes == values["num_processes"]
    assert (values["mixed_precision"], values["dynamo_backend"]) == ("no", "no")
    assert "gradient_accumulation_steps" not in values
    assert not values.get("fsdp_config", {}).get("fsdp_activation_checkpointing")
    assert f"recipes/accelerate/{path.name}" in path.read_text().split("compute_environment")[0]


class TestRefusals:
    def test_sharding_of_the_first_version(self, recipe, monkeypatch):
        for name, value in (("USE_CPU", "true"), ("USE_FSDP", "true")):
            monkeypatch.setenv(f"ACCELERATE_{name}", value)
        monkeypatch.setenv("FSDP_VERSION", "1")
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            with pytest.raises(InputError, match="fsdp_version: 2"):
                launch.make_accelerator(load_pretrain_config(recipe))
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["training.attention=flash_attention_3"], "flash_attention_3 needs a GPU"),
            (["training.attention=flex"], "flex has no backward pass on a CPU"),
            (["training.kernels=liger"], "liger needs a GPU"),
        ],
    )
    def test_what_a_cpu_cannot_do(self, recipe, overrides, message):
        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
        with pytest.raises(InputError, match=message):
            run(recipe, *overrides)
        assert not (recipe.parent / "run").exists()

    def test_batches_that_do_not_divide_after_a_change(self, recipe):
        changes = "training.batch_changes=[{from_tokens: 1024, tokens_per_step: 352}]"
        with pytest.raises(
            InputError, match=r"4 x 1 processes does not divide the 11 sequences of a step\. Use 1, 11"
        ):
            run(recipe, changes)


def test_flex_backward_is_still_missing_on_a_cpu():
    """The reason for refusing `flex` there (torch 2.13); when this fails, remove the refusal."""
    from torch.nn.attention.flex_attention import flex_attention

    q = torch.randn(1, 1, 16, 16, requires_grad=True)
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        flex_attention(q, q, q)


@pytest.mark.parametrize("setting", ["layers", "model"])
@pytest.mark.slow
def test_compiled_equals_eager(recipe, tmp_path, setting):
    if not launch.resolve_compile("auto", torch.device("cuda"))[0]:
        pytest.skip("needs a C++ compiler")
    eager, compiled = (
        run(recipe, f"output_dir={tmp_path / name}", f"training.compile={name}", *QUIET) for name in ("off", setting)
    )
    assert largest_difference(eager, compiled) < 1e-5


def test_activation_checkpointing_changes_nothing(recipe, tmp_path):
    a, b = (
        run(recipe, f"output_dir={tmp_path / x}", f"training.activation_checkpointing={x}") for x in ("true", "false")
    )
    assert largest_difference(a, b) == 0
