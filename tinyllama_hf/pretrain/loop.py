"""The pretraining loop: data order, schedule in tokens, milestones, metrics.

Every process computes the numbers of its blocks from the step alone, so there is no loader and no state of one.
"""

import contextlib
import shutil
import time
from typing import Any

import torch
from accelerate import Accelerator

from .. import provenance
from ..modeling_tinyllama import TinyLlamaForCausalLM
from . import setup
from .checkpoints import CONFIG_FILE, MILESTONES_FOLDER, write_milestone
from .config import PretrainConfig
from .metrics import Metrics
from .schedule import learning_rate
from .throughput import model_flops_utilization


class NonFiniteError(RuntimeError):
    """A loss or gradient was not finite. The parameters are those of the last finite step."""


def pretrain(config: PretrainConfig, overwrite: bool = False, dry_run: bool = False) -> None:
    """Trains a model as the recipe says and leaves a milestone folder at each count of tokens.

    Args:
        config (`PretrainConfig`): from [`load_config`].
        overwrite (`bool`, *optional*, defaults to `False`): remove the run that lies in `output_dir`.
        dry_run (`bool`, *optional*, defaults to `False`): check everything, say what would happen, and stop.

    Raises:
        InputError: before the first step, for anything that cannot work.
        NonFiniteError: at the logging step after a loss or gradient that is not finite.
    """
    accelerator = Accelerator(
        mixed_precision="no" if config.training.precision == "fp32" else config.training.precision
    )
    setup.check_launch(accelerator)
    run = setup.open_run(config, overwrite)
    setup.accumulation_steps(config, accelerator.num_processes)
    compiled, compile_says = setup.compiles(config.training.compile, accelerator.device)
    torch.manual_seed(config.training.seed)
    model = TinyLlamaForCausalLM._from_config(run.model_config, attn_implementation=config.training.attention)
    model.generation_config.pad_token_id = run.tokenizer.pad_token_id
    if accelerator.is_main_process:
        print("\n".join(setup.facts(run, model, accelerator.num_processes, compile_says)), flush=True)
        if dry_run:
            print(f"first block {setup.sample(run)!r}\nwould write {run.output}/ (dry run: nothing was written)")
    if dry_run:
        return
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    trainer = _Trainer(run, accelerator, accelerator.prepare_model(model))
    accelerator.wait_for_everyone()  # nobody is still looking whether the folder is empty
    if accelerator.is_main_process:
        if run.output.exists():
            shutil.rmtree(run.output)
        (run.output / MILESTONES_FOLDER).mkdir(parents=True)
        provenance.write_text(run.output / CONFIG_FILE, setup.training_yaml(config))
    accelerator.wait_for_everyone()
    trainer.train()
    accelerator.end_training()


