"""Sets up a run on its devices: accelerate, sharding, attention, kernels, compilation.

A setting that the machine does not support is an error; there is no fallback.
"""

import datetime
import os
import shutil
from typing import TYPE_CHECKING

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


# sdpa for sequences that are not packed. transformers (5.23) searches the positions of every batch for packed
# documents, which waits for the device at each micro-batch, and creates a dense mask if the whole model is compiled.
# It creates no mask for an attention implementation that it does not know, and sdpa without a mask is causal.
UNPACKED_SDPA = "unpacked_sdpa"
AttentionInterface.register(UNPACKED_SDPA, sdpa_attention_forward)
# The other processes wait while the main process writes or scores a milestone.
_TIMEOUT = datetime.timedelta(hours=2)


def make_accelerator(config: "PretrainConfig") -> Accelerator:
    """Creates the accelerator of a run, and checks the launch settings against the recipe.

    Raises:
        InputError: for launch settings that would change the meaning of the recipe.
    """
    if config.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; cuBLAS requires it
        torch.use_deterministic_algorithms(True)
    precision = "no" if config.training.precision == "fp32" else config.training.precision
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and os.environ.get("ACCELERATE_USE_CPU") == "true":
        _shard_on_cpus(precision)
    elif AcceleratorState._shared_state:
        AcceleratorState._reset_state()  # otherwise accelerate keeps the precision of the first run
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=config.logging.trackers or None,
        project_dir=config.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_TIMEOUT)],
    )
    _check_launch(accelerator)
    if accelerator.is_fsdp2 and precision == "bf16":
        # accelerate's own policy would also reduce gradients in bf16.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    return accelerator


def device_name(device: torch.device) -> str | None:
    """The name of a CUDA device, `None` for a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def _shard_on_cpus(precision: str) -> None:
    """Makes accelerate shard over CPU processes; 1.15 silently ignores its own settings there and trains unsharded."""
    asks_for_mesh = os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true"
    state = AcceleratorState(
        mixed_precision=precision,
        dynamo_plugin=TorchDynamoPlugin(),
        parallelism_config=ParallelismConfig() if asks_for_mesh else None,
        _from_accelerator=True,
        timeout=_TIMEOUT,
    )
    # Both, as accelerate does itself: the accelerator copies one over the other.
    PartialState._shared_state["distributed_type"] = state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin()


def _check_launch(accelerator: Accelerator) -> None:
    kinds = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)
    if accelerator.distributed_type not in kinds:
        raise InputError(
            f"accelerate launches {accelerator.distributed_type}. Pretraining supports one process, "
            "DistributedDataParallel and FSDP2; see recipes/accelerate."
        )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise InputError(
            "accelerate launches FSDP version 1. Set fsdp_version: 2, as in recipes/accelerate/fsdp2.yaml."
        )
    if accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.activation_checkpointing:
        raise InputError(
            "accelerate's fsdp_activation_checkpointing is on. Remove it from the launch settings, and set "
            "training.activation_checkpointing in the recipe."
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise InputError(
            f"accelerate's gradient_accumulation_steps is {accelerator.gradient_accumulation_steps}. Remove it from "
            "the launch settings; accumulation follows from training.tokens_per_step and training.micro_batch_size."
        )


def check_attention_and_kernels(training: "TrainingSection", document_masking: bool, device: torch.device) -> None:
    """Checks that this machine can train with the attention implementation and the kernels of a recipe."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    name, on_gpu = training.attention, device.type == "cuda"
    packages = {
        "flash_attention_2": ("flash-attn", is_flash_attn_2_available),
        "flash_attention_3": ("flash_attn_3", is_flash_attn_3_available),
    }
    if name in packages:
        if not on_gpu:
            raise InputError(f"training.attention: {name} needs a GPU, and none was found; use sdpa")
        package, is_available = packages[name]
        if not is_available():
            raise InputError(
                f"training.attention: {name} needs the package {package}; install it, or use sdpa or flex"
            )
        if training.precision != "bf16":
            raise InputError(
                f"training.attention: {name} supports bf16 only; set training.precision: bf16, or use sdpa"
            )
    if name == "flex" and not on_gpu:
        raise InputError("training.attention: flex has no backward pass on a CPU (torch 2.13); use sdpa")
    if document_masking and on_gpu and name in ("sdpa", "eager"):
        raise InputError(
            f"training.attention: {name} with data.document_masking needs a mask of sequence_length x sequence_length "
            "per sequence. On a GPU use flex, or set data.document_masking: false."
        )
    if training.kernels == "liger":
        if not on_gpu:
            raise InputError("training.kernels: liger needs a GPU, and none was found; use none")
        require("liger_kernel", "gpu", "training.kernels: liger")


def prepare_layers(model: TinyLlamaForCausalLM, training: "TrainingSection", compiled: bool) -> None:
    """Applies kernels, activation checkpointing and compilation, in this order, before the model is wrapped."""
    if training.kernels == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        # Not the loss: ours already bounds its memory.
        apply_liger_kernel_to_llama(cross_entropy=False, fused_linear_cross_entropy=False, model=model)
    if training.activation_checkpointing:
        # transformers 5.23 renames it to activation_checkpointing_enable and warns about this name; 5.17 has only this
        # one.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if compiled and training.compile == "model":
        model.compile()
    elif compiled:
        for layer in model.model.layers:
            layer.compile()


def attention_implementation(training: "TrainingSection", document_masking: bool) -> str:
    """The name in transformers of the attention implementation."""
    if training.attention == "sdpa" and not document_masking:
        return UNPACKED_SDPA
    return "flex_attention" if training.attention == "flex" else training.attention


def resolve_compile(setting: str, device: torch.device) -> tuple[bool, str]:
    """Whether to compile, and a phrase that explains it.

    Raises:
        InputError: if the recipe requires compilation and no compiler is found.
    """
    # What inductor calls: a C++ compiler for CPU kernels, a C compiler for triton's launchers.
    variable, names = ("CC", ("gcc", "cc", "clang")) if device.type == "cuda" else ("CXX", ("g++", "clang++"))
    compiler = next((name for name in (os.environ.get(variable), *names) if name and shutil.which(name)), None)
    if setting == "off":
        return False, "off"
    if compiler is None:
        if setting != "auto":
            raise InputError(
                f"training.compile: {setting} needs a compiler ({', '.join(names)}), and none was found; use off"
            )
        return False, "off (auto: no compiler found)"
    if setting == "auto" and device.type != "cuda":
        return False, "off (auto: no GPU)"
    return True, "the whole model" if setting == "model" else "per layer"


def wrap(
    accelerator: Accelerator, model: TinyLlamaForCausalLM, config: "PretrainConfig"
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """Wraps or shards the model by the launch settings, and creates its optimizer, AdamW on every parameter."""
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        model.to(accelerator.device).parameters(),
        betas=settings.betas,  # every step sets the learning rate
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    model, wrapped = accelerator.prepare(model, optimizer)
    if accelerator.is_fsdp2 and not all(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise RuntimeError("accelerate was asked to shard the model and has not")
    # Unwrapped: accelerate's wrapper skips steps by its own count of accumulation, and hides `found_inf`.
    return model, wrapped.optimizer
