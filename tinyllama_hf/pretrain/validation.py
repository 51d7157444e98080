"""The loss on held-out blocks, shared out over the processes."""

import torch
from accelerate import Accelerator

from .setup import Run


@torch.no_grad()
def validation_losses(run: Run, accelerator: Accelerator, model: torch.nn.Module) -> list[float]:
    """Mean loss per token on the held-out blocks of each source; to be called by all processes.

    Micro-batches go round the processes. A sharded model computes on all processes together, so that one without a
    micro-batch computes the first again, which does not count.

    Args:
        run (`Run`): whose `validation` blocks are read.
        accelerator (`Accelerator`): the processes.
        model (`torch.nn.Module`): as accelerate wrapped it.
    """
    # In training mode (there is no dropout) the logits are never held as a whole. DistributedDataParallel is passed by:
    # there is nothing to synchronise.
    inner = accelerator.unwrap_model(model)
    micro, processes = run.config.training.micro_batch_size, accelerator.num_processes
    losses = []
    for number, blocks in enumerate(run.validation):
        starts = range(0, len(blocks), micro)
        total = torch.zeros((), device=accelerator.device)
        for first in range(0, len(starts), processes):
            place = first + accelerator.process_index
            start = starts[place] if place < len(starts) else 0
            tokens = torch.from_numpy(blocks[start : start + micro]).to(accelerator.device)
            labels = tokens[:, 1:]
            inputs = {"input_ids": tokens[:, :-1], "labels": labels, "shift_labels": labels}
            if run.validation_positions:
                positions = run.validation_positions[number][start : start + micro]
                inputs["position_ids"] = torch.from_numpy(positions).to(accelerator.device)
            with accelerator.autocast():
                loss = inner(**inputs, num_items_in_batch=1).loss
            total += loss if place < len(starts) else 0.0
        total = accelerator.reduce(total, reduction="sum")
        losses.append(total.item() / (len(blocks) * run.config.data.sequence_length))
    return losses
