"""From a checked recipe to the things that a run works with, and the facts that follow from it."""

import math
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from accelerate import Accelerator, DistributedType
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedTokenizerFast

from ..configuration_tinyllama import TinyLlamaConfig
from ..data.mixture import Mixture
from ..errors import InputError
from ..modeling_tinyllama import TinyLlamaForCausalLM
from ..tokenization_tinyllama import load_tokenizer, tokenizer_fingerprint
from .checkpoints import CONFIG_FILE, milestone_names, milestone_steps
from .config import PretrainConfig


class Run(NamedTuple):
    """A recipe with everything loaded that can be loaded before the first step."""

    config: PretrainConfig
    output: Path
    tokenizer: PreTrainedTokenizerFast
    mixture: Mixture
    model_config: TinyLlamaConfig
    validation: list  # per source, `[num_blocks, sequence_length + 1]` tokens
    milestones: dict[int, str]  # step -> name


def open_run(config: PretrainConfig, overwrite: bool = False) -> Run:
    """Checks everything that the recipe names and opens it; writes nothing.

    Raises:
        InputError: for data, tokenizer, model and output that cannot be used together.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    mixture = Mixture(
        [source.path for source in config.data.sources],
        [source.weight for source in config.data.sources],
        config.data.sequence_length,
        config.training.seed,
        tokenizer_fingerprint(tokenizer),
    )
    validation = mixture.validation_blocks(config.validation.max_tokens)
    output = Path(config.output_dir)
    if output.exists() and not output.is_dir():
        raise InputError(f"output_dir {output}: is a file; choose a folder")
    if output.exists() and any(output.iterdir()) and not (overwrite and (output / CONFIG_FILE).is_file()):
        hint = "pass --overwrite to start it anew" if (output / CONFIG_FILE).is_file() else "it is no run"
        raise InputError(f"output_dir {output}: is not empty; choose another folder ({hint})")
    steps = milestone_steps(config.milestones.tokens, config.training.tokens_per_step, config.num_steps)
    names = milestone_names(steps, config.training.tokens_per_step)
    check_attention(config.training.attention)
    built = model_config(config, tokenizer)
    tokenizer.model_max_length = built.max_position_embeddings  # saved with every milestone
    return Run(config, output, tokenizer, mixture, built, validation, names)


def model_config(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast) -> TinyLlamaConfig:
    """The model's configuration: preset and overrides, with vocabulary and separators of the tokenizer.

    Raises:
        InputError: for fields that together make no model, and a sequence longer than the context.
    """
    fields = {
        "max_position_embeddings": config.data.sequence_length,
        **config.model.overrides,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    try:
        built = TinyLlamaConfig.preset(config.model.preset, **fields)
        with torch.device("meta"):  # shapes only: the fields must make a model that runs
            TinyLlamaForCausalLM(built)(input_ids=torch.zeros(1, 2, dtype=torch.long))
    except (StrictDataclassError, ValueError, TypeError, KeyError, ArithmeticError, RuntimeError) as error:
        raise InputError(f"model.overrides: make no model: {' '.join(str(error).split())}") from error
    if config.data.sequence_length > built.max_position_embeddings:
        raise InputError(
            f"data.sequence_length: {config.data.sequence_length} is longer than the model's context, "
            f"model.overrides.max_position_embeddings {built.max_position_embeddings}; shorten the one or raise the other"
        )
    return built


def check_launch(accelerator: Accelerator) -> None:
    """Refuses launch settings under which the recipe would not mean what it says."""
    kinds = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in kinds:
        raise InputError(
            f"accelerate launches {accelerator.distributed_type}; this version trains on one process or with "
            "DistributedDataParallel only: use recipes/accelerate/cpu.yaml, or --multi_gpu"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise InputError(
            f"accelerate's gradient_accumulation_steps is {accelerator.gradient_accumulation_steps}; accumulation follows "
            "from training.tokens_per_step and training.micro_batch_size: leave it out of the launch command"
        )


def check_attention(attention: str) -> None:
    """Refuses an attention implementation that this machine cannot run."""
    if attention != "flash_attention_2":
        return
    from transformers.utils import is_flash_attn_2_available

    if not torch.cuda.is_available():
        raise InputError("training.attention: flash_attention_2 needs a GPU, and there is none; use sdpa")
    if not is_flash_attn_2_available():
        raise InputError("training.attention: flash_attention_2 needs the package flash-attn; use sdpa")


def accumulation_steps(config: PretrainConfig, num_processes: int) -> int:
    """Micro-batches of a process in a step.

    Raises:
        InputError: if processes x micro-batch does not divide the step, listing the sizes that do.
    """
    sequences, micro = config.sequences_per_step, config.training.micro_batch_size
    if sequences % (num_processes * micro):
        per_process, rest = divmod(sequences, num_processes)
        sizes = [size for size in range(1, per_process + 1) if not rest and per_process % size == 0]
        fix = f"sizes that do: {', '.join(map(str, sizes))}" if sizes else "change training.tokens_per_step"
        raise InputError(
            f"training.micro_batch_size: {micro} x {num_processes} processes does not divide the "
            f"{sequences} sequences of a step; {fix}"
        )
    return sequences // (num_processes * micro)


def compiles(setting: str, device: torch.device) -> tuple[bool, str]:
    """Whether layers are compiled, and the sentence that says so.

    Raises:
        InputError: if compilation is asked for and no compiler is found.
    """
    # What inductor calls: a C++ compiler for CPU kernels, a C compiler for triton's launchers.
    variable, names = ("CC", ("gcc", "cc", "clang")) if device.type == "cuda" else ("CXX", ("g++", "clang++"))
    compiler = next((name for name in (os.environ.get(variable), *names) if name and shutil.which(name)), None)
    if setting == "off":
        return False, "off"
    if compiler is None:
        if setting == "layers":
            raise InputError(
                f"training.compile: layers needs a compiler, and none of {', '.join(names)} is found; use off"
            )
        return False, "off (auto: no compiler found)"
    if setting == "auto" and device.type != "cuda":
        return False, "off (auto: no GPU)"
    return True, "per layer"


def facts(run: Run, model: TinyLlamaForCausalLM, num_processes: int, compile_says: str) -> list[str]:
    """The quantities that follow from a recipe, one line each."""
    config, training = run.config, run.config.training
    steps, step_tokens = config.num_steps, training.tokens_per_step
    total = steps * step_tokens
    parameters = sum(p.numel() for p in model.parameters())
    epochs = run.mixture.epochs(steps * config.sequences_per_step)
    lines = [
        f"model       {config.model.preset}: {parameters:,} parameters, {len(run.tokenizer):,} tokens in the vocabulary, "
        f"context {run.model_config.max_position_embeddings}",
        f"tokens      {total:,} in {steps:,} steps of {step_tokens:,} ({config.sequences_per_step} sequences of "
        f"{config.data.sequence_length}); {total / parameters:.2f} per parameter",
        f"a step      {num_processes} process(es) x {accumulation_steps(config, num_processes)} micro-batches of "
        f"{training.micro_batch_size} sequences, {training.precision}, compile {compile_says}",
        f"arithmetic  {model.flops_per_token(config.data.sequence_length) / 1e9:.4g} GFLOP a token (6 x parameters without "
        "the input embedding + attention, not halved)",
    ]
    for source, spec, epoch in zip(run.mixture.sources, config.data.sources, epochs, strict=True):
        lines.append(
            f"data        {spec.weight:.1%} {spec.path}: {len(source):,} blocks, {source.num_tail_tokens} tokens left "
            f"over, read {epoch:.2f} times"
        )
    for step, name in run.milestones.items():
        lines.append(f"milestone   step {step:,} -> {name}")
    return lines


def sample(run: Run, num_tokens: int = 48) -> str:
    """The beginning of the first training block, as the model will see it."""
    tokens = run.mixture.tokens(run.mixture.blocks(0, 1))[0][:num_tokens]
    return run.tokenizer.decode(tokens)


def training_yaml(config: PretrainConfig) -> str:
    """The configuration as it was used, overrides applied: a recipe that repeats the run."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def weighted(losses: list[float], weights: list[float]) -> float:
    """Mean of the sources' losses by their share of the training tokens."""
    return math.fsum(loss * weight for loss, weight in zip(losses, weights, strict=True))
