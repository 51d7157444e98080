"""Resuming: a run that was stopped or killed at any time has the numbers of an uninterrupted one, bit for bit."""

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import get_state_dict

from tests.conftest import ROOT, limited_files, write_recipe
from tests.pretrain.runs import assert_same_run, exact_rows, read_metrics, run, signal_after
from tinyllama_hf import TinyLlamaForCausalLM, load_tokenizer
from tinyllama_hf.data.prepare import prepare
from tinyllama_hf.data.shards import TokenDataset, read_metadata
from tinyllama_hf.errors import InputError
from tinyllama_hf.pretrain import checkpoints, setup
from tinyllama_hf.pretrain.checkpoints import FullDiskError
from tinyllama_hf.pretrain.config import load_pretrain_config
from tinyllama_hf.pretrain.loop import Hooks
from tinyllama_hf.pretrain.metrics import METRICS_FILE, Metrics
from tinyllama_hf.pretrain.milestones import list_milestones
from tinyllama_hf.pretrain.resume import check_same_run, identity
from tinyllama_hf.pretrain.run_record import record_of_recipe
from tinyllama_hf.pretrain.schedule import learning_rate
from tinyllama_hf.pretrain.signals import Stopped
from tinyllama_hf.pretrain.step import TrainStep
from tinyllama_hf.tokenization_tinyllama import tokenizer_fingerprint


