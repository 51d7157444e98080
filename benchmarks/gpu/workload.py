"""A pretraining step on random tokens, with the training step of the package, for our model and for stock Llama.

Needs torch, transformers and accelerate only, not even the packages that read recipes.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import LlamaForCausalLM

from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, losses
from tinyllama_hf.data.order import Block
from tinyllama_hf.pretrain import launch
from tinyllama_hf.pretrain.schedule import Steps
from tinyllama_hf.pretrain.step import TrainStep


class RandomTokens:
    """Stands where a `Mixture` stands: block i is drawn from its number."""

    def __init__(self, vocab_size: int, length: int):
        self.vocab_size, self.length = vocab_size, length

    def blocks(self, start: int, count: int) -> list[Block]:
        return [Block(0, start + i) for i in range(count)]

    def tokens(self, blocks: list[Block]) -> np.ndarray:
        rows = [np.random.default_rng(b.index).integers(0, self.vocab_size, self.length + 1) for b in blocks]
        return np.stack(rows)


def config_of(settings: dict[str, Any]) -> SimpleNamespace:
    """What [`TrainStep`] reads of a recipe, for constant batches."""
    length, micro = settings["sequence_length"], settings["micro_batch_size"]
    tokens_per_step = length * micro * settings["accumulation"]
    steps = Steps(10**12, tokens_per_step)
    training = SimpleNamespace(
        micro_batch_size=micro,
        precision=settings["precision"],
        compile=settings["compile"],
        attention=settings["attention"],
        kernels=settings["kernels"],
        activation_checkpointing=settings["activation_checkpointing"],
        deterministic=False,
        skip_spikes_sigma=None,
        total_tokens=10**12,
        seed=0,
    )
    return SimpleNamespace(
        training=training,
        steps=steps,
        sequences=lambda step: steps.tokens_of(step) // length,
        data=SimpleNamespace(sequence_length=length, document_masking=False),
        schedule=SimpleNamespace(name="constant", peak=4e-4, floor=None, warmup_tokens=0, decay_tokens=None),
        optimizer=SimpleNamespace(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, gradient_clip=1.0),
        logging=SimpleNamespace(trackers=[]),
        branch=None,
        output_dir="",
    )


class _StockInputs(torch.nn.Module):
    """Stock Llama called as the step calls our model."""

    def __init__(self, model: LlamaForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, input_ids, labels, shift_labels, num_items_in_batch):
        return self.model(
            input_ids=input_ids,
            labels=labels,
            shift_labels=shift_labels,
            num_items_in_batch=num_items_in_batch,
            use_cache=False,
        )


def build(settings: dict[str, Any], tokens: Any = None) -> tuple[TrainStep, int]:
    """The step of some settings, and FLOPs per token in the default convention.

    Args:
        settings (`dict`): `preset`, `model` (`ours` or `stock`), `sequence_length`, `micro_batch_size`,
            `accumulation`, `precision`, `compile`, `attention`, `kernels`, `activation_checkpointing`,
            `loss_chunk_megabytes`, and optionally `architecture`, fields that differ from the preset.
        tokens (*optional*): with the methods of [`RandomTokens`], which is the default.
    """
    config = config_of(settings)
    accelerator = launch.make_accelerator(config)
    launch.check_attention_and_kernels(config.training, False, accelerator.device)
    compiled, _ = launch.resolve_compile(config.training.compile, accelerator.device)
    losses.CHUNK_BYTES = settings["loss_chunk_megabytes"] * 2**20
    torch.manual_seed(0)
    fields = {"max_position_embeddings": settings["sequence_length"], **settings.get("architecture", {})}
    shape = TinyLlamaConfig.preset(settings["preset"], **fields)
    implementation = launch.attention_implementation(config.training, False)
    ours = TinyLlamaForCausalLM._from_config(shape, attn_implementation=implementation)
    flops_per_token = ours.flops_per_token(settings["sequence_length"])
    if settings["model"] == "ours":
        launch.prepare_layers(ours, config.training, compiled)
        model = ours
    else:
        stock = LlamaForCausalLM._from_config(shape.to_llama(), attn_implementation=settings["attention"])
        stock.load_state_dict(ours.state_dict())
        launch.prepare_layers(stock, config.training, compiled)
        model = _StockInputs(stock)
    wrapped, optimizer = launch.wrap(accelerator, model, config)
    tokens = tokens or RandomTokens(shape.vocab_size, settings["sequence_length"])
    return TrainStep(
        config, tokens, Accelerator(mixed_precision=accelerator.mixed_precision), wrapped, optimizer
    ), flops_per_token
