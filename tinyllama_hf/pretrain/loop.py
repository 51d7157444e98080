"""The pretraining loop: steps, validation, milestones and checkpoints.

Every process computes the numbers of its blocks from the step alone, so there is no data loader, and no loader state.
"""

import contextlib
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from .. import provenance
from ..devices import Device, choose_precision, known_device
from ..errors import require
from ..files import write_json
from ..modeling_tinyllama import TinyLlamaForCausalLM
from . import launch, setup
from .checkpoints import (
    CHECKPOINTS_FOLDER,
    TRAINING_STATE_FOLDER,
    CheckpointRecord,
    prune_checkpoints,
    read_checkpoint,
    translate_write_errors,
    write_checkpoint,
)
from .config import PretrainConfig
from .metrics import Metrics, row_values, start_trackers
from .milestones import MILESTONES_FOLDER, export_weights, write_milestone
from .resume import Start, arithmetic, check_space, find_start, identity, list_changes
from .run_folder import STOPPED_FILE, lock_run_folder
from .signals import Stopped, StopRequests
from .step import StepResult, TrainStep, validation_losses
from .throughput import measure_matmul_flops, model_flops_utilization, peak_memory_bytes


class NonFiniteError(RuntimeError):
    """A loss or gradient was not finite. The parameters are those of the last finite step."""

    exit_status = 3


@dataclass(frozen=True)
class Hooks:
    """Functions of the caller, called on the main process while the other processes wait.

    Args:
        complete_milestone (`Callable[[Path, str], None]`, *optional*): called with the temporary folder of a milestone
            and its name, to add files.
        after_milestone (`Callable[[Path, Path], None]`, *optional*): called with the folders of the run and the
            milestone.
        after_checkpoint (`Callable[[Path], None]`, *optional*): called with the folder of the run.
    """

    complete_milestone: Callable[[Path, str], None] | None = None
    after_milestone: Callable[[Path, Path], None] | None = None
    after_checkpoint: Callable[[Path], None] | None = None


@dataclass(frozen=True)
class PreparedRun:
    """A run that is checked and ready for its first step; nothing is written yet."""

    run: setup.PretrainRun
    accelerator: Accelerator
    model: TinyLlamaForCausalLM
    start: Start
    compiles_layers: bool
    overwrite: bool
    summary: list[str]

    def known_device(self) -> Device | None:
        """The GPU of this process, `None` for a CPU or a GPU that is not in the table of devices."""
        return known_device(launch.device_name(self.accelerator.device))

    def print(self, *lines: str) -> None:
        """Prints lines on the main process."""
        if self.accelerator.is_main_process:
            print("\n".join(lines), flush=True)

    def dry_run_lines(self) -> list[str]:
        """The beginning of the first block, and the folder that training would write."""
        mixture = self.run.mixture
        tokens = mixture.tokens(mixture.blocks(0, 1))[0][:48]
        return [
            f"first block {self.run.tokenizer.decode(tokens)!r}",
            f"would write {self.run.output}/ (dry run: nothing was written)",
        ]


def prepare_run(config: PretrainConfig, overwrite: bool = False) -> PreparedRun:
    """Checks a recipe against its data, the machine and `output_dir`, and builds the model; writes nothing.

    Args:
        config (`PretrainConfig`): from [`load_pretrain_config`].
        overwrite (`bool`, *optional*, defaults to `False`): remove the run in `output_dir` and start over.

    Raises:
        InputError: for anything that would fail later.
    """
    for name in config.logging.trackers:
        require(name, "trackers", f"logging.trackers: {name}")  # accelerate would only warn
    config = config.with_precision(choose_precision())
    accelerator = launch.make_accelerator(config)
    run = setup.open_pretrain_run(config)
    setup.check_batches(config, accelerator.num_processes)
    launch.check_attention_and_kernels(config.training, config.data.document_masking, accelerator.device)
    compiles_layers, compilation = launch.resolve_compile(config.training.compile, accelerator.device)
    start = find_start(run, accelerator, overwrite)
    model = setup.build_model(run)
    check_space(run, start, sum(p.numel() for p in model.parameters()), overwrite)
    summary = [*setup.describe_run(run, model, accelerator.num_processes, compilation), *start.summary]
    return PreparedRun(run, accelerator, model, start, compiles_layers, overwrite, summary)