class TestGoingOn:
    def test_a_finished_run_does_nothing(self, recipe, output, capsys):
        before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
        run(recipe)
        assert "the run is finished" in capsys.readouterr().out
        assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}

    def test_rows_beyond_the_checkpoint_are_cut(self, recipe, output, uninterrupted):
        shutil.rmtree(output / "checkpoints" / "step-12")
        with (output / "metrics.jsonl").open("a") as file:
            file.write('{"step": 13, "tok')  # what a killed process leaves
        assert_same_run(run(recipe), uninterrupted)

    def test_from_the_start_if_killed_before_the_first_checkpoint(self, recipe, uninterrupted):
        output = run(recipe)
        shutil.rmtree(output / "checkpoints")
        for folder in list_milestones(output)[1:]:
            shutil.rmtree(folder)
        assert_same_run(run(recipe), uninterrupted)

    def test_rows_of_later_steps_are_removed(self, tmp_path):
        rows = [{"step": step, "text": "x" * (step % 700)} for step in range(1, 2001) for _ in range(1 + step % 2)]
        whole = "".join(json.dumps(row) + "\n" for row in rows)
        for step, torn in itertools.product((0, 1, 2, 999, 1999, 2000, 3000), ("", '{"step": 2001, "te')):
            (tmp_path / METRICS_FILE).write_text(whole + torn)
            Metrics(tmp_path, 1, True, step).__exit__()
            assert read_metrics(tmp_path) == [row for row in rows if row["step"] <= step]

    def test_a_milestone_of_another_recipe_is_not_replaced(self, recipe):
        output = run(recipe, "milestones.tokens=[]")
        shutil.rmtree(output / "checkpoints")
        with pytest.raises(InputError, match="of another recipe"):
            run(recipe, "milestones.tokens=[]", "schedule.peak=1e-3")

    def test_other_micro_batches_read_the_same_blocks(self, recipe, output, uninterrupted, capsys):
        shutil.rmtree(output / "checkpoints" / "step-12")
        run(recipe, "training.micro_batch_size=2")
        assert "only within rounding (micro_batch_size: was 4, is 2)" in capsys.readouterr().out
        rows = [[row["block_ids"] for row in read_metrics(x) if "loss" in row] for x in (output, uninterrupted)]
        assert rows[0] == rows[1]
        losses = [[row["loss"] for row in read_metrics(x) if "loss" in row] for x in (output, uninterrupted)]
        assert losses[0] == pytest.approx(losses[1], abs=2e-5)

    def test_over_the_end_of_an_epoch_and_through_spikes(self, recipe, corpus, tokenizer_folder, tmp_path):
        """Three epochs of little data, at a rate so low that noise counts as spikes, so the guard has state."""
        data = tmp_path / "little"
        prepare(
            [str(corpus)],
            tokenizer_folder,
            data,
            validation_fraction=0.1,
            sample_fraction=0.1,
            workers=1,
            progress=False,
        )
        settings = [
            "training.total_tokens=51_200",
            "training.skip_spikes_sigma=0.5",
            "training.micro_batch_size=8",
            "model.overrides.num_hidden_layers=1",
            "checkpoints.every_tokens=12_800",
            "validation.every_tokens=51_200",
            "schedule.peak=1e-6",
            "schedule.floor=0",
            f"data.sources=[{{path: {data}, weight: 1}}]",
        ]
        whole = run(recipe, *settings, f"output_dir={tmp_path / 'whole'}")
        with pytest.raises(Stopped):
            run(recipe, *settings, hooks=Hooks(after_checkpoint=signal_after(4, signal.SIGTERM)))
        assert_same_run(run(recipe, *settings), whole)
        skipped = [row["skipped_steps"] for row in read_metrics(whole) if "loss" in row]
        assert set(skipped[:128]) == {0} and 0 < skipped[-1] < 72
        epochs = 1600 / len(TokenDataset(data, 32))
        assert epochs > 2

    def test_through_changes_of_mixture_and_batch(self, recipe, prepared, corpus, tokenizer_folder, tmp_path):
        """The three stages of v1.1, small: stopped within the ramp and resumed, equal; the batch grows on time."""
        other = tmp_path / "other"
        prepare([str(corpus)], tokenizer_folder, other, validation_fraction=0.2, workers=1, progress=False)
        settings = [
            f"data.sources=[{{path: {prepared}, weight: 1.0}}, {{path: {other}, weight: 0.0}}]",
            "data.mixture_changes=[{from_tokens: 1024, ramp_tokens: 1024, weights: [0.25, 0.75]}]",
            "training.batch_changes=[{from_tokens: 2048, tokens_per_step: 512}]",
            "training.total_tokens=4096",
        ]
        whole = run(recipe, *settings, f"output_dir={tmp_path / 'whole'}")
        with pytest.raises(Stopped, match="after step 5"):
            run(recipe, *settings, hooks=Hooks(after_checkpoint=signal_after(1, signal.SIGTERM)))
        assert_same_run(run(recipe, *settings), whole)
        tokens = [row["tokens"] for row in read_metrics(whole) if "loss" in row]
        assert tokens == [256 * n for n in range(1, 9)] + [2560, 3072, 3584, 4096]
        losses = [row["validation_loss_by_source"] for row in read_metrics(whole) if "validation_loss" in row]
        assert all(len(by_source) == 2 for by_source in losses)

    def test_last_k_stay(self, output):
        assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step-12", "step-8"]


