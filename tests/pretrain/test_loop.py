"""Small pretraining runs: their outputs, their exactness, and the errors that stop them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator, PartialState
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from tests.conftest import ROOT
from tests.pretrain.runs import pretrain, read_metrics, run_script
from tinyllama_hf import TinyLlamaForCausalLM
from tinyllama_hf.data.prepare import prepare
from tinyllama_hf.errors import InputError
from tinyllama_hf.pretrain import launch, loop, setup
from tinyllama_hf.pretrain.config import load_pretrain_config
from tinyllama_hf.pretrain.milestones import list_milestones
from tinyllama_hf.pretrain.step import TrainStep


def run(recipe: Path, *overrides: str) -> Path:
    config = load_pretrain_config(recipe, overrides)
    pretrain(config)
    return Path(config.output_dir)


def weights(output: Path, which: int = -1) -> dict[str, torch.Tensor]:
    return load_file(list_milestones(output)[which] / "model.safetensors")


@pytest.fixture(scope="module")
def finished(prepared, tokenizer_folder, tmp_path_factory):
    """One finished run, shared by the tests that only read it."""
    folder = tmp_path_factory.mktemp("finished")
    values = yaml.safe_load((ROOT / "recipes" / "pretrain" / "micro.yaml").read_text())
    values |= {"output_dir": str(folder / "run")}
    values["data"] |= {
        "tokenizer": str(tokenizer_folder),
        "sequence_length": 64,
        "sources": [{"path": str(prepared), "weight": 1.0}],
    }
    values["training"] |= {"total_tokens": 30 * 1024, "tokens_per_step": 1024, "micro_batch_size": 8}
    values["schedule"] |= {"warmup_tokens": 4096}
    values["milestones"]["tokens"] = [10_000, 20_000]
    values["validation"] = {"every_tokens": 10_000, "max_tokens": 2000}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return run(path)


class TestWhatARunLeavesBehind:
    def test_it_learns(self, finished):
        losses = [row["validation_loss"] for row in read_metrics(finished) if "validation_loss" in row]
        assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.2

    def test_metrics(self, finished):
        rows = [row for row in read_metrics(finished) if "loss" in row]
        assert [row["step"] for row in rows] == [10, 20, 30]
        assert [row["tokens"] for row in rows] == [10 * 1024, 20 * 1024, 30 * 1024]
        assert [row["blocks"] for row in rows] == [[144, 160], [304, 320], [464, 480]]
        assert all(row["tokens_per_second"] > 0 and row["gradient_norm"] > 0 for row in rows)
        left = [row["seconds_left"] * row["tokens_per_second"] for row in rows]
        assert left == pytest.approx([20 * 1024, 10 * 1024, 0]), "of the tokens that are still to come"

    def test_milestones_are_complete_plain_llama_folders(self, finished):
        milestones = list_milestones(finished)
        assert [m.name for m in milestones] == ["step-10-token-0.01M", "step-20-token-0.02M", "step-30-token-0.03M"]
        for milestone in milestones:
            files = {p.name for p in milestone.iterdir()}
            assert files == {
                "config.json",
                "generation_config.json",
                "model.safetensors",
                "provenance.json",
                "tokenizer.json",
                "tokenizer.model",
                "tokenizer_config.json",
                "training.yaml",
            }
        record = json.loads((milestones[0] / "provenance.json").read_text())
        assert (record["step"], record["tokens"]) == (10, 10240)
        assert record["libraries"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
        assert record["data"] and record["code"]

    @pytest.mark.slow
    def test_a_milestone_loads_where_this_package_cannot_be_imported(self, finished):
        script = f"""
