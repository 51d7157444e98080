"""An optimizer step and its state: which steps are skipped, and what a checkpoint restores."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from tinyllama_hf import TinyLlamaForCausalLM
from tinyllama_hf.pretrain import setup
from tinyllama_hf.pretrain.checkpoints import CheckpointRecord, read_checkpoint, write_checkpoint
from tinyllama_hf.pretrain.config import load_pretrain_config
from tinyllama_hf.pretrain.step import SPIKE_WINDOW, TrainStep


def train_step(recipe, make_model, *overrides: str) -> TrainStep:
    opened = setup.open_pretrain_run(load_pretrain_config(recipe, ["training.micro_batch_size=8", *overrides]))
    model = make_model(opened.model_config)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    return TrainStep(opened.config, opened.mixture, Accelerator(), model, optimizer)


def weights_and_moments(step: TrainStep) -> list[torch.Tensor]:
    found = []
    for parameter in step.model.parameters():
        found += [parameter.detach().clone(), *(value.clone() for value in step.optimizer.state[parameter].values())]
    return found


class Scripted(torch.nn.Module):
    """Its losses are given, and every gradient is 1."""

    def __init__(self, losses: list[float]):
        super().__init__()
        self.weight, self.losses = torch.nn.Parameter(torch.zeros(3)), iter(losses)

    def forward(self, **_):
        return SimpleNamespace(loss=next(self.losses) + (self.weight - self.weight.detach()).sum())


class TestSpikes:
    """Losses alternate between 1 and 3: mean 2, standard deviation 1, so three deviations end at 5."""

    USUAL = torch.tensor([1.0, 3.0]).repeat(SPIKE_WINDOW // 2)

    def steps(
        self, recipe, losses: list[float], sigma: str, counted: int = SPIKE_WINDOW
    ) -> tuple[list[bool], TrainStep]:
        """Whether each step moved the weights or their moments."""
        step = train_step(recipe, lambda _: Scripted([2.0, *losses]), f"training.skip_spikes_sigma={sigma}")
        step(1)  # so that there are moments
        step.losses, step.counted = self.USUAL.clone(), torch.tensor(counted)
        moved, before = [], weights_and_moments(step)
        for number in range(2, len(losses) + 2):
            step(number)
            after = weights_and_moments(step)
            moved.append(not all(map(torch.equal, before, after)))
            before = after
        return moved, step

    def test_only_the_step_beyond_the_limit_is_left_out(self, recipe):
        moved, step = self.steps(recipe, [2.0, 5.03, 2.0, 4.95], "3.0")
        assert moved == [True, False, True, True] and step.skipped == 1
        assert step.losses[:4].tolist() == pytest.approx([2.0, 2.0, 4.95, 3.0]), "the spike is no usual loss"
        assert step.counted == SPIKE_WINDOW + 3

    @pytest.mark.parametrize(
        ("sigma", "loss", "is_left_out"),
        [("3.0", 4.9, False), ("3.0", 5.1, True), ("6.0", 7.9, False), ("6.0", 8.1, True), ("null", 1000.0, False)],
    )
    def test_the_limit_is_so_many_deviations_above_the_mean(self, recipe, sigma, loss, is_left_out):
        moved, step = self.steps(recipe, [loss], sigma)
        assert moved == [not is_left_out] and step.skipped == is_left_out

    def test_nothing_is_left_out_before_the_window_is_full(self, recipe):
        moved, step = self.steps(recipe, [1000.0, 2000.0], "3.0", counted=SPIKE_WINDOW - 2)
        assert moved == [True, True] and step.skipped == 0


@pytest.mark.parametrize("has_trained", [False, True], ids=["fresh", "trained"])
def test_a_checkpoint_restores_the_whole_state(recipe, tmp_path, has_trained):
    """Into a model with other weights, with or without moments and guards."""
    sigma = "training.skip_spikes_sigma=0.5"
    saved, other = (train_step(recipe, TinyLlamaForCausalLM, sigma) for _ in range(2))
    for number in (1, 2, 3):
        saved(number)
    saved.losses, saved.counted, saved.skipped = torch.rand(SPIKE_WINDOW), torch.tensor(500), torch.tensor(7)
    if has_trained:
        other(5)
    write_checkpoint(tmp_path / "state", saved, CheckpointRecord(1, 256, None, {}, {}, {}))
    kept = weights_and_moments(saved), {name: value.clone() for name, value in saved.state().items()}
    read_checkpoint(tmp_path / "state", other)
    assert all(map(torch.equal, kept[0], weights_and_moments(other)))
    assert {name: value.tolist() for name, value in other.state().items()} == {
        name: value.tolist() for name, value in kept[1].items()
    }
    results = [step(4) for step in (saved, other)]
    assert results[0].loss == results[1].loss and math.isfinite(results[0].loss)
    assert saved.skipped == other.skipped == 8, "a loss of 6 among those of 0 to 1"
    assert all(map(torch.equal, kept[0], weights_and_moments(other)))
