"""From a checked recipe to the things that a run works with, and the facts that follow from it."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from transformers import AutoConfig, PreTrainedTokenizerFast

from ..configuration_tinyllama import PRESETS, TinyLlamaConfig
from ..data.mixture import Mixture
from ..data.shards import TokenDataset
from ..errors import InputError
from ..inference.load import model_folder
from ..modeling_tinyllama import TinyLlamaForCausalLM
from ..tokenization_tinyllama import load_tokenizer, tokenizer_fingerprint
from .architecture import architecture
from .config import PretrainConfig
from .identity import identity
from .run_record import RunRecord, open_mixture, record_of_recipe


class Run(NamedTuple):
    """A recipe with everything loaded that can be loaded before the first step."""

    config: PretrainConfig
    output: Path
    record: RunRecord
    tokenizer: PreTrainedTokenizerFast
    mixture: Mixture
    model_config: TinyLlamaConfig
    validation: list  # per source, `[num_blocks, sequence_length + 1]` tokens
    shares: list[float]  # of the sources in all tokens of the run
    milestones: dict[int, str]  # step -> name
    identity: dict  # what makes it the same run
    validation_positions: list | None  # per source, `[num_blocks, sequence_length]`, where documents are kept apart


def open_run(config: PretrainConfig) -> Run:
    """Checks everything that the recipe names and opens it; writes nothing.

    Raises:
        InputError: for data, tokenizer, model and output that cannot be used together.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    fingerprint = tokenizer_fingerprint(tokenizer)
    record = record_of_recipe(config.model_dump(mode="json", by_alias=True))
    mixture = open_mixture(record, fingerprint)
    total_blocks = config.steps.tokens_after(config.steps.number) // config.data.sequence_length
    shares = mixture.shares(total_blocks) if config.data.mixture_changes else mixture.weights
    validation = mixture.validation_blocks(config.validation.max_tokens, shares)
    output = Path(config.output_dir)
    if output.exists() and not output.is_dir():
        raise InputError(f"output_dir {output}: is a file; choose a folder")
    names = {milestone.step: milestone.name for milestone in record.milestones}
    built = model_config(config, tokenizer)
    if config.model.init_from:
        check_initial_model(config.model.init_from, built)
    tokenizer.model_max_length = built.max_position_embeddings  # saved with every milestone
    same = identity(config, record, fingerprint)
    positions = _validation_positions(mixture, validation) if config.data.document_masking else None
    return Run(config, output, record, tokenizer, mixture, built, validation, shares, names, same, positions)


def _validation_positions(mixture: Mixture, validation: list) -> list:
    """Positions of the held-out blocks: what is trained on documents kept apart is measured on them kept apart."""
    sources = [TokenDataset(source.folder, mixture.block_size, "validation") for source in mixture.sources]
    return [
        np.stack([source.position_ids(index) for index in range(len(blocks))])
        for source, blocks in zip(sources, validation, strict=True)
    ]


def check_initial_model(name: str, expected: TinyLlamaConfig) -> None:
    """Refuses `model.init_from` if its architecture is not that of the recipe; reads its config only.

    Raises:
        InputError: naming each field that differs.
    """
    folder = model_folder(name)
    found = TinyLlamaConfig.from_llama(AutoConfig.from_pretrained(folder, trust_remote_code=False)).to_dict()
    wanted = expected.to_dict()
    # The context may differ: rotary positions have no weights.
    decisive = {*PRESETS["1.1b"], "vocab_size", "head_dim", "tie_word_embeddings", "rms_norm_eps", "rope_parameters",
                "hidden_act", "attention_bias", "mlp_bias"}  # fmt: skip
    if different := sorted(field for field in decisive if found.get(field) != wanted.get(field)):
        lines = "\n".join(f"  {field}: {found.get(field)} there, {wanted.get(field)} here" for field in different)
        raise InputError(f"model.init_from {name}: is another architecture than the recipe's\n{lines}")


def model_config(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast) -> TinyLlamaConfig:
    """The model's configuration, with vocabulary and separators of the tokenizer; errors as [`architecture`]."""
    return architecture(
        config, len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
    )


def check_batches(config: PretrainConfig, num_processes: int) -> None:
    """Refuses batches that do not divide.

    Raises:
        InputError: if processes x micro-batch does not divide a step, listing the sizes that do.
    """
    micro = config.training.micro_batch_size
    for tokens in config.steps.sizes:
        sequences = tokens // config.data.sequence_length
        if sequences % (num_processes * micro):
            per_process, rest = divmod(sequences, num_processes)
            sizes = [size for size in range(1, per_process + 1) if not rest and per_process % size == 0]
            fix = f"sizes that do: {', '.join(map(str, sizes))}" if sizes else "change training.tokens_per_step"
            raise InputError(
                f"training.micro_batch_size: {micro} x {num_processes} processes does not divide the "
                f"{sequences} sequences of a step; {fix}"
            )


def facts(run: Run, model: TinyLlamaForCausalLM, num_processes: int, compile_says: str) -> list[str]:
    """The quantities that follow from a recipe, one line each."""
    config, training, steps = run.config, run.config.training, run.config.steps
    total, length = steps.tokens_after(steps.number), run.config.data.sequence_length
    parameters = sum(p.numel() for p in model.parameters())
    epochs = run.mixture.epochs(total // length)
    sizes = ", then ".join(f"{size:,}" for size in steps.sizes)
    micro_batches = ", then ".join(
        str(size // length // (num_processes * training.micro_batch_size)) for size in steps.sizes
    )
    lines = [
        f"model       {config.model.preset}: {parameters:,} parameters, {len(run.tokenizer):,} tokens in the vocabulary, "
        f"context {run.model_config.max_position_embeddings}",
        f"tokens      {total:,} in {steps.number:,} steps of {sizes} ({config.sequences(1)} sequences of "
        f"{length}); {total / parameters:.2f} per parameter",
        f"a step      {num_processes} process(es) x {micro_batches} micro-batches of "
        f"{training.micro_batch_size} sequences, {training.precision}, attention {training.attention}, compile "
        f"{compile_says}",
        f"arithmetic  {model.flops_per_token(config.data.sequence_length) / 1e9:.4g} GFLOP a token (6 x parameters without "
        "the input embedding + attention, not halved)",
    ]
    for source, spec, share, epoch in zip(run.mixture.sources, config.data.sources, run.shares, epochs, strict=True):
        lines.append(
            f"data        {share:.1%} {spec.path}: {len(source):,} blocks, {source.num_tail_tokens} tokens left "
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
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False)
