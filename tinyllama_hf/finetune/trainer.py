"""Runs a trainer of TRL as solidly as pretraining runs: it resumes, evaluates, logs and stops on request."""

import contextlib
import logging
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers import (
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
)

from ..errors import InputError, require
from ..files import locked, remove_folder, write_text
from ..inference.load import load, load_stock
from ..pretrain.metrics import Metrics, flat, start_trackers
from ..pretrain.milestones import CONFIG_FILE
from ..pretrain.run_folder import empty_run_folder
from ..pretrain.signals import Stopped, StopRequests
from ..provenance import fingerprint, weight_hashes
from .config import AdapterSection, FinetuneConfig
from .conversations import HELD_OUT_FILE
from .run_callback import RunCallback
from .run_checkpoints import (
    CHECKPOINTS_FOLDER,
    RunState,
    check_same_settings,
    checkpoint_folder,
    checkpoint_folders,
    last_checkpoint,
    read_state,
    remove_checkpoints,
)
from .training_order import TrainingOrder


if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel


TrainedModel: TypeAlias = "LlamaForCausalLM | PeftModel"
# Makes a trainer of TRL from its common arguments, the model, the adapter and the callbacks.
MakeTrainer: TypeAlias = Callable[
    [dict[str, Any], PreTrainedModel, "LoraConfig | None", list[TrainerCallback]], Trainer
]
_OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}
# Keys that do not change what is trained.
_FREE = {"output_dir", "logging.every_steps", "logging.trackers", "checkpoints.every_steps", "checkpoints.keep"}