def train_run(prepared: PreparedRun, measure_peak: bool = False, hooks: Hooks | None = None) -> None:
    """Trains until the last step, and writes metrics, checkpoints and milestones.

    Args:
        prepared (`PreparedRun`): from [`prepare_run`].
        measure_peak (`bool`, *optional*, defaults to `False`): also log the share of the measured matrix rate.
        hooks (`Hooks`, *optional*): called at milestones and checkpoints.

    Raises:
        InputError: if another process is training in the folder, or a tracker cannot be started.
        NonFiniteError: at the logging step after a loss or gradient that is not finite.
        Stopped: after SIGTERM or SIGINT, once the step is finished and a checkpoint written.
        FullDiskError: if a file cannot be written; earlier checkpoints are intact.
    """
    run, accelerator, start, config = prepared.run, prepared.accelerator, prepared.start, prepared.run.config
    if start.step == config.steps.number:
        return
    launch.prepare_layers(prepared.model, config.training, prepared.compiles_layers)
    accelerator.wait_for_everyone()  # until no process is checking the folder
    with lock_run_folder(run, accelerator, prepared.overwrite, start.step):
        trainer = _Trainer(prepared, measure_peak, hooks or Hooks())
        start_trackers(accelerator, config, config.logging.trackers, run.output, start.step)
        trainer.train()
        with translate_write_errors(run.output):  # the trackers' own files
            accelerator.end_training()