import sys
sys.modules["tinyllama_hf"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = {str(list_milestones(finished)[-1])!r}
model, tokenizer = (auto.from_pretrained(folder) for auto in (AutoModelForCausalLM, AutoTokenizer))
ids = model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=3)[0]
print(type(model).__name__, tokenizer.decode(ids)[:9])
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.stdout.startswith("LlamaForCausalLM <s> def"), done.stderr

    def test_training_yaml_repeats_the_run(self, finished, tmp_path):
        recipe = list_milestones(finished)[-1] / "training.yaml"
        again = run(recipe, f"output_dir={tmp_path / 'again'}")
        assert_equal(weights(finished), weights(again))

    def test_the_last_rows_are_on_the_unwrapped_model(self, finished):
        """The exported weights have the logged validation loss."""
        config = load_pretrain_config(finished / "training.yaml")
        opened = setup.open_pretrain_run(config.model_copy(update={"output_dir": "/nonexistent/folder"}))
        model = TinyLlamaForCausalLM.from_pretrained(list_milestones(finished)[-1]).train()
        tokens = torch.from_numpy(opened.validation[0])
        loss = model(input_ids=tokens[:, :-1], labels=tokens[:, 1:], shift_labels=tokens[:, 1:]).loss
        logged = [row["validation_loss"] for row in read_metrics(finished) if "validation_loss" in row][-1]
        assert loss.item() == pytest.approx(logged, abs=1e-5)


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        difference = (a[name] - b[name]).abs().max().item()
        assert difference <= tolerance, (name, difference)