@dataclass(frozen=True)
class OpenedRun:
    """A checked recipe, and what was loaded for it before the first step.

    Attributes:
        config (`FinetuneConfig`): complete, without values that are left to the machine or the data.
        output (`Path`): folder of the run.
        base (`Path`): folder of the base model.
        tokenizer (`PreTrainedTokenizerFast`): with the chat template.
        template (`str`): describes the choice of the template.
        order (`TrainingOrder`): what each step trains on.
        settings (`dict`): settings and fingerprints of data and base, flat; a run resumes only with the same.
        held_out_rows (`str`): the held-out data as JSON lines.
    """

    config: FinetuneConfig
    output: Path
    base: Path
    tokenizer: PreTrainedTokenizerFast
    template: str
    order: TrainingOrder
    settings: dict[str, Any]
    held_out_rows: str

    @property
    def intervals(self) -> dict[str, int]:
        """Steps between two rows of the log, two evaluations and two checkpoints."""
        evaluation = self.config.evaluation.every_steps or max(1, len(self.order.steps) // 10)
        return {
            "logging": self.config.logging.every_steps,
            "evaluation": evaluation,
            "checkpoints": self.config.checkpoints.every_steps or evaluation,
        }


def check_machine(config: FinetuneConfig) -> None:
    """Checks that this machine and its packages can train with the settings of a recipe.

    Raises:
        InputError: naming the key and what is missing.
    """
    training, has_gpu = config.training, torch.cuda.is_available()
    for name in config.logging.trackers:
        require(name, "trackers", f"logging.trackers: {name}")
    if training.optimizer != "adamw":
        require("bitsandbytes", "quantization", f"training.optimizer: {training.optimizer}")
        if not has_gpu:
            raise InputError(
                f"training.optimizer: {training.optimizer} needs a GPU (bitsandbytes 0.50 has no optimizer for a "
                "CPU), and none was found; use adamw"
            )
    if training.kernels == "liger":
        if not has_gpu:
            raise InputError("training.kernels: liger needs a GPU, and none was found; use none")
        require("liger_kernel", "gpu", "training.kernels: liger")
    if config.adapter.kind == "qlora":
        require("bitsandbytes", "quantization", "adapter.kind: qlora")
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise InputError(
            "accelerate launches FSDP, which fine-tuning does not support. Use one process, or DDP (several processes "
            "with the whole model each)"
        )


def processes() -> PartialState:
    """Returns the launched processes. `PartialState` (accelerate 1.15) needs `cpu` on a CPU, as Trainer passes it."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def rows_per_step(config: FinetuneConfig) -> int:
    """Returns the number of forward passes of a step, of all processes together.

    Raises:
        InputError: if the processes cannot share them evenly.
    """
    sequences, micro, number = config.training.sequences_per_step, config.training.micro_batch_size, _num_processes()
    if sequences % (micro * number):
        raise InputError(
            f"training.micro_batch_size: {micro} x {number} processes does not divide the {sequences} "
            "sequences of a step. Change one of them"
        )
    return sequences // micro


def run_settings(config: FinetuneConfig, base: Path, tokenizer: PreTrainedTokenizerFast, data: Any) -> dict[str, Any]:
    """Returns what decides the weights of a run: settings, and fingerprints of data, base model and tokenizer.

    Args:
        config (`FinetuneConfig`): the complete recipe.
        base (`Path`): folder of the base model.
        tokenizer (`PreTrainedTokenizerFast`): with the chat template.
        data (`Any`): rendered conversations or pairs, for training and held out; can be written as JSON.
    """
    settings = {key: value for key, value in flat(config.model_dump(mode="json")).items() if key not in _FREE}
    return {
        **settings,
        "data": fingerprint(data),
        "base model": fingerprint(weight_hashes(base)),
        "chat template": fingerprint(tokenizer.chat_template),
        "processes": _num_processes(),
    }


def load_base(run: OpenedRun) -> PreTrainedModel:
    """Loads the base model in the precision in which it is trained.

    All weights are trained in fp32, since updates of bf16 weights would be lost by rounding. Under an adapter, the
    frozen weights are in the precision of the run, or in 4 bit.
    """
    kind, device = run.config.adapter.kind, processes().device
    name = "cpu" if device.type == "cpu" else str(device)  # on a CPU each process has a number
    wanted = torch.bfloat16 if run.config.training.precision == "bf16" else torch.float32
    if kind == "qlora":
        model, _ = load(run.base, wanted, name, "nf4", trainable=True)
    else:
        model, _ = load_stock(run.base, name, torch.float32 if kind == "full" else wanted)
    add_token_rows(model, len(run.tokenizer))
    model.config.pad_token_id = run.tokenizer.pad_token_id  # required by TRL and Trainer; not saved
    return model


def add_token_rows(model: PreTrainedModel, num_tokens: int) -> PreTrainedModel:
    """Adds rows to the embeddings of a model whose vocabulary has fewer tokens: each is the mean of the others."""
    rows = model.config.vocab_size
    if num_tokens > rows:
        model.resize_token_embeddings(num_tokens, mean_resizing=False)
        embeddings: Any = (model.get_input_embeddings(), model.get_output_embeddings())
        for weight in (embedding.weight.data for embedding in embeddings):
            weight[rows:] = weight[:rows].mean(0)
    return model


def lora_config(adapter: AdapterSection, is_tied: bool) -> "LoraConfig | None":
    """Returns PEFT's configuration of an adapter, `None` if all weights are trained.

    Args:
        adapter (`AdapterSection`): settings of the recipe.
        is_tied (`bool`): whether input and output embedding of the model share their weights.
    """
    from peft import LoraConfig

    if adapter.kind == "full":
        return None
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # peft divides it by the rank, so fractions work
        lora_dropout=adapter.dropout,
        target_modules="all-linear" if adapter.targets == ["all-linear"] else adapter.targets,
        modules_to_save=adapter.modules_to_save or None,
        ensure_weight_tying=is_tied and bool(adapter.modules_to_save),
        use_dora=adapter.kind == "dora",
        task_type="CAUSAL_LM",
    )


@contextlib.contextmanager
def quiet_trl() -> Iterator[None]:
    """Silences TRL's (1.16) advice about batches of one row, which are packed here, and its own deprecated calls."""
    logger = logging.getLogger("trl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(before)


def find_state(run: OpenedRun, overwrite: bool) -> tuple[int, RunState]:
    """Returns the step and the state from which a run starts or resumes.

    Raises:
        InputError: if the run was started with other settings or data.
    """
    found = None if overwrite else last_checkpoint(run.output)
    if found is None:
        return 0, RunState(run.settings, {}, [])
    check_same_settings(run.output, found[1].settings, run.settings)
    return found


def train(
    run: OpenedRun,
    make_trainer: MakeTrainer,
    evaluate: Callable[[PreTrainedModel], dict[str, float]],
    finish: Callable[[TrainedModel, RunState], None],
    overwrite: bool = False,
    after_checkpoint: Callable[[Path], None] | None = None,
) -> None:
    """Trains until the last step or the last useful one, and then writes the model.

    Args:
        run (`OpenedRun`): what to train.
        make_trainer (`MakeTrainer`): creates the trainer.
        evaluate (`Callable`): returns `validation_loss`, and possibly more, of a model; all processes call it.
        finish (`Callable`): writes the finished model; called on the main process.
        overwrite (`bool`, *optional*, defaults to `False`): start over.
        after_checkpoint (`Callable`, *optional*): called with the folder of the run.

    Raises:
        InputError: if the run cannot be resumed, or another process is training in the folder.
        Stopped: after SIGTERM or SIGINT, once the step is finished and a checkpoint written.
        DivergedError: at the first step whose loss or gradient is not finite.
    """
    step, state = find_state(run, overwrite)
    processes().wait_for_everyone()  # until no process is reading checkpoints that are removed next
    is_main = processes().is_main_process
    with locked(run.output / ".lock", f"output_dir {run.output}") if is_main else contextlib.nullcontext():
        if is_main:
            _prepare_folder(run, step, overwrite)
        processes().wait_for_everyone()
        with Metrics(run.output, run.order.tokens_after()[-1], is_main, step) as metrics, StopRequests() as requests:
            callback = RunCallback(run, state, evaluate, metrics, requests, after_checkpoint)
            model = _trained(run, make_trainer, callback, step)
        if is_main:
            finish(model, state)
            remove_folder(run.output / CHECKPOINTS_FOLDER)
        processes().wait_for_everyone()
        assert callback.accelerator is not None
        callback.accelerator.end_training()  # ends trackers and the process group


def _trained(run: OpenedRun, make_trainer: MakeTrainer, callback: RunCallback, step: int) -> TrainedModel:
    model = load_base(run)
    adapter = lora_config(run.config.adapter, model.config.tie_word_embeddings)
    with quiet_trl():
        trainer = make_trainer(common_arguments(run), model, adapter, [callback])
    trainer.remove_callback(PrinterCallback)
    assert trainer.model is not None
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            # TRL (1.16) rounds the adapter of quantized weights to bf16, in which small updates are lost.
            parameter.data = parameter.data.float()
    callback.accelerator = trainer.accelerator
    if trackers := run.config.logging.trackers:
        trainer.accelerator.log_with = list(trackers)
        start_trackers(trainer.accelerator, run.config, trackers, run.output, step)
    if callback.is_exhausted:  # it was killed while the model was written
        trainer._load_from_checkpoint(str(checkpoint_folder(run.output, step)))
        trainer.state.global_step = step
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint_folder(run.output, step)) if step else None)
    done, best = trainer.state.global_step, callback.run_state.best_step
    if callback.signal and done < len(run.order.steps):
        name, folder = signal.Signals(callback.signal).name, checkpoint_folder(run.output, done)
        raise Stopped(f"{name} after step {done:,}. The same command resumes from {folder}.")
    if run.config.evaluation.keep == "best" and best != done:
        trainer._load_from_checkpoint(str(checkpoint_folder(run.output, best)))
    return trainer.accelerator.unwrap_model(trainer.model)


