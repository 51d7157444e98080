"""Estimates time and memory of a run by its largest forward and backward pass, run once for real."""

import tempfile
import time
from typing import Any

import torch

from ..devices import format_bytes
from ..pretrain.metrics import duration
from ..pretrain.throughput import peak_memory_bytes
from .sft import FinetuneRun, joined_row
from .trainer import common_arguments, load_base, lora_config, processes, quiet_trl


_BYTES_PER_MOMENT = {"adamw": 4, "adamw_8bit": 1, "paged_adamw_8bit": 1}  # of two moments per trained parameter
_SHARE_OF_FORWARD = 1 / 3  # of the time of forward and backward pass


def estimate_lines(run: FinetuneRun) -> list[str]:
    """Returns lines with the time of the run and its peak memory, measured by the largest pass on this device.

    The time is that of the measured tokens per second for all tokens of training and evaluation. To the measured
    memory are added the two moments of AdamW for each trained parameter.
    """
    order, training = run.order, run.config.training
    rows = order.rows()
    size = [sum(order.lengths[number] for number in row) for row in rows]
    largest = max(range(len(rows)), key=size.__getitem__)
    try:
        seconds, peak, trained = _measure(run, rows[largest])
    except torch.OutOfMemoryError as error:
        return [
            f"memory        the largest forward pass of {size[largest]:,} tokens does not fit ({error}). Lower "
            "training.micro_batch_size or data.max_length, or set training.activation_checkpointing"
        ]
    rate = size[largest] / seconds
    evaluations = 1 + len(order.steps) // run.intervals["evaluation"]
    held_out = sum(len(example.input_ids) for example in run.held_out.examples)
    work = order.tokens_after()[-1] + evaluations * held_out * _SHARE_OF_FORWARD
    moments = 2 * _BYTES_PER_MOMENT[training.optimizer] * trained
    return [
        f"time          about {duration(work / rate / processes().num_processes)} for training and {evaluations} "
        f"evaluations: a pass of {size[largest]:,} tokens takes {seconds:.2g} s here",
        f"memory        about {format_bytes(peak + moments)} at the peak, of which the optimizer takes "
        f"{format_bytes(moments)}",
    ]


def _measure(run: FinetuneRun, row: list[int]) -> tuple[float, int, int]:
    """Returns seconds and peak bytes of a forward and backward pass, and the number of trained parameters."""
    model = load_base(run)
    adapter = lora_config(run.config.adapter, model.config.tie_word_embeddings)
    rows = [row] if run.order.packing else [[number] for number in row]
    with tempfile.TemporaryDirectory() as scratch, quiet_trl():  # the trainer creates its folder
        arguments = {**common_arguments(run), "output_dir": scratch}
        trainer: Any = run.make_trainer(arguments, model, adapter, [])
        batch = trainer.data_collator([joined_row([run.train.examples[number] for number in row]) for row in rows])
        if run.config.training.activation_checkpointing:
            trainer.model.gradient_checkpointing_enable()
        for _ in range(2):  # the first pass also allocates, and on a GPU compiles
            began = time.perf_counter()
            trainer.compute_loss(trainer.model.train(), trainer._prepare_inputs(batch)).backward()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    return seconds, peak_memory_bytes(trainer.accelerator.device) or 0, trained