class TestDamage:
    @pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "record"])
    def test_falls_back_to_the_newest_complete_one_and_says_so(self, recipe, output, uninterrupted, capsys, harm):
        newest = output / "checkpoints" / "step-12"
        part = next(newest.glob("*.distcp"))
        data = bytearray(part.read_bytes())
        if harm == "truncate":
            part.write_bytes(data[:-1])
        elif harm == "flip":
            data[len(data) // 2] ^= 1
            part.write_bytes(data)
        elif harm == "remove":
            part.unlink()
        else:
            (newest / "checkpoint.json").write_text('{"files": {')
        assert_same_run(run(recipe), uninterrupted)
        printed = capsys.readouterr().out
        assert "checkpoint step-12 is damaged" in printed and "checkpoints/step-8, step 8: resuming" in printed

    def test_what_another_version_wrote_is_no_damage(self, recipe, output):
        """It is refused, and is not removed, even when it is the oldest of too many."""
        newest = output / "checkpoints" / "step-12"
        record = json.loads((newest / "checkpoint.json").read_text())
        (newest / "checkpoint.json").write_text(json.dumps({"format_version": 2, "parts": record["files"]}))
        with pytest.raises(InputError, match=r"step-12/checkpoint.json: format_version 2 .*reads 1"):
            run(recipe)
        checkpoints.prune_checkpoints(output, 1, 8)
        assert {path.name for path in (output / "checkpoints").iterdir()} == {"step-8", "step-12"}
        newest.rename(newest.with_name("step-2"))
        run(recipe)
        assert {path.name for path in (output / "checkpoints").iterdir()} == {"step-2", "step-8", "step-12"}

    def test_sorted_by_number(self, tmp_path):
        """The original sorted names as text, and took iter-960000 as newer than iter-1000000."""
        for step in (960_000, 1_000_000, 5):
            (tmp_path / "checkpoints" / f"step-{step}").mkdir(parents=True)
        assert [p.name for p in checkpoints.list_checkpoints(tmp_path)] == ["step-5", "step-960000", "step-1000000"]

    def test_nothing_is_lost_where_all_are_damaged(self, recipe, output):
        for part in output.glob("checkpoints/*/*.distcp"):
            part.unlink()
        with pytest.raises(InputError, match="cannot be resumed"):
            run(recipe)
        assert len(list_milestones(output)) == 2

    def test_the_only_good_one_is_kept_when_fewer_are_to_stay(self, recipe, output, uninterrupted):
        """Pruning by age alone would keep the damaged one and remove the one from which the run resumes."""
        next((output / "checkpoints" / "step-12").glob("*.distcp")).write_bytes(b"")
        assert_same_run(run(recipe, "checkpoints.keep=1"), uninterrupted)
        assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-12"]

    # A limit on the size of files makes a write fail as on a full disk: of a milestone, or of a checkpoint, which is
    # larger.
    FULL = """
import resource, signal, sys
from tinyllama_hf.pretrain.config import load_pretrain_config
from tinyllama_hf.pretrain.checkpoints import FullDiskError
from tinyllama_hf.pretrain.loop import Hooks
from tests.pretrain.runs import pretrain
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    pretrain(load_pretrain_config({recipe!r}, {overrides!r}), hooks=Hooks(after_checkpoint=limit))
except FullDiskError as error:
    print("FullDiskError", error)
"""

    @pytest.mark.parametrize(
        ("overrides", "what"), [([], "step-6-token"), (["milestones.tokens=[]"], "checkpoints/step-8")]
    )
    def test_a_full_disk_leaves_the_checkpoint_before(self, recipe, uninterrupted, overrides, what):
        with limited_files() as limit, pytest.raises(FullDiskError, match=what):
            run(recipe, *overrides, hooks=Hooks(after_checkpoint=lambda *_: limit(50_000)))
        output = recipe.parent / "run"
        assert [p.name for p in (output / "checkpoints").iterdir()] == ["step-4"], "and no temporary one"
        if not overrides:
            assert_same_run(run(recipe), uninterrupted)

    @pytest.mark.slow
    def test_a_full_disk_of_one_of_two_processes(self, recipe, tmp_path):
        """Both end with the message, and neither waits for the other."""
        (tmp_path / "full.py").write_text(
            self.FULL.format(limit=50_000, recipe=str(recipe), overrides=["milestones.tokens=[]"])
        )
        command = [
            Path(sys.executable).parent / "torchrun",
            "--standalone",
            "--nproc_per_node",
            "2",
            tmp_path / "full.py",
        ]
        env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run([str(c) for c in command], env=env, capture_output=True, text=True, timeout=120)
        assert done.stdout.count("FullDiskError") == 2, done.stdout + done.stderr
        assert [p.name for p in (recipe.parent / "run" / "checkpoints").iterdir()] == ["step-4"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("schedule.peak=1e-3", "schedule.peak: was 0.005, is 0.001"),
            ("training.total_tokens=5120", "training.total_tokens: was 3072, is 5120"),
            ("training.seed=1", "training.seed: was 3407, is 1"),
            ("validation.max_tokens=1024", "validation.max_tokens: was 512, is 1024"),
            ("model.overrides.num_hidden_layers=3", "model.overrides"),
        ],
    )
    def test_other_settings(self, recipe, output, override, message):
        with pytest.raises(InputError, match=message) as refused:
            run(recipe, override)
        assert len(list_milestones(output)) == 2
        _, found, overrides = str(refused.value).rpartition("to restore them: ")
        assert found and run(recipe, override, *shlex.split(overrides)) == output

    @pytest.mark.parametrize(
        "overrides",
        [
            "model.preset=nano",
            "model.overrides.num_hidden_layers=1",
            "model.init_from=x",
            "data.mixture_changes=[{from_tokens: 1024, ramp_tokens: 0, weights: [1.0]}]",
            "data.sequence_length=64",
            "data.document_masking=true",
            "schedule.name=wsd; schedule.decay_tokens=512",
            "schedule.peak=1e-3",
            "schedule.floor=1e-5",
            "schedule.warmup_tokens=256",
            "optimizer.betas=[0.8,0.95]",
            "optimizer.betas=[0.9,0.9]",
            "optimizer.eps=1e-6",
            "optimizer.weight_decay=0.2",
            "optimizer.gradient_clip=0.5",
            "training.total_tokens=2560",
            "training.tokens_per_step=128",
            "training.batch_changes=[{from_tokens: 1024, tokens_per_step: 512}]",
            "training.precision=bf16",
            "training.skip_spikes_sigma=6",
            "training.seed=1",
            "validation.max_tokens=1024",
            "branch={from: x, schedule: continue}",
        ],
    )
    def test_every_setting_that_moves_a_number(self, recipe, overrides):
        config = load_pretrain_config(recipe)
        before, after = (self.identity(c) for c in (config, load_pretrain_config(recipe, overrides.split("; "))))
        with pytest.raises(
            InputError, match=re.escape(overrides.partition("=")[0].removesuffix(".num_hidden_layers"))
        ):
            check_same_run(Path("checkpoint"), before, after)

    def test_and_no_other(self, recipe):
        """The distribution of the work, and what is written during the run, may change."""
        others = (
            "output_dir=x",
            "training.micro_batch_size=2",
            "training.compile=off",
            "training.attention=eager",
            "training.activation_checkpointing=true",
            "training.deterministic=true",
            "milestones.tokens=[512]",
            "milestones.steps=[3]",
            "milestones.keep_training_state=true",
            "evaluate_at_milestones=inline",
            "checkpoints.every_tokens=512",
            "checkpoints.keep=1",
            "validation.every_tokens=512",
            "logging.every_steps=2",
        )
        check_same_run(
            Path("checkpoint"),
            *(self.identity(c) for c in (load_pretrain_config(recipe), load_pretrain_config(recipe, others))),
        )

    @staticmethod
    def identity(config):
        return identity(
            SimpleNamespace(
                config=config,
                record=record_of_recipe(
                    config.model_dump(mode="json", by_alias=True),
                    {source.path: read_metadata(source.path)["fingerprint"] for source in config.data.sources},
                ),
                tokenizer_fingerprint=tokenizer_fingerprint(load_tokenizer(config.data.tokenizer)),
            )
        )

    def test_changed_data_and_tokenizer(self, recipe, output, corpus, tokenizer_folder, documents, tmp_path):
        from tinyllama_hf.data.train_tokenizer import train_tokenizer

        other = tmp_path / "other"
        prepare([str(corpus)], tokenizer_folder, other, validation_fraction=0.2, workers=1, progress=False)
        with pytest.raises(InputError, match=r"data.sources: was .*fingerprint"):
            run(recipe, f"data.sources=[{{path: {other}, weight: 1}}]")
        train_tokenizer(documents, 500, tmp_path / "tokenizer")
        data = tmp_path / "data"
        prepare([str(corpus)], tmp_path / "tokenizer", data, validation_fraction=0.1, workers=1, progress=False)
        with pytest.raises(InputError, match="tokenizer: was"):
            run(recipe, f"data.tokenizer={tmp_path / 'tokenizer'}", f"data.sources=[{{path: {data}, weight: 1}}]")

    def test_data_that_moved_is_the_same_data(self, recipe, output, prepared, tmp_path, uninterrupted):
        shutil.rmtree(output / "checkpoints" / "step-12")
        moved = tmp_path / "moved"
        shutil.copytree(prepared, moved)
        run(recipe, f"data.sources=[{{path: {moved}, weight: 1.0}}]")
        assert [r.get("loss") for r in exact_rows(output)] == [r.get("loss") for r in exact_rows(uninterrupted)]


