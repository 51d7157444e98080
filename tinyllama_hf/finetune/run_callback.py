"""What a fine-tuning run does at its steps in addition to training: metrics, evaluation, checkpoints, stopping."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..pretrain.metrics import Metrics, row_values
from ..pretrain.signals import StopRequests
from ..pretrain.throughput import peak_memory_bytes
from .run_checkpoints import RunState, checkpoint_folder, checkpoint_folders, complete_checkpoint, remove_checkpoints


if TYPE_CHECKING:
    from .trainer import OpenedRun


class DivergedError(RuntimeError):
    """A loss was not finite. Checkpoints before it are intact."""

    exit_status = 3


class RunCallback(TrainerCallback):
    """Called by the trainer, which logs every step and saves only when it is asked to.

    Args:
        run (`OpenedRun`): what is trained.
        state (`RunState`): as restored from a checkpoint, or new.
        evaluate (`Callable`): returns `validation_loss`, and possibly more, of a model; called by all processes.
        metrics (`Metrics`): where rows are written.
        requests (`StopRequests`): SIGTERM and SIGINT.
        after_checkpoint (`Callable`, *optional*): called with the folder of the run, on the main process.
    """

    def __init__(
        self,
        run: "OpenedRun",
        state: RunState,
        evaluate: Callable[[PreTrainedModel], dict[str, float]],
        metrics: Metrics,
        requests: StopRequests,
        after_checkpoint: Callable[[Path], None] | None = None,
    ):
        self.output, self.run_state, self.intervals = run.output, state, run.intervals
        self.tokens_after, self.patience = run.order.tokens_after(), run.config.evaluation.patience
        self.keep = run.config.checkpoints.keep
        self.evaluate, self.metrics, self.requests = evaluate, metrics, requests
        self.after_checkpoint = after_checkpoint
        self.accelerator: Accelerator | None = None  # the trainer's, once it is created
        self.signal = 0  # that stopped the run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluates the model before the first step."""
        self.clock, self.clock_step, self.paused = time.perf_counter(), state.global_step, 0.0
        if state.global_step == 0:
            self.validate(0, kwargs["model"])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called after each step, before the trainer saves."""
        logs = kwargs["logs"]
        if "loss" not in logs:
            return  # the trainer's summary at the end
        step, is_last = state.global_step, state.global_step == state.max_steps
        if not math.isfinite(logs["loss"]) or not math.isfinite(logs["grad_norm"]):
            raise DivergedError(
                f"step {step}: the loss or the gradient is not finite, training.learning_rate is "
                f"{args.learning_rate:g}. Lower it. Checkpoints of earlier steps are intact"
            )
        self.run_state.pending.append(logs["loss"])
        if self._is_due("logging", step) or is_last:
            self.report(step, logs)
        if self._is_due("evaluation", step) or is_last:
            self.validate(step, kwargs["model"])
            is_best = self.run_state.best_step == step
            control.should_save |= is_best
            control.should_training_stop |= self.is_exhausted
        self.signal = self.requests.requested_signal()
        control.should_save |= bool(self.signal) or is_last or self._is_due("checkpoints", step)
        control.should_training_stop |= bool(self.signal)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Completes a checkpoint, and removes old ones."""
        assert self.accelerator is not None
        self.accelerator.wait_for_everyone()  # each process writes the state of its random numbers
        if self.accelerator.is_main_process:
            began = time.perf_counter()
            self.metrics.sync()
            complete_checkpoint(checkpoint_folder(self.output, state.global_step), self.run_state)
            self._remove_old()
            if self.after_checkpoint:
                self.after_checkpoint(self.output)
            self.paused += time.perf_counter() - began
        self.accelerator.wait_for_everyone()

    def report(self, step: int, logs: dict[str, float]) -> None:
        """Writes a row with the mean loss of the steps since the last row."""
        assert self.accelerator is not None
        now, tokens, pending = time.perf_counter(), self.tokens_after, self.run_state.pending
        trained = tokens[step - 1] - (tokens[self.clock_step - 1] if self.clock_step else 0)
        rate = trained / (now - self.clock - self.paused)
        row = {
            "step": step,
            "tokens": tokens[step - 1],
            "loss": sum(pending) / len(pending),
            "learning_rate": logs["learning_rate"],
            "gradient_norm": logs["grad_norm"],
            "tokens_per_second": rate,
            "peak_memory_bytes": peak_memory_bytes(self.accelerator.device),
            "seconds_left": (tokens[-1] - tokens[step - 1]) / rate,
        }
        pending.clear()
        self.clock, self.clock_step, self.paused = now, step, 0.0
        self._log(row)

    def validate(self, step: int, model: PreTrainedModel) -> None:
        """Writes a row with the held-out loss of a model."""
        began = time.perf_counter()
        scores = self.evaluate(model)
        self.run_state.losses[step] = scores["validation_loss"]
        self._log({"step": step, "tokens": self.tokens_after[step - 1] if step else 0, **scores})
        self.paused += time.perf_counter() - began

    def _log(self, row: dict[str, Any]) -> None:
        assert self.accelerator is not None
        self.metrics.log(row)
        self.accelerator.log(row_values(row), step=row["step"])

    def _is_due(self, name: str, step: int) -> bool:
        return step % self.intervals[name] == 0

    @property
    def is_exhausted(self) -> bool:
        """Whether the run ends early, since the held-out loss has not become lower for too long."""
        since = [step for step in self.run_state.losses if step > self.run_state.best_step]
        return self.patience is not None and len(since) >= self.patience

    def _remove_old(self) -> None:
        newest = sorted(checkpoint_folders(self.output), reverse=True)
        remove_checkpoints(self.output, {*newest[: self.keep], self.run_state.best_step})
