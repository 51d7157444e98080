"""Opens what a recipe names (data, tokenizer, model) and derives the facts of the run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedTokenizerFast

from ..configuration_tinyllama import TinyLlamaConfig
from ..data.mixture import Mixture
from ..data.shards import read_metadata
from ..errors import InputError
from ..inference.load import load, model_folder
from ..modeling_tinyllama import TinyLlamaForCausalLM
from ..presets import PRESETS
from ..tokenization_tinyllama import load_tokenizer, tokenizer_fingerprint
from .config import PretrainConfig
from .launch import attention_implementation
from .run_record import RunRecord, open_mixture, record_of_recipe
from .schedule import learning_rate


@dataclass(frozen=True)
class PretrainRun:
    """A recipe, and everything that is loaded before the first step."""

    config: PretrainConfig
    output: Path
    record: RunRecord
    tokenizer: PreTrainedTokenizerFast
    tokenizer_fingerprint: str
    mixture: Mixture
    model_config: TinyLlamaConfig
    validation: list[np.ndarray]  # per source, `[num_blocks, sequence_length + 1]` tokens
    validation_positions: list[np.ndarray]  # per source, `[num_blocks, sequence_length]`
    shares: list[float]  # of each source in the tokens of the run
    milestones: dict[int, str]  # step -> name


def open_pretrain_run(config: PretrainConfig) -> PretrainRun:
    """Opens and checks everything that the recipe names; writes nothing.

    Raises:
        InputError: if data, tokenizer, model or output folder cannot be used, or do not fit together.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    fingerprint = tokenizer_fingerprint(tokenizer)
    fingerprints = {source.path: read_metadata(source.path)["fingerprint"] for source in config.data.sources}
    record = record_of_recipe(config.model_dump(mode="json", by_alias=True), fingerprints)
    mixture = open_mixture(record, fingerprint)
    total_blocks = record.num_tokens // record.sequence_length
    shares = mixture.shares(total_blocks) if record.mixture_changes else mixture.weights
    validation, positions = mixture.validation_blocks(config.validation.max_tokens, shares)
    output = Path(config.output_dir)
    if output.exists() and not output.is_dir():
        raise InputError(f"output_dir {output}: is a file; choose a folder")
    names = {milestone.step: milestone.name for milestone in record.milestones}
    special_tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    built = architecture(config, len(tokenizer), **special_tokens)
    if config.model.init_from:
        check_initial_model(config.model.init_from, built)
    tokenizer.model_max_length = built.max_position_embeddings  # saved with every milestone
    return PretrainRun(
        config, output, record, tokenizer, fingerprint, mixture, built, validation, positions, shares, names
    )


def check_initial_model(name: str, expected: TinyLlamaConfig) -> None:
    """Checks that the architecture of `model.init_from` is that of the recipe; reads its config only.

    Raises:
        InputError: listing each field that differs.
    """
    found, wanted = _config_of(name).to_dict(), expected.to_dict()
    # The context may differ, since rotary positions have no weights.
    decisive = {
        *PRESETS["1.1b"],
        "vocab_size",
        "head_dim",
        "tie_word_embeddings",
        "rms_norm_eps",
        "rope_parameters",
        "hidden_act",
        "attention_bias",
        "mlp_bias",
    }
    if different := sorted(field for field in decisive if found.get(field) != wanted.get(field)):
        lines = "\n".join(
            f"  {field}: {found.get(field)} there, {wanted.get(field)} in the recipe" for field in different
        )
        fixes = ["prepare the data with the tokenizer of that model"] if "vocab_size" in different else []
        if different != ["vocab_size"]:
            fixes.append("remove model.preset and model.overrides to use its architecture")
        raise InputError(
            f"model.init_from {name}: its architecture differs from that of the recipe. To fix it, "
            f"{' and '.join(fixes)}\n{lines}"
        )


def _config_of(model: str) -> TinyLlamaConfig:
    return TinyLlamaConfig.from_llama(AutoConfig.from_pretrained(model_folder(model), trust_remote_code=False))


def architecture(config: PretrainConfig, vocab_size: int, **special_tokens: Any) -> TinyLlamaConfig:
    """The configuration of the model: preset and overrides, with the vocabulary size of the tokenizer.

    Without a preset, the architecture is that of `model.init_from`, with its context.

    Args:
        config (`PretrainConfig`): the recipe.
        vocab_size (`int`): of the tokenizer.
        **special_tokens: `bos_token_id` and `eos_token_id`.

    Raises:
        InputError: if the fields do not define a valid model, or a sequence is longer than the context.
    """
    preset = config.model.preset
    if preset is None:
        base = _config_of(str(config.model.init_from)).to_dict()
        del base["dtype"]  # of the saved weights; training keeps them in fp32
    else:
        base = {"max_position_embeddings": config.data.sequence_length}
    fields = {**base, **config.model.overrides, "vocab_size": vocab_size, **special_tokens}
    try:
        built = TinyLlamaConfig(**fields) if preset is None else TinyLlamaConfig.preset(preset, **fields)
        tokens = torch.zeros(1, 2, dtype=torch.long, device="meta")
        shapes_only(built)(input_ids=tokens)  # they must make one that runs
    except (StrictDataclassError, ValueError, TypeError, KeyError, ArithmeticError, RuntimeError) as error:
        raise InputError(f"model.overrides: do not define a valid model: {' '.join(str(error).split())}") from error
    if config.data.sequence_length > built.max_position_embeddings:
        raise InputError(
            f"data.sequence_length: {config.data.sequence_length} is longer than the context of the model, "
            f"model.overrides.max_position_embeddings {built.max_position_embeddings}. Lower the former or raise the "
            "latter."
        )
    return built