@pytest.fixture(scope="module")
def base(prepared, tokenizer_folder, tmp_path_factory) -> Path:
    """A run that keeps the training state of its milestones."""
    recipe = write_recipe(tmp_path_factory.mktemp("base"), prepared, tokenizer_folder)
    return run(recipe, "milestones.keep_training_state=true")


class TestBranch:
    def test_continued_branch_equals_the_run(self, recipe, base, tmp_path):
        """A branch that changes nothing repeats the rest of its run bit for bit."""
        milestone = list_milestones(base)[0]
        branch = f"branch={{from: {milestone}, schedule: continue}}"
        forked = run(recipe, branch, f"output_dir={tmp_path / 'forked'}")
        rows = [row for row in exact_rows(base) if row["step"] > 6]
        assert exact_rows(forked) == rows
        assert {p.name for p in milestone.iterdir()} == {p.name for p in list_milestones(forked)[-1].iterdir()}
        assert not any("distcp" in p.name for p in milestone.rglob("*")), "outside the published folder"
        state, newest = base / "training_state" / list_milestones(base)[-1].name, base / "checkpoints" / "step-12"
        assert all((state / file.name).samefile(file) for file in newest.iterdir()), "written once"

    def test_a_branch_has_its_own_optimiser_settings(self, recipe, base, tmp_path):
        """Compared with one step of an AdamW that is built from the moments of the milestone."""
        settings = {"betas": (0.5, 0.6), "weight_decay": 3.0, "eps": 1e-4}
        milestone = list_milestones(base)[0]
        overrides = [f"optimizer.{key}={list(v) if key == 'betas' else v}" for key, v in settings.items()]
        seen = []

        def step(self, number, real=TrainStep.__call__):
            result = real(self, number)
            seen.append(({n: p.detach().clone() for n, p in self.model.named_parameters()}, self.optimizer))
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TrainStep, "__call__", step)
            run(
                recipe, f"branch={{from: {milestone}, schedule: continue}}", f"output_dir={tmp_path / 'x'}", *overrides
            )
        assert all(group[key] == value for group in seen[0][1].param_groups for key, value in settings.items())

        config = load_pretrain_config(recipe, [*overrides, f"output_dir={tmp_path / 'unused'}"])
        opened = setup.open_pretrain_run(config)
        model = TinyLlamaForCausalLM.from_pretrained(milestone)
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate(7, config), fused=True, **settings)
        by_hand = TrainStep(config, opened.mixture, Accelerator(), model, optimizer)
        state = {"model": model.state_dict(), "optimizer": get_state_dict(model, optimizer)[1]}
        dcp.load(state, checkpoint_id=base / "training_state" / milestone.name, no_dist=True)
        moments = state["optimizer"]["state"]
        for name, parameter in model.named_parameters():
            optimizer.state[parameter] = moments[name]
        by_hand(7)
        for name, parameter in model.named_parameters():
            assert (parameter - seen[0][0][name]).abs().max() <= 1e-7, name  # another decay would be 1e-3 off

    def test_cooldown_resumes_too(self, recipe, base, tmp_path):
        settings = [
            f"branch={{from: {list_milestones(base)[0]}, schedule: cooldown}}",
            "training.total_tokens=4096",
            "milestones.tokens=[]",
        ]
        whole = run(recipe, *settings, f"output_dir={tmp_path / 'whole'}")
        with pytest.raises(Stopped):
            run(
                recipe,
                *settings,
                f"output_dir={tmp_path / 'cut'}",
                hooks=Hooks(after_checkpoint=signal_after(1, signal.SIGTERM)),
            )
        cut = run(recipe, *settings, f"output_dir={tmp_path / 'cut'}")
        assert_same_run(cut, whole)
        rates = [row["learning_rate"] for row in read_metrics(whole) if "loss" in row]
        assert len(rates) == 10 and all(a > b for a, b in itertools.pairwise(rates))

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ([], "has no training state"),
            (["model.overrides.num_hidden_layers=3"], "model.overrides: was"),
            (["training.tokens_per_step=512"], "training.tokens_per_step"),
            (["training.total_tokens=1536", "milestones.tokens=[]"], "training.total_tokens: 1,536"),
        ],
    )
    def test_refusals(self, recipe, base, uninterrupted, tmp_path, overrides, message):
        milestone = list_milestones(base if overrides else uninterrupted)[0]
        with pytest.raises(InputError, match=message):
            run(
                recipe, f"branch={{from: {milestone}, schedule: cooldown}}", f"output_dir={tmp_path / 'x'}", *overrides
            )