class _Trainer:
    """The state of a run: model, optimiser, step."""

    def __init__(self, run: setup.Run, accelerator: Accelerator, model: torch.nn.Module):
        self.run, self.accelerator, self.model = run, accelerator, model
        config = run.config
        self.config, self.device = config, accelerator.device
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.schedule.peak,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
            fused=True,
        )
        self.accumulation = setup.accumulation_steps(config, accelerator.num_processes)
        self.flops_per_token = accelerator.unwrap_model(model).flops_per_token(config.data.sequence_length)
        # First step whose loss or gradient was not finite, -1 for none; read only where the run reports anyway.
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=self.device)
        self.validation_loss: float | None = None

    def train(self) -> None:
        """Runs all steps."""
        config, run = self.config, self.run
        total_tokens = config.num_steps * config.training.tokens_per_step
        with Metrics(run.output, total_tokens, self.accelerator.is_main_process) as metrics:
            self.metrics = metrics
            self.clock, self.clock_tokens, self.paused = time.perf_counter(), 0, 0.0
            next_validation = config.validation.every_tokens
            for step in range(1, config.num_steps + 1):
                loss, gradient_norm, rate = self.step(step)
                tokens, last = step * config.training.tokens_per_step, step == config.num_steps
                if step % config.logging.every_steps == 0 or last:
                    self.report(step, loss, gradient_norm, rate)
                if tokens >= next_validation or last or step in run.milestones:
                    self.validate(step)
                    next_validation = (tokens // config.validation.every_tokens + 1) * config.validation.every_tokens
                if step in run.milestones:
                    self.milestone(step)

    def step(self, step: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        """One optimiser step; returns this process's share of the loss, the gradient norm, the learning rate."""
        training = self.config.training
        rate = learning_rate((step - 1) * training.tokens_per_step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=self.device)
        processes = self.accelerator.num_processes
        for micro_step in range(self.accumulation):
            inputs = self.micro_batch(step, micro_step)
            last = micro_step == self.accumulation - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                # Sum over this micro-batch / tokens of the whole step: parts add up over micro-batches and processes.
                loss = self.model(**inputs, num_items_in_batch=training.tokens_per_step).loss
                # DistributedDataParallel averages gradients over processes, a sum is wanted.
                self.accelerator.backward(loss * processes)
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.gradient_clip)
        # Summed over processes, as one must not step without the others.
        bad = self.accelerator.reduce((~(torch.isfinite(norm) & torch.isfinite(total))).float(), reduction="sum") > 0
        # The fused optimiser leaves the parameters alone where this is 1, without a word to the host.
        self.optimizer.found_inf = bad.float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.bad_step = torch.where(bad & (self.bad_step < 0), step, self.bad_step)
        return total, norm, rate

    def micro_batch(self, step: int, micro_step: int) -> dict[str, torch.Tensor]:
        """The inputs of one forward pass: a slice of the step's blocks, the same whatever the number of processes."""
        sequences, micro = self.config.sequences_per_step, self.config.training.micro_batch_size
        first = (
            (step - 1) * sequences + self.accelerator.process_index * self.accumulation * micro + micro_step * micro
        )
        blocks = self.run.mixture.blocks(first, micro)
        tokens = torch.from_numpy(self.run.mixture.tokens(blocks))  # [micro, seq + 1]
        inputs = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "shift_labels": tokens[:, 1:]}
        if self.config.data.document_masking:
            inputs["position_ids"] = torch.from_numpy(self.run.mixture.position_ids(blocks))
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in inputs.items()}

    def report(self, step: int, loss: torch.Tensor, gradient_norm: torch.Tensor, rate: float) -> None:
        """Logs a step, and stops the run if one since the last report was not finite."""
        config, tokens = self.config, step * self.config.training.tokens_per_step
        loss = self.accelerator.reduce(loss, reduction="sum").item()
        if (bad_step := self.bad_step.item()) >= 0:
            raise NonFiniteError(
                f"step {bad_step} ({bad_step * config.training.tokens_per_step:,} tokens): the loss or the gradient was "
                "not finite. The parameters were not moved by it; nothing was saved after it. Lower schedule.peak, "
                "lengthen schedule.warmup_tokens, or look at the data of that step"
            )
        now = time.perf_counter()
        rate_tokens = (tokens - self.clock_tokens) / (now - self.clock - self.paused)
        self.clock, self.clock_tokens, self.paused = now, tokens, 0.0
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None
        sequences = config.sequences_per_step
        self.metrics.log(
            {
                "step": step,
                "tokens": tokens,
                "loss": loss,
                "learning_rate": rate,
                "gradient_norm": gradient_norm.item(),
                "blocks": [(step - 1) * sequences, step * sequences],
                "tokens_per_second": rate_tokens,
                "mfu": model_flops_utilization(
                    rate_tokens, self.flops_per_token, name, self.accelerator.num_processes
                ),
            }
        )

    @torch.no_grad()
    def validate(self, step: int) -> None:
        """Loss on the held-out blocks of each source, and their mean by weight."""
        began = time.perf_counter()
        model, micro = self.accelerator.unwrap_model(self.model), self.config.training.micro_batch_size
        losses = []
        for blocks in self.run.validation:
            total = torch.zeros((), device=self.device)
            for start in range(0, len(blocks), micro):
                tokens = torch.from_numpy(blocks[start : start + micro]).to(self.device)
                with self.accelerator.autocast():
                    # In training mode (there is no dropout) the logits are never held as a whole.
                    labels = tokens[:, 1:]
                    total += model(
                        input_ids=tokens[:, :-1], labels=labels, shift_labels=labels, num_items_in_batch=1
                    ).loss
            losses.append(total.item() / (len(blocks) * self.config.data.sequence_length))
        self.validation_loss = setup.weighted(losses, self.run.mixture.weights)
        row: dict[str, Any] = {"step": step, "tokens": step * self.config.training.tokens_per_step}
        row["validation_loss"] = self.validation_loss
        row["validation_loss_by_source"] = {
            source.path: loss for source, loss in zip(self.config.data.sources, losses, strict=True)
        }
        self.metrics.log(row)
        self.paused += time.perf_counter() - began

    def milestone(self, step: int) -> None:
        """Writes the model folder of a step."""
        if self.bad_step.item() >= 0:
            return  # the next report stops the run
        began = time.perf_counter()
        if self.accelerator.is_main_process:
            run, config = self.run, self.config
            folder = run.output / MILESTONES_FOLDER / run.milestones[step]
            record = {
                "step": step,
                "tokens": step * config.training.tokens_per_step,
                "validation_loss": self.validation_loss,
                "num_processes": self.accelerator.num_processes,
                "data": {source.path: self.run.mixture.sources[i].metadata["fingerprint"]
                         for i, source in enumerate(config.data.sources)},
            }  # fmt: skip
            model = self.accelerator.unwrap_model(self.model)
            write_milestone(folder, model, run.tokenizer, setup.training_yaml(config), record)
            self.metrics.say(f"step {step:>6}  wrote {folder}")
        self.accelerator.wait_for_everyone()
        self.paused += time.perf_counter() - began
