"""Supervised fine-tuning with TRL's `SFTTrainer`, on our rendering of conversations."""

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, Trainer

from ..errors import InputError
from .config import ConversationConfig
from .conversations import (
    Conversation,
    TrainingExample,
    read_conversations,
    render_all,
    split_conversations,
    write_rows,
)
from .opened_base import open_base
from .packed_rows import packed_attention_name
from .replies import reply_loss, summed_reply_loss
from .run_callback import RunCallback
from .run_checkpoints import RunState
from .trainer import OpenedRun, TrainedModel, processes, rows_per_step, run_settings, train
from .training_order import TrainingOrder, training_steps
from .tuned_folder import write_tuned_folder


if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig


@dataclass(frozen=True)
class FinetuneRun(OpenedRun):
    """A run on conversations.

    Attributes:
        train (`list[TrainingExample]`): rendered conversations to train on.
        held_out (`list[TrainingExample]`): rendered conversations to evaluate on.
        held_out_conversations (`list[Conversation]`): the same as messages.
        num_dropped (`int`): conversations that are longer than `data.max_length`.
    """

    config: ConversationConfig
    train: list[TrainingExample]
    held_out: list[TrainingExample]
    held_out_conversations: list[Conversation]
    num_dropped: int

    def rows(self) -> "Dataset":
        """Returns the forward passes in the order of training, which are put together when they are read."""
        from datasets import Dataset

        rows = self.order.rows()
        if not self.order.packing:  # the trainer pads each `micro_batch_size` of them
            rows = [[number] for row in rows for number in row]
        return Dataset.from_dict({"conversations": rows}).with_transform(self._join)

    def _join(self, batch: dict[str, list[list[int]]]) -> dict[str, list[Any]]:
        rows = [[self.train[number] for number in numbers] for numbers in batch["conversations"]]
        joined: dict[str, list[Any]] = {
            "input_ids": [list(chain.from_iterable(example.input_ids for example in row)) for row in rows],
            "labels": [list(chain.from_iterable(map(labels, row))) for row in rows],
        }
        if self.order.packing:
            joined["seq_lengths"] = [[len(example.input_ids) for example in row] for row in rows]
        return joined

    def make_trainer(
        self,
        arguments: dict[str, Any],
        model: PreTrainedModel,
        adapter: "LoraConfig | None",
        callback: RunCallback,
    ) -> Trainer:
        """Returns TRL's trainer. See `MakeTrainer`."""
        from trl import SFTConfig, SFTTrainer

        if self.order.packing:
            model.set_attn_implementation(packed_attention_name(model.device))
        return SFTTrainer(
            model=model.train(),
            args=SFTConfig(
                **arguments,
                padding_free=self.order.packing,
                max_length=None,  # no truncation: longer conversations were refused, dropped or cut
                dataset_kwargs={"skip_prepare_dataset": True},
            ),
            train_dataset=self.rows(),
            processing_class=self.tokenizer,
            peft_config=adapter,
            callbacks=[callback],
        )

    def evaluate(self, model: PreTrainedModel) -> dict[str, float]:
        """Returns the loss of the held-out replies. All processes must call it."""
        state = processes()
        total, count = summed_reply_loss(model.eval(), self.held_out[state.process_index :: state.num_processes])
        sums = torch.tensor([total, count], dtype=torch.float64, device=model.device)
        if state.num_processes > 1:
            dist.all_reduce(sums)
        return {"validation_loss": (sums[0] / sums[1]).item()}

    def record(self) -> dict[str, Any]:
        """Returns the counts of conversations, for `provenance.json`."""
        return {
            "conversations": {
                "source": self.config.data.conversations,
                "train": len(self.train),
                "held_out": len(self.held_out),
                "dropped": self.num_dropped,
            }
        }


def labels(example: TrainingExample) -> list[int]:
    """Returns the token at each position with loss, and -100 elsewhere."""
    return [token if mask else -100 for token, mask in zip(*example, strict=True)]


def finetune_run(run: FinetuneRun, overwrite: bool = False) -> None:
    """Fine-tunes, and writes a plain Llama folder with chat template and provenance.

    Args:
        run (`FinetuneRun`): from [`open_run`].
        overwrite (`bool`, *optional*, defaults to `False`): replace an earlier fine-tuned model in `output_dir`.

    Raises:
        InputError, Stopped, DivergedError: as in [`train`].
    """

    def finish(model: TrainedModel, state: RunState) -> None:
        def evaluate(model: PreTrainedModel) -> dict[str, float]:
            return {"validation_loss": reply_loss(model, run.held_out)}

        before = {"validation_loss": state.losses[0]}
        after = write_tuned_folder(run, model, state, run.record(), before, evaluate)["validation_loss"]
        print(f"held-out loss {after:.3f} nats per token, before training {state.losses[0]:.3f}")

    train(run, run.make_trainer, run.evaluate, finish, overwrite)


def open_run(config: ConversationConfig, overwrite: bool = False) -> FinetuneRun:
    """Checks a recipe and loads tokenizer and conversations. Writes nothing.

    Raises:
        InputError: if model, template, conversations or output cannot be used, or a package is not installed.
    """
    opened = open_base(config, overwrite)
    config, tokenizer, max_length = opened.config, opened.tokenizer, opened.max_length
    conversations = read_conversations(config.data.conversations)
    parts = split_conversations(conversations, config.data.validation_fraction)
    drop = config.data.overlong == "drop"
    train, held_out = (render_all(tokenizer, part, max_length, drop) for part in parts)
    if not train or not held_out:
        raise InputError(f"data.max_length: {max_length} drops all conversations. Raise it")
    training, lengths = config.training, [len(example.input_ids) for example in train]
    steps = training_steps([len(train)], [1.0], training.epochs, training.sequences_per_step, training.seed)
    return FinetuneRun(
        config=config,
        output=opened.output,
        base=opened.base,
        tokenizer=tokenizer,
        template=opened.template,
        order=TrainingOrder(steps, lengths, rows_per_step(config), training.packing),
        settings=run_settings(config, opened.base, tokenizer, [train, held_out]),
        held_out_rows=write_rows(parts[1]),
        train=train,
        held_out=held_out,
        held_out_conversations=parts[1],
        num_dropped=len(conversations) - len(train) - len(held_out),
    )