class TestArithmetic:
    def test_same_recipe_same_weights(self, recipe, tmp_path):
        a, b = (run(recipe, f"output_dir={tmp_path / name}") for name in "ab")
        assert_equal(weights(a), weights(b))
        rows = [[(r["step"], r["loss"], r["gradient_norm"]) for r in read_metrics(x) if "loss" in r] for x in (a, b)]
        assert rows[0] == rows[1]

    def test_one_micro_batch_equals_eight(self, recipe, tmp_path):
        """1 x 8 == 8 x 1: the loss is a sum over tokens divided by the tokens of the step."""
        runs = [run(recipe, f"output_dir={tmp_path / str(n)}", f"training.micro_batch_size={n}") for n in (8, 1)]
        losses = [[row["loss"] for row in read_metrics(r) if "loss" in row] for r in runs]
        assert losses[0] == pytest.approx(losses[1], abs=2e-5)
        assert_equal(*map(weights, runs), tolerance=2e-4)

    def test_against_a_plain_loop_on_stock_llama(self, recipe):
        """The loop, step by step, against torch and transformers alone, with unusual optimizer settings."""
        betas, eps, decay, clip = (0.8, 0.9), 1e-3, 0.5, 0.25
        output = run(
            recipe,
            f"optimizer.betas={list(betas)}",
            f"optimizer.eps={eps}",
            f"optimizer.weight_decay={decay}",
            f"optimizer.gradient_clip={clip}",
        )
        config = load_pretrain_config(output / "training.yaml")
        opened = setup.open_pretrain_run(config.model_copy(update={"output_dir": "/nonexistent/folder"}))
        torch.manual_seed(config.training.seed)
        start = TinyLlamaForCausalLM(opened.model_config)
        model = LlamaForCausalLM(opened.model_config.to_llama())
        model.load_state_dict(start.state_dict())
        optimizer = torch.optim.AdamW(model.parameters(), betas=betas, eps=eps, weight_decay=decay)
        losses = []
        for step in range(config.steps.number):
            optimizer.param_groups[0]["lr"] = setup_rate(step, config)
            tokens = torch.from_numpy(opened.mixture.tokens(opened.mixture.blocks(step * 8, 8)))
            logits = model(input_ids=tokens[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses == pytest.approx([r["loss"] for r in read_metrics(output) if "loss" in r], abs=2e-5)
        assert_equal(weights(output), {k: v.detach() for k, v in model.state_dict().items()}, tolerance=2e-4)

    def test_document_masking_changes_the_loss(self, recipe, documents, tokenizer_folder, tmp_path):
        """On documents shorter than a sequence, so that every block contains a boundary."""
        corpus = tmp_path / "short.jsonl"
        lines = [text[i : i + 40] for text in documents for i in range(0, len(text), 40)]
        corpus.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        short = tmp_path / "short"
        prepare([str(corpus)], tokenizer_folder, short, validation_fraction=0.1, workers=1, progress=False)
        sources = f"data.sources=[{{path: {short}, weight: 1}}]"
        on = run(recipe, f"output_dir={tmp_path / 'on'}", sources, "data.document_masking=true")
        off = run(recipe, f"output_dir={tmp_path / 'off'}", sources)
        losses = [[row["loss"] for row in read_metrics(x) if "loss" in row] for x in (on, off)]
        assert all(a != b for a, b in zip(*losses, strict=True))
        assert losses[0] == pytest.approx(losses[1], rel=0.2)
        # The validation loss is that of each document alone, computed by stock Llama with the mask of transformers.
        opened = setup.open_pretrain_run(
            load_pretrain_config(on / "training.yaml", [f"output_dir={tmp_path / 'unused'}"])
        )
        tokens, positions = (torch.from_numpy(x[0]) for x in (opened.validation, opened.validation_positions))
        model = LlamaForCausalLM.from_pretrained(list_milestones(on)[-1])
        with torch.no_grad():
            logits = model(input_ids=tokens[:, :-1], position_ids=positions, use_cache=False).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
        logged = [row["validation_loss"] for row in read_metrics(on) if "validation_loss" in row][-1]
        assert logged == pytest.approx(expected, abs=1e-5) and (positions.diff(dim=-1) != 1).any()

    @pytest.mark.slow
    def test_two_processes_equal_one(self, recipe, tmp_path, run_command):
        one = run(recipe, f"output_dir={tmp_path / 'one'}")
        command = [
            "torchrun",
            "--nproc_per_node",
            "2",
            ROOT / "recipes" / "pretrain.py",
            recipe,
            f"output_dir={tmp_path / 'two'}",
        ]
        done = run_command(*command, cwd=tmp_path, env={"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        assert "2 process(es) x 1 micro-batches of 4" in done.stdout
        two = tmp_path / "two"
        losses = [[row["loss"] for row in read_metrics(x) if "loss" in row] for x in (one, two)]
        assert losses[0] == pytest.approx(losses[1], abs=2e-5)
        assert_equal(weights(one), weights(two), tolerance=2e-4)


def setup_rate(step: int, config) -> float:
    from tinyllama_hf.pretrain.schedule import learning_rate

    return learning_rate(step + 1, config)


class _LossOnly(torch.autograd.Function):
    """A loss that is NaN, with finite gradients."""

    @staticmethod
    def forward(ctx, loss):
        return loss * float("nan")

    @staticmethod
    def backward(ctx, grad):
        return grad


class _GradientOnly(torch.autograd.Function):
    """A finite loss, with gradients that are NaN."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("inf")


class TestNonFinite:
    @pytest.mark.parametrize("poison", [_LossOnly, _GradientOnly])
    def test_a_bad_step_moves_nothing_and_stops_the_run(self, recipe, monkeypatch, poison):
        config = load_pretrain_config(recipe, ["logging.every_steps=4", "milestones.tokens=[1024, 2560]"])
        forward, calls, states = TinyLlamaForCausalLM.forward, [], []

        def poisoned(self, *args, **kwargs):
            output = forward(self, *args, **kwargs)
            if kwargs.get("num_items_in_batch") == config.training.tokens_per_step:
                calls.append(1)
                if len(calls) == 2 * 5 + 1:  # two micro-batches a step: the first of step 6
                    output.loss = poison.apply(output.loss)
            return output

        step = TrainStep.__call__

        def observed(self, number):
            result = step(self, number)
            states.append({n: p.detach().clone() for n, p in self.model.named_parameters()})
            return result

        monkeypatch.setattr(TinyLlamaForCausalLM, "forward", poisoned)
        monkeypatch.setattr(TrainStep, "__call__", observed)
        with pytest.raises(loop.NonFiniteError, match=r"step 6 \(1,536 tokens\)"):
            pretrain(config)
        assert len(states) == 8, "the run must stop at the next logging step"
        assert_equal(states[4], states[5])
        assert any(not torch.equal(states[3][n], states[4][n]) for n in states[3])
        assert all(torch.isfinite(p).all() for p in states[-1].values())
        assert [m.name.split("-")[1] for m in list_milestones(Path(config.output_dir))] == ["4"], (
            "nothing after step 6"
        )


class TestRefusals:
    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (
                ["training.micro_batch_size=3"],
                "3 x 1 processes does not divide the 8 sequences of a step\\. Use 1, 2, 4, 8",
            ),
            (["model.preset=nanno"], "did you mean 'nano'"),
            (["model.overrides={hiden_size: 64}"], "did you mean 'hidden_size'"),
            (["model.overrides={hidden_size: many}"], "model.overrides.hidden_size: 'many': must be an integer"),
            (["model.overrides={max_position_embeddings: 16}"], "data.sequence_length: 32 is longer than the context"),
            (["model.overrides={vocab_size: 1000}"], "vocab_size: is set by the tokenizer"),
            (["data.sources=[{path: /nowhere, weight: 1}]"], "/nowhere does not exist"),
            (["data.tokenizer=/nowhere"], "no such folder"),
            (["model.overrides.num_hidden_layers=-1"], "num_hidden_layers: -1: must be an integer above 0"),
            (["model.overrides.num_key_value_heads=3"], "model.overrides: do not define a valid model"),
            (["model.overrides.hidden_act=zilu"], "model.overrides: do not define a valid model"),
            (["model.overrides.pad_token_id=0"], "pad_token_id: would freeze an embedding row"),
            (["model.overrides.attention_dropout=0.1"], "attention_dropout: is not supported"),
            (["optimizer.betas=[0.9, 1.0]"], "optimizer.betas.1: 1.0: input should be less than 1"),
            (["schedule.peak=.inf"], "schedule.peak: inf: input should be a finite number"),
            (
                ["data.sequence_length=65536", "training.tokens_per_step=65536", "training.total_tokens=65536"],
                "less than one block",
            ),
        ],
    )
    def test_before_the_first_step(self, recipe, overrides, message):
        with pytest.raises(InputError, match=message):
            run(recipe, *overrides)
        assert not (recipe.parent / "run").exists()

    def test_flash_attention_without_a_gpu(self, recipe):
        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
        with pytest.raises(InputError, match="flash_attention_2 needs a GPU"):
            run(recipe, "training.attention=flash_attention_2")

    def test_compilation_without_a_compiler(self, monkeypatch):
        monkeypatch.setattr(launch.shutil, "which", lambda name: None)
        with pytest.raises(InputError, match=r"training.compile: layers needs a compiler \(g\+\+"):
            launch.resolve_compile("layers", torch.device("cpu"))
        assert launch.resolve_compile("auto", torch.device("cuda")) == (False, "off (auto: no compiler found)")

    def test_other_tokenizer_than_the_data(self, recipe, shared):
        folder = shared / "data" / "models" / "stories260K"
        with pytest.raises(InputError, match="prepared with a tokenizer of fingerprint"):
            run(recipe, f"data.tokenizer={folder}")

    def test_a_run_is_not_overwritten_unless_asked(self, recipe, finished):
        config = load_pretrain_config(recipe, [f"output_dir={finished}", "resume=never"])
        with pytest.raises(InputError, match="--overwrite"):
            pretrain(config)
        assert len(list_milestones(finished)) == 3

    def test_settings_of_the_launch_that_change_the_arithmetic(self, recipe, monkeypatch):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
        with pytest.raises(InputError, match="gradient_accumulation_steps is 4"):
            run(recipe)

    def test_output_that_is_a_file(self, recipe, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(InputError, match="is a file; choose a folder"):
            run(recipe, f"output_dir={tmp_path / 'file'}")

    def test_a_folder_that_is_no_run_is_never_removed(self, recipe, tmp_path):
        (tmp_path / "precious").mkdir()
        (tmp_path / "precious" / "file").write_text("x")
        with pytest.raises(InputError, match="is not a run folder"):
            pretrain(load_pretrain_config(recipe, [f"output_dir={tmp_path / 'precious'}"]), overwrite=True)
        assert (tmp_path / "precious" / "file").exists()


def test_dry_run_says_everything_and_writes_nothing(recipe, capsys):
    config = load_pretrain_config(recipe)
    assert run_script(recipe, "--dry-run") == 0
    printed = capsys.readouterr().out
    for fact in (
        "parameters",
        "12 steps of 256",
        "2 micro-batches",
        "GFLOP",
        " epochs",
        "step-6-token",
        "first block '",
    ):
        assert fact in printed, fact
    assert not Path(config.output_dir).exists()


def test_micro_batches_are_said_in_the_order_of_the_steps(recipe, capsys):
    changes = "training.batch_changes=[{from_tokens: 1024, tokens_per_step: 128}]"
    assert run_script(recipe, changes, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "steps of 256, then 128 (" in printed and "x 2, then 1 micro-batches of 4" in printed


@pytest.mark.parametrize(("processes", "micro"), [(1, 8), (1, 2), (2, 2), (4, 2), (8, 1)])
def test_regression_every_rank_reads_its_own_share(recipe, monkeypatch, processes, micro):
    """The original's ranks shuffled with different seeds: some files were read twice, others never.

    Here any number of processes reads, step by step, the rows that one process reads. Each opens the recipe itself,
    after its rank is known.
    """
    config = load_pretrain_config(recipe, [f"training.micro_batch_size={micro}"])
    opened = setup.open_pretrain_run(config)
    model = TinyLlamaForCausalLM(opened.model_config)
    accelerator = Accelerator()
    monkeypatch.setattr(Accelerator, "num_processes", processes)
    mixtures = []
    for rank in range(processes):
        set_rank(monkeypatch, rank)
        mixtures.append(setup.open_pretrain_run(config).mixture)
    for step in (1, 2, 7):
        rows = []
        for rank, mixture in enumerate(mixtures):
            set_rank(monkeypatch, rank)
            trainer = TrainStep(config, mixture, accelerator, model, torch.optim.AdamW(model.parameters()))
            rows += [trainer.micro_batch(step, i)["input_ids"] for i in range(trainer.accumulation(step))]
        expected = opened.mixture.tokens(opened.mixture.blocks((step - 1) * 8, 8))[:, :-1]
        assert torch.equal(torch.cat(rows), torch.from_numpy(expected))


def set_rank(monkeypatch, rank: int) -> None:
    """Sets the rank as accelerate and a launcher do."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, str(rank))
    for name in ("process_index", "local_process_index"):
        monkeypatch.setitem(PartialState._shared_state, name, rank)
        monkeypatch.setattr(Accelerator, name, rank)


@pytest.fixture
def two_sources(prepared, tmp_path) -> str:
    """The data set and its copy, weighted 3:1."""
    shutil.copytree(prepared, tmp_path / "copy")
    return f"data.sources=[{{path: {prepared}, weight: 0.75}}, {{path: {tmp_path / 'copy'}, weight: 0.25}}]"


class TestSources:
    def test_validation_goes_by_their_weights(self, recipe, two_sources):
        """Both the number of held-out blocks and the mean."""
        opened = setup.open_pretrain_run(load_pretrain_config(recipe, [two_sources]))
        assert [len(blocks) for blocks in opened.validation] == [12, 4], "of 512 tokens, 16 blocks"
        output = run(
            recipe, two_sources, "training.total_tokens=256", "milestones.tokens=[]", "schedule.warmup_tokens=0"
        )
        row = next(row for row in read_metrics(output) if "validation_loss" in row)
        first, second = row["validation_loss_by_source"].values()
        assert abs(first - second) > 1e-3
        assert row["validation_loss"] == pytest.approx(0.75 * first + 0.25 * second, abs=1e-6)

    def test_a_ramp_of_the_recipe_is_linear(self, recipe, two_sources):
        """Only the first source until 1024 tokens (32 blocks), only the second from 3072 on (96), linear in between.

        The share of the second source is the integral of its weight.
        """
        change = "data.mixture_changes=[{from_tokens: 1024, ramp_tokens: 2048, weights: [0, 1]}]"
        sources = two_sources.replace("0.75", "1.0").replace("0.25", "0.0")
        opened = setup.open_pretrain_run(load_pretrain_config(recipe, [sources, change, "training.total_tokens=5120"]))
        second = [opened.mixture.order.counts(place)[1] for place in (32, 64, 96, 128)]
        assert second == pytest.approx([0, 8, 32, 64], abs=1)
        assert opened.shares == pytest.approx([1 - 96 / 160, 96 / 160], abs=0.01), "of the 160 blocks of the whole run"