def shapes_only(config: TinyLlamaConfig) -> TinyLlamaForCausalLM:
    """The model on the meta device, which needs no memory for its weights."""
    with torch.device("meta"):
        return TinyLlamaForCausalLM(config)


def build_model(run: PretrainRun) -> TinyLlamaForCausalLM:
    """The model before the first step: initialized by the seed, or with the weights of `model.init_from`."""
    training = run.config.training
    torch.manual_seed(training.seed)
    implementation = attention_implementation(training, run.config.data.document_masking)
    model = TinyLlamaForCausalLM._from_config(run.model_config, attn_implementation=implementation)
    if run.config.model.init_from:
        initial, _ = load(run.config.model.init_from, dtype=torch.float32, device="cpu")
        model.load_state_dict(initial.state_dict())
    model.generation_config.pad_token_id = run.tokenizer.pad_token_id
    return model


def check_batches(config: PretrainConfig, num_processes: int) -> None:
    """Checks that processes x micro-batch divides every step.

    Raises:
        InputError: if not, listing the sizes that do.
    """
    micro = config.training.micro_batch_size
    for tokens in config.steps.sizes:
        sequences = tokens // config.data.sequence_length
        if sequences % (num_processes * micro):
            per_process, rest = divmod(sequences, num_processes)
            sizes = [size for size in range(1, per_process + 1) if not rest and per_process % size == 0]
            fix = f"Use {', '.join(map(str, sizes))}." if sizes else "Change training.tokens_per_step."
            raise InputError(
                f"training.micro_batch_size: {micro} x {num_processes} processes does not divide the "
                f"{sequences} sequences of a step. {fix}"
            )


def describe_recipe(
    config: PretrainConfig, model: TinyLlamaForCausalLM, num_processes: int, compilation: str
) -> list[str]:
    """The quantities that follow from a recipe without its data, one per line.

    Args:
        config (`PretrainConfig`): the recipe.
        model (`TinyLlamaForCausalLM`): only its shapes are needed, see [`shapes_only`].
        num_processes (`int`): of the run.
        compilation (`str`): from [`launch.resolve_compile`], or the setting of the recipe.
    """
    training, steps, length = config.training, config.steps, config.data.sequence_length
    total, parameters = steps.tokens_after(steps.number), sum(p.numel() for p in model.parameters())
    name = config.model.preset or config.model.init_from
    flops, flops_of_all = (
        model.flops_per_token(length, name) / 1e9 for name in ("without_input_embedding", "all_parameters")
    )
    sizes = ", then ".join(f"{size:,}" for size in steps.sizes)
    per_process = num_processes * training.micro_batch_size * length
    micro_batches = ", then ".join(str(size // per_process) for size in steps.sizes)
    return [
        f"model       {name}: {parameters:,} parameters, {model.config.vocab_size:,} tokens in the "
        f"vocabulary, context {model.config.max_position_embeddings}",
        f"tokens      {total:,} in {steps.number:,} steps of {sizes} ({config.sequences(1)} sequences of {length}); "
        f"{total / parameters:.2f} per parameter",
        f"a step      {num_processes} process(es) x {micro_batches} micro-batches of {training.micro_batch_size} "
        f"sequences, {training.precision}, attention {training.attention}, compile {compilation}",
        f"arithmetic  {flops:.4g} GFLOP a token (6 x parameters without the input embedding + attention, not halved); "
        f"{flops_of_all:.4g} with the input embedding",
        *_describe_warmup(config),
        *config.describe_defaults(),
    ]


def _describe_warmup(config: PretrainConfig) -> list[str]:
    """A warning if the learning rate never reaches its peak."""
    schedule, last = config.schedule, config.steps.number
    if schedule.warmup_tokens <= config.steps.tokens_after(last):
        return []
    return [
        f"warning     schedule.warmup_tokens {schedule.warmup_tokens:,} is more than the run has: the highest "
        f"learning rate is {learning_rate(last, config):.3g}, not schedule.peak {schedule.peak:g}"
    ]


def describe_run(run: PretrainRun, model: TinyLlamaForCausalLM, num_processes: int, compilation: str) -> list[str]:
    """[`describe_recipe`], the shares and epochs of the data, and the milestones."""
    lines = describe_recipe(run.config, model, num_processes, compilation)
    epochs = run.mixture.epochs(run.record.num_tokens // run.record.sequence_length)
    for spec, source, share, epoch in zip(run.record.sources, run.mixture.sources, run.shares, epochs, strict=True):
        lines.append(
            f"data        {share:.1%} {spec.path}: {len(source):,} blocks, {source.num_tail_tokens} tokens left over, "
            f"{epoch:.2f} epochs"
        )
    return [*lines, *(f"milestone   step {step:,} -> {name}" for step, name in run.milestones.items())]