def _prepare_folder(run: OpenedRun, step: int, overwrite: bool) -> None:
    """Writes the recipe, and removes checkpoints that are incomplete or of a run that is replaced."""
    if overwrite:
        empty_run_folder(run.output)
    # Written first, since a folder that has this file is recognized as a run and can be resumed.
    write_text(run.output / HELD_OUT_FILE, run.held_out_rows)
    complete = {number for number, folder in checkpoint_folders(run.output).items() if read_state(folder)}
    remove_checkpoints(run.output, complete if step else set())
    write_text(run.output / CONFIG_FILE, run.config.to_yaml())


def _num_processes() -> int:
    return processes().num_processes


def common_arguments(run: OpenedRun) -> dict[str, Any]:
    """Returns the arguments that all trainers of TRL take."""
    training = run.config.training
    rows = 1 if run.order.packing else training.micro_batch_size
    return {
        "output_dir": str(run.output / CHECKPOINTS_FOLDER),
        "max_steps": len(run.order.steps),
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.schedule,
        "warmup_steps": training.warmup_steps,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": run.order.rows_per_step // _num_processes(),
        "train_sampling_strategy": "sequential",  # the data are in the order of training
        "optim": _OPTIMIZERS[training.optimizer],
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.gradient_clip,
        "bf16": training.precision == "bf16",
        "use_cpu": processes().device.type == "cpu",  # Trainer refuses bf16 on a CPU without it
        "seed": training.seed,
        "neftune_noise_alpha": training.neftune_alpha,
        "activation_checkpointing": training.activation_checkpointing,  # on by default in TRL
        "use_liger_kernel": training.kernels == "liger",
        "remove_unused_columns": False,
        "logging_steps": 1,  # to the callback
        "logging_nan_inf_filter": False,
        "save_strategy": "no",  # when the callback asks for it
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
        "report_to": "none",
    }