class _Trainer:
    """The state of a running run, and what is done at its steps."""

    def __init__(self, prepared: PreparedRun, measure_peak: bool, hooks: Hooks):
        run, accelerator, start = prepared.run, prepared.accelerator, prepared.start
        model, optimizer = launch.wrap(accelerator, prepared.model, run.config)
        self.run, self.config, self.accelerator, self.model, self.hooks = run, run.config, accelerator, model, hooks
        self.train_step = TrainStep(run.config, run.mixture, accelerator, model, optimizer, start.branched_at)
        if start.checkpoint:
            read_checkpoint(start.checkpoint, self.train_step)
        self.start, self.branched_at, self.last_checkpoint = start.step, start.branched_at, start.checkpoint
        self.flops_per_token = accelerator.unwrap_model(model).flops_per_token(run.config.data.sequence_length)
        self.arithmetic = arithmetic(run.config, accelerator)
        if start.arithmetic and (changes := list_changes(start.arithmetic, self.arithmetic)):
            accelerator.print(
                "warning: from here on the results equal those of an uninterrupted run only within rounding "
                f"({'; '.join(changes)})"
            )
        self.validation_loss: float | None = None
        self.matmul_flops: float | None = None  # for `matmul_share` in the metrics
        if measure_peak:
            precision = run.config.training.precision
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            self.matmul_flops = measure_matmul_flops(accelerator.device, dtype)
            rate = f"{self.matmul_flops / 1e9:,.1f} GFLOP/s, measured, of matrix products in {precision}"
            accelerator.print(f"peak        {rate}")

    def train(self) -> None:
        """Runs the remaining steps."""
        config, run, steps = self.config, self.run, self.config.steps
        total = steps.tokens_after(steps.number)
        with (
            Metrics(run.output, total, self.accelerator.is_main_process, self.start) as self.metrics,
            StopRequests() as requests,
        ):
            self.clock, self.clock_tokens, self.paused = time.perf_counter(), steps.tokens_after(self.start), 0.0
            if config.model.init_from and self.start == 0:
                self.validate(0)  # shows whether the weights suit the data
            for step in range(self.start + 1, steps.number + 1):
                result, is_last = self.train_step(step), step == steps.number
                if step == self.start + 1:
                    loss, seconds = result.loss.item(), time.perf_counter() - self.clock - self.paused
                    self.metrics.print_line(f"step {step:>6}  first of this launch: loss {loss:.3f}, {seconds:.1f} s")
                is_milestone = step in run.milestones
                if step % config.logging.every_steps == 0 or is_last:
                    self.report(step, result)
                if is_milestone or self.is_due(step, config.validation.every_tokens):
                    self.validate(step)
                if is_milestone:
                    self.milestone(step)
                asked = requests.requested_signal()
                if is_milestone or asked or self.is_due(step, config.checkpoints.every_tokens):
                    self.checkpoint(step)
                if asked and not is_last:
                    self.stop(step, signal.Signals(asked).name)

    def stop(self, step: int, request: str) -> None:
        """Ends the run on request, after a checkpoint of this step."""
        tokens = self.config.steps.tokens_after(step)
        if self.accelerator.is_main_process:
            with translate_write_errors(self.run.output):
                write_json(self.run.output / STOPPED_FILE, {"step": step, "tokens": tokens, "request": request})
        self.accelerator.wait_for_everyone()  # a launcher ends the other processes when the first one exits
        raise Stopped(
            f"{request} after step {step:,} ({tokens:,} tokens). The same command resumes from {self.last_checkpoint}."
        )

    def is_due(self, step: int, every_tokens: int) -> bool:
        """Whether the step reaches or crosses a multiple of `every_tokens`."""
        steps = self.config.steps
        return steps.tokens_after(step) // every_tokens > steps.tokens_after(step - 1) // every_tokens

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time of the context from tokens per second."""
        began = time.perf_counter()
        yield
        self.paused += time.perf_counter() - began

    def check_finite(self) -> None:
        """Stops the run if a step since the last check was not finite."""
        if (bad_step := int(self.train_step.bad_step.item())) < 0:
            return
        names = [source.path for source in self.config.data.sources]
        counts = Counter(names[block.source] for block in self.train_step.blocks(bad_step))
        raise NonFiniteError(
            f"step {bad_step} ({self.config.steps.tokens_after(bad_step):,} tokens): the loss or the gradient was not "
            "finite. It did not change the parameters, and nothing was saved after it. Its blocks: "
            f"{', '.join(f'{count} of {name}' for name, count in sorted(counts.items()))}. Last checkpoint: "
            f"{self.last_checkpoint or 'none'}. Lower schedule.peak, raise schedule.warmup_tokens, or inspect the "
            "data of that step."
        )

    def report(self, step: int, result: StepResult) -> None:
        """Logs a step."""
        config, tokens = self.config, self.config.steps.tokens_after(step)
        self.check_finite()
        now = time.perf_counter()
        seconds = now - self.clock - self.paused
        rate = (tokens - self.clock_tokens) / seconds
        device = self.accelerator.device
        processes = self.accelerator.num_processes
        row: dict[str, Any] = {
            "step": step,
            "tokens": tokens,
            "loss": result.loss.item(),
            "learning_rate": result.learning_rate,
            "gradient_norm": result.gradient_norm.item(),
            "blocks": [config.steps.tokens_after(n) // config.data.sequence_length for n in (step - 1, step)],
            "block_ids": provenance.fingerprint(self.train_step.blocks(step))[:16],
            "tokens_per_second": rate,
            "mfu": model_flops_utilization(rate, self.flops_per_token, launch.device_name(device), processes),
            "data_wait_share": self.train_step.wait_seconds / seconds,
            "peak_memory_bytes": peak_memory_bytes(device),
            "seconds_left": (config.steps.tokens_after(config.steps.number) - tokens) / rate,
        }
        if config.training.skip_spikes_sigma is not None:
            row["skipped_steps"] = int(self.train_step.skipped.item())
        if self.matmul_flops:
            row["matmul_share"] = rate * self.flops_per_token / (self.matmul_flops * processes)
            row["matmul_precision"] = config.training.precision
        self.clock, self.clock_tokens, self.paused, self.train_step.wait_seconds = now, tokens, 0.0, 0.0
        self.log(row)

    def log(self, row: dict[str, Any]) -> None:
        """Writes a row of metrics to the file and the trackers."""
        self.metrics.log(row)
        with translate_write_errors(self.run.output):
            self.accelerator.log(row_values(row), step=row["step"])

    def validate(self, step: int) -> None:
        """Logs the loss on the held-out blocks of each source, and their mean weighted by share."""
        self.check_finite()
        with self.pause():
            losses = validation_losses(self.run, self.accelerator, self.model)
            self.validation_loss = sum(loss * share for loss, share in zip(losses, self.run.shares, strict=True))
            names = [source.path for source in self.config.data.sources]
            self.log(
                {
                    "step": step,
                    "tokens": self.config.steps.tokens_after(step),
                    "validation_loss": self.validation_loss,
                    "validation_loss_by_source": dict(zip(names, losses, strict=True)),
                }
            )

    def milestone(self, step: int) -> None:
        """Writes the milestone of a step."""
        with self.pause():
            run, name = self.run, self.run.milestones[step]
            folder = run.output / MILESTONES_FOLDER / name
            weights = export_weights(self.model)
            if self.accelerator.is_main_process:
                record = {
                    "step": step,
                    "tokens": self.config.steps.tokens_after(step),
                    "validation_loss": self.validation_loss,
                    "num_processes": self.accelerator.num_processes,
                    "data": {source.path: source.fingerprint for source in run.record.sources},
                }
                model = self.accelerator.unwrap_model(self.model)
                text = self.config.to_yaml()
                with translate_write_errors(folder):
                    write_milestone(folder, model, run.tokenizer, text, record, weights, self.hooks.complete_milestone)
                self.metrics.print_line(f"step {step:>6}  wrote {folder}")
                if self.hooks.after_milestone:
                    self.hooks.after_milestone(run.output, folder)
            self.accelerator.wait_for_everyone()

    def checkpoint(self, step: int) -> None:
        """Writes a checkpoint, also as the training state of a milestone, and removes old ones."""
        self.check_finite()
        with self.pause():
            self.metrics.sync()
            output, state = self.run.output, None
            folder = output / CHECKPOINTS_FOLDER / f"step-{step}"
            if self.config.milestones.keep_training_state and step in self.run.milestones:
                state = output / TRAINING_STATE_FOLDER / self.run.milestones[step]
            record = CheckpointRecord(
                step=step,
                tokens=self.config.steps.tokens_after(step),
                branched_at=self.branched_at,
                identity=identity(self.run),
                arithmetic=self.arithmetic,
                provenance=provenance.collect(),
            )
            write_checkpoint(folder, self.train_step, record, state)
            self.last_checkpoint = folder
            if self.accelerator.is_main_process:
                prune_checkpoints(output, self.config.checkpoints.keep, step)
                if self.hooks.after_checkpoint:
                    self.hooks.after_checkpoint(output)
            self.accelerator.wait_for_everyone()
