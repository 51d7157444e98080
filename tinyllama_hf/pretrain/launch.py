"""How a run meets its devices: accelerate, sharding, attention, kernels, compilation.

What a recipe asks for and the machine cannot do is an error, never another way of doing it.
"""

import datetime
import os
import shutil
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, InitProcessGroupKwargs, TorchDynamoPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..errors import InputError, require
from ..modeling_tinyllama import TinyLlamaForCausalLM


if TYPE_CHECKING:  # benchmarks/gpu runs this where pydantic is not installed
    from .config import PretrainConfig, TrainingSection


# transformers' names for our attention setting, where they differ.
_ATTENTION = {"flex": "flex_attention"}
# sdpa for sequences that are not packed. transformers (5.23) looks at the positions of every batch for packed documents:
# that waits for the device at each micro-batch, and makes a dense mask where the whole model is compiled. It makes no mask
# for an attention that it does not know, and sdpa without one is causal.
_UNPACKED_SDPA = "unpacked_sdpa"
AttentionInterface.register(_UNPACKED_SDPA, sdpa_attention_forward)
# A milestone that the main process writes or scores keeps the others waiting.
_TIMEOUT = datetime.timedelta(hours=2)


def make_accelerator(config: "PretrainConfig") -> Accelerator:
    """The accelerator of a run, checked against the recipe.

    Raises:
        InputError: for launch settings under which the recipe would not mean what it says.
    """
    if config.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; or cuBLAS refuses
        torch.use_deterministic_algorithms(True)
    precision = "no" if config.training.precision == "fp32" else config.training.precision
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and os.environ.get("ACCELERATE_USE_CPU") == "true":
        _shard_on_cpus(precision)
    elif AcceleratorState._shared_state:
        AcceleratorState._reset_state()  # accelerate keeps the precision of the first run of a process
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=config.logging.trackers or None,
        project_dir=config.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_TIMEOUT)],
    )
    _check_launch(accelerator)
    if accelerator.is_fsdp2 and precision == "bf16":
        # accelerate's own policy would also sum the gradients of micro-batches and processes in bf16.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    return accelerator


def device_name(device: torch.device) -> str | None:
    """As CUDA names it; `None` for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def _shard_on_cpus(precision: str) -> None:
    """Makes accelerate shard over CPU processes: 1.15 ignores its own settings there and trains unsharded, silently."""
    asks_for_mesh = os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true"
    state = AcceleratorState(
        mixed_precision=precision,
        dynamo_plugin=TorchDynamoPlugin(),
        parallelism_config=ParallelismConfig() if asks_for_mesh else None,
        _from_accelerator=True,
        timeout=_TIMEOUT,
    )
    # Both, as accelerate does itself: the accelerator copies the one over the other.
    PartialState._shared_state["distributed_type"] = state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin()


def _check_launch(accelerator: Accelerator) -> None:
    kinds = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)
    if accelerator.distributed_type not in kinds:
        raise InputError(
            f"accelerate launches {accelerator.distributed_type}; pretraining runs on one process, with "
            "DistributedDataParallel, or sharded by FSDP2: see recipes/accelerate"
        )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise InputError(
            "accelerate launches FSDP version 1; set fsdp_version: 2, as recipes/accelerate/fsdp2.yaml does"
        )
    if accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.activation_checkpointing:
        raise InputError(
            "accelerate's fsdp_activation_checkpointing is on; it belongs to the recipe: set "
            "training.activation_checkpointing there and leave it out of the launch settings"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise InputError(
            f"accelerate's gradient_accumulation_steps is {accelerator.gradient_accumulation_steps}; accumulation follows "
            "from training.tokens_per_step and training.micro_batch_size: leave it out of the launch command"
        )


def check_attention(training: "TrainingSection", document_masking: bool, device: torch.device) -> None:
    """Refuses an attention implementation that this machine cannot train with."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    name, on_gpu = training.attention, device.type == "cuda"
    packages = {
        "flash_attention_2": ("flash-attn", is_flash_attn_2_available),
        "flash_attention_3": ("flash_attn_3", is_flash_attn_3_available),
    }
    if name in packages:
        if not on_gpu:
            raise InputError(f"training.attention: {name} needs a GPU, and there is none; use sdpa")
        package, is_available = packages[name]
        if not is_available():
            raise InputError(
                f"training.attention: {name} needs the package {package}; install it, or use sdpa or flex"
            )
        if training.precision != "bf16":
            raise InputError(
                f"training.attention: {name} computes in bf16 only; set training.precision: bf16, or use sdpa"
            )
    if name == "flex" and not on_gpu:
        raise InputError("training.attention: flex has no backward pass on a CPU (torch 2.13); use sdpa")
    if document_masking and on_gpu and name in ("sdpa", "eager"):
        raise InputError(
            f"training.attention: {name} keeps documents apart with a mask of sequence_length x sequence_length for each "
            "sequence; on a GPU use flex, or set data.document_masking: false"
        )


