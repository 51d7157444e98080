"""One optimizer step, with guards on the device that skip a bad one; and the validation loss."""

import contextlib
import time
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from ..data.mixture import Mixture
from ..data.order import Block
from .schedule import learning_rate


if TYPE_CHECKING:  # benchmarks/gpu runs this where pydantic is not installed
    from .config import PretrainConfig
    from .setup import PretrainRun


SPIKE_WINDOW = 128  # steps that a loss is compared with, as in OLMo-core's SkipStepAdamW


class StepResult(NamedTuple):
    """The quantities of a step that are logged. The tensors stay on the device until they are read.

    Attributes:
        loss (`torch.Tensor`): mean over the tokens of the step, all processes together.
        gradient_norm (`torch.Tensor`): before clipping.
        learning_rate (`float`): of the step.
    """

    loss: torch.Tensor
    gradient_norm: torch.Tensor
    learning_rate: float


class TrainStep:
    """The optimizer steps of a run.

    Args:
        config (`PretrainConfig`): the recipe.
        mixture (`Mixture`): provides the training blocks.
        accelerator (`Accelerator`): the processes.
        model (`torch.nn.Module`): as accelerate wrapped it.
        optimizer (`torch.optim.Optimizer`): fused AdamW over its parameters.
        branched_at (`int`, *optional*): tokens seen at the milestone from which the run was branched.
    """

    def __init__(
        self,
        config: "PretrainConfig",
        mixture: Mixture,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        branched_at: int | None = None,
    ):
        self.config, self.mixture, self.accelerator = config, mixture, accelerator
        self.model, self.optimizer, self.branched_at = model, optimizer, branched_at
        self.device = accelerator.device
        # The first step with a loss or gradient that is not finite, -1 for none. Read only at logging steps, since
        # reading it waits for the device.
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=self.device)
        # Ring buffer of the last accepted losses, for spike detection; full once `counted` has passed its length.
        self.losses = torch.zeros(SPIKE_WINDOW, device=self.device)
        self.counted = torch.zeros((), dtype=torch.int64, device=self.device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self.wait_seconds = 0.0  # spent on fetching data since the last logged step

    def state(self) -> dict[str, torch.Tensor]:
        """The state besides model and optimizer: the tensors themselves, to be saved or filled in place."""
        return {"losses": self.losses, "counted": self.counted, "skipped": self.skipped}

    def accumulation(self, step: int) -> int:
        """Micro-batches per process in a step."""
        return self.config.sequences(step) // (self.accelerator.num_processes * self.config.training.micro_batch_size)

    def __call__(self, step: int) -> StepResult:
        """Runs the step with this number (from 1 on). Nothing in it waits for the device."""
        rate = learning_rate(step, self.config, self.branched_at)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        tokens, accumulation = self.config.steps.tokens_of(step), self.accumulation(step)
        total = torch.zeros((), device=self.device)
        for micro_step in range(accumulation):
            inputs = self.micro_batch(step, micro_step)
            # FSDP reduces gradients after every micro-batch, in fp32: those of the whole model, unreduced, would take
            # the memory that sharding saves.
            reduces = self.accelerator.is_fsdp2 or micro_step == accumulation - 1
            with contextlib.nullcontext() if reduces else self.accelerator.no_sync(self.model):
                # Sum over this micro-batch / tokens of the whole step, so that the parts add up to the mean over the
                # step.
                loss = self.model(**inputs, num_items_in_batch=tokens).loss
                # DDP and FSDP average gradients over processes; the sum is needed.
                self.accelerator.backward(loss * self.accelerator.num_processes)
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.gradient_clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        loss = self.accelerator.reduce(total, reduction="sum")
        self._apply(step, loss, norm)
        return StepResult(loss, norm, rate)

    def _apply(self, step: int, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Updates the parameters unless the step is bad. Every process decides the same, from the same two numbers."""
        bad = ~(torch.isfinite(norm) & torch.isfinite(loss))
        spike = self._is_spike(loss) & ~bad
        # The fused optimizer skips the update on the device where this is 1, without a synchronization with the host.
        self.optimizer.found_inf = (bad | spike).float()  # type: ignore[attr-defined]  # read by fused optimizers
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.bad_step = torch.where(bad & (self.bad_step < 0), step, self.bad_step)
        self.skipped = self.skipped + spike
        counts = ~(bad | spike)
        place = (self.counted % SPIKE_WINDOW).reshape(1)
        self.losses = self.losses.scatter(
            0, place, torch.where(counts, loss, self.losses.gather(0, place)[0]).reshape(1)
        )
        self.counted = self.counted + counts

    def _is_spike(self, loss: torch.Tensor) -> torch.Tensor:
        """Whether the loss is `training.skip_spikes_sigma` standard deviations above the mean of the last losses."""
        sigma = self.config.training.skip_spikes_sigma
        if sigma is None:
            return torch.zeros((), dtype=torch.bool, device=self.device)
        return (self.counted >= SPIKE_WINDOW) & (loss > self.losses.mean() + sigma * self.losses.std())

    def blocks(self, step: int) -> list[Block]:
        """All blocks of a step; independent of the number of processes."""
        sequences = self.config.sequences(step)
        first = self.config.steps.tokens_after(step - 1) // self.config.data.sequence_length
        return self.mixture.blocks(first, sequences)

    def micro_batch(self, step: int, micro_step: int) -> dict[str, torch.Tensor]:
        """The inputs of one forward pass: this process's slice of the blocks of the step."""
        began = time.perf_counter()
        micro = self.config.training.micro_batch_size
        first = self.config.steps.tokens_after(step - 1) // self.config.data.sequence_length
        first += (self.accelerator.process_index * self.accumulation(step) + micro_step) * micro
        blocks = self.mixture.blocks(first, micro)
        tokens = torch.from_numpy(self.mixture.tokens(blocks))  # [micro, seq + 1]
        labels = tokens[:, 1:].contiguous()
        inputs = {"input_ids": tokens[:, :-1].contiguous(), "labels": labels, "shift_labels": labels}
        if self.config.data.document_masking:
            inputs["position_ids"] = torch.from_numpy(self.mixture.position_ids(blocks))
        if self.device.type == "cuda":  # a copy overlaps computation only from pinned memory
            inputs = {name: tensor.pin_memory() for name, tensor in inputs.items()}
        inputs = {name: tensor.to(self.device, non_blocking=True) for name, tensor in inputs.items()}
        self.wait_seconds += time.perf_counter() - began
        return inputs


@torch.no_grad()
def validation_losses(run: "PretrainRun", accelerator: Accelerator, model: torch.nn.Module) -> list[float]:
    """Mean loss per token on the held-out blocks of each source; a collective call of all processes.

    Micro-batches are distributed round-robin. The processes of a sharded model run every forward pass together, so a
    process without its own micro-batch repeats the first one and discards the result.

    Args:
        run (`PretrainRun`): has the `validation` blocks.
        accelerator (`Accelerator`): the processes.
        model (`torch.nn.Module`): as accelerate wrapped it.
    """
    # In training mode the loss never holds all logits; there is no dropout. DistributedDataParallel is bypassed, since
    # there are no gradients to reduce.
    inner = accelerator.unwrap_model(model)
    micro, processes = run.config.training.micro_batch_size, accelerator.num_processes
    losses = []
    for blocks, positions in zip(run.validation, run.validation_positions, strict=True):
        starts = range(0, len(blocks), micro)
        total = torch.zeros((), device=accelerator.device)
        for first in range(0, len(starts), processes):
            place = first + accelerator.process_index
            start = starts[place] if place < len(starts) else 0
            tokens = torch.from_numpy(blocks[start : start + micro]).to(accelerator.device)
            labels = tokens[:, 1:]
            inputs = {"input_ids": tokens[:, :-1], "labels": labels, "shift_labels": labels}
            if run.config.data.document_masking:
                inputs["position_ids"] = torch.from_numpy(positions[start : start + micro]).to(accelerator.device)
            with accelerator.autocast():
                loss = inner(**inputs, num_items_in_batch=1).loss
            total += loss if place < len(starts) else 0.0
        total = accelerator.reduce(total, reduction="sum")
        losses.append(total.item() / (len(blocks) * run.config.data.sequence_length))
    return losses