class TestInitFrom:
    def test_begins_with_these_weights(self, recipe, uninterrupted, tmp_path):
        milestone = list_milestones(uninterrupted)[-1]
        output = run(
            recipe,
            f"model.init_from={milestone}",
            f"output_dir={tmp_path / 'x'}",
            "schedule.peak=1e-12",
            "schedule.floor=0",
            "milestones.tokens=[]",
            "training.total_tokens=512",
            "schedule.warmup_tokens=0",
            "optimizer.weight_decay=0",
        )
        a, b = (load_file(list_milestones(x)[-1] / "model.safetensors") for x in (uninterrupted, output))
        assert all(torch.allclose(a[name], b[name], atol=1e-9) for name in a)

    def test_a_real_model(self, recipe, shared, tmp_path):
        """stories260K, with data prepared by its own tokenizer: its loss stays the same."""
        folder = shared / "data" / "models" / "stories260K"
        stories = shared / "data" / "corpora" / "stories" / "validation.jsonl.gz"
        data = tmp_path / "data"
        prepare([str(stories)], folder, data, validation_fraction=0.1, workers=1, progress=False)
        config = json.loads((folder / "config.json").read_text())
        keys = (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "intermediate_size",
            "rms_norm_eps",
            "tie_word_embeddings",
        )
        overrides = yaml.safe_dump({key: config[key] for key in keys}, default_flow_style=True).strip()
        output = run(
            recipe,
            f"model.init_from={folder}",
            f"model.overrides={overrides}",
            f"data.tokenizer={folder}",
            f"data.sources=[{{path: {data}, weight: 1}}]",
            "schedule.peak=1e-6",
            "schedule.floor=0",
        )
        losses = [row["loss"] for row in read_metrics(output) if "loss" in row]
        assert max(losses) < 3.0, "untrained it would be 6.2: a model that knows stories, from the first step on"

    def test_another_architecture(self, recipe, shared):
        with pytest.raises(InputError, match=r"its architecture differs(.|\n)*head_dim: 8 there"):
            run(
                recipe,
                f"model.init_from={shared / 'data' / 'models' / 'stories260K'}",
                "model.overrides.hidden_size=128",
            )