def check_kernels(kernels: str, device: torch.device) -> None:
    """Refuses kernels that this machine cannot run."""
    if kernels == "liger":
        if device.type != "cuda":
            raise InputError("training.kernels: liger needs a GPU, and there is none; use none")
        require("liger_kernel", "gpu", "training.kernels: liger")


def prepare_layers(model: TinyLlamaForCausalLM, training: "TrainingSection", compiled: bool) -> None:
    """Applies kernels, activation checkpointing and compilation, in this order, before the model is wrapped."""
    if training.kernels == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        # The loss stays ours: its memory is bounded already.
        apply_liger_kernel_to_llama(cross_entropy=False, fused_linear_cross_entropy=False, model=model)
    if training.activation_checkpointing:
        # Called activation_checkpointing_enable from transformers 5.23 on, which warns of this name; 5.17 has only this.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if compiled and training.compile == "model":
        model.compile()
    elif compiled:
        for layer in model.model.layers:
            layer.compile()


def attention_implementation(training: "TrainingSection", document_masking: bool) -> str:
    """The name that transformers has for the recipe's attention."""
    if training.attention == "sdpa" and not document_masking:
        return _UNPACKED_SDPA
    return _ATTENTION.get(training.attention, training.attention)


def compiles(setting: str, device: torch.device) -> tuple[bool, str]:
    """Whether something is compiled, and the sentence that says so.

    Raises:
        InputError: if compilation is asked for and no compiler is found.
    """
    # What inductor calls: a C++ compiler for CPU kernels, a C compiler for triton's launchers.
    variable, names = ("CC", ("gcc", "cc", "clang")) if device.type == "cuda" else ("CXX", ("g++", "clang++"))
    compiler = next((name for name in (os.environ.get(variable), *names) if name and shutil.which(name)), None)
    if setting == "off":
        return False, "off"
    if compiler is None:
        if setting != "auto":
            raise InputError(
                f"training.compile: {setting} needs a compiler, and none of {', '.join(names)} is found; use off"
            )
        return False, "off (auto: no compiler found)"
    if setting == "auto" and device.type != "cuda":
        return False, "off (auto: no GPU)"
    return True, "the whole model" if setting == "model" else "per layer"


def adamw_settings(config: "PretrainConfig") -> dict[str, Any]:
    """The recipe's settings of AdamW but the learning rate, which each step sets."""
    optimizer = config.optimizer
    return {"betas": optimizer.betas, "eps": optimizer.eps, "weight_decay": optimizer.weight_decay}


def wrap(
    accelerator: Accelerator, model: TinyLlamaForCausalLM, config: "PretrainConfig"
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The model as the launch settings wrap or shard it, and its optimiser: AdamW on every parameter."""
    optimizer = torch.optim.AdamW(
        model.to(accelerator.device).parameters(),
        lr=config.schedule.peak,
        **adamw_settings(config),
        fused=True,
    )
    model, wrapped = accelerator.prepare(model, optimizer)
    if accelerator.is_fsdp2 and not all(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise RuntimeError("accelerate was asked to shard the model and has not")
    # accelerate's wrapper would skip steps by its own count of accumulation, and hides `found_inf`.
    return model, wrapped.optimizer
