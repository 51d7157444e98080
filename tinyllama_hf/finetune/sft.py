"""Supervised fine-tuning with TRL's `SFTTrainer`, on our rendering of conversations."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, Trainer, TrainerCallback

from ..chat.render import render
from ..errors import InputError
from ..evaluation.score_metrics import stop_rate
from .config import ConversationConfig
from .conversation_sources import SourceSummary
from .conversations import (
    RenderedConversations,
    TrainingExample,
    read_sources,
    render_all,
    split_conversations,
    write_rows,
)
from .opened_base import open_base
from .packed_rows import packed_attention_name
from .replies import MAX_NEW_TOKENS, generate_replies, reply_loss, summed_reply_loss
from .run_checkpoints import RunState
from .trainer import OpenedRun, TrainedModel, processes, rows_per_step, run_settings, train
from .training_order import TrainingOrder, training_steps
from .tuned_folder import write_tuned_folder


if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig


_SCORES = {
    "held_out_loss": "loss of held-out replies, nats per token",
    "stop_rate": f"share of own replies that end within {MAX_NEW_TOKENS} tokens",
}


@dataclass(frozen=True)
class FinetuneRun(OpenedRun):
    """A run on conversations.

    Attributes:
        sources (`list[SourceSummary]`): what was read.
        train (`RenderedConversations`): to train on.
        held_out (`RenderedConversations`): to evaluate on.
    """

    config: ConversationConfig
    sources: list[SourceSummary]
    train: RenderedConversations
    held_out: RenderedConversations

    def rows(self) -> "Dataset":
        """Returns the forward passes in the order of training, which are put together when they are read."""
        from datasets import Dataset

        rows = self.order.rows()
        if not self.order.packing:  # the trainer pads each `micro_batch_size` of them
            rows = [[number] for row in rows for number in row]
        return Dataset.from_dict({"conversations": rows}).with_transform(self.join)

    def join(self, batch: dict[str, list[list[int]]]) -> dict[str, list[Any]]:
        """Returns rows for the numbers of their conversations, in the form of TRL. See [`joined_row`]."""
        rows = [joined_row([self.train.examples[number] for number in numbers]) for numbers in batch["conversations"]]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def make_trainer(
        self,
        arguments: dict[str, Any],
        model: PreTrainedModel,
        adapter: "LoraConfig | None",
        callbacks: list[TrainerCallback],
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
            callbacks=callbacks,
        )

    def evaluate(self, model: PreTrainedModel) -> dict[str, float]:
        """Returns the loss of the held-out replies. All processes must call it."""
        state = processes()
        own = self.held_out.examples[state.process_index :: state.num_processes]
        with torch.autocast(model.device.type, torch.bfloat16, self.config.training.precision == "bf16"):
            total, count = summed_reply_loss(model.eval(), own)
        sums = torch.tensor([total, count], dtype=torch.float64, device=model.device)
        if state.num_processes > 1:
            dist.all_reduce(sums)
        return {"validation_loss": (sums[0] / sums[1]).item()}

    def score(self, model: PreTrainedModel) -> dict[str, float]:
        """Returns the loss of the held-out replies, and the share of the model's own replies that end in time.

        The share is that of the first 20 held-out conversations whose prompts leave room for a reply, if any do.
        """
        room = model.config.max_position_embeddings - MAX_NEW_TOKENS
        prompts = [c.messages[:-1] for c in self.held_out.conversations if c.messages[-1]["role"] == "assistant"]
        fitting = [p for p in prompts if len(render(self.tokenizer, p, add_generation_prompt=True).input_ids) <= room]
        scores = {"held_out_loss": reply_loss(model, self.held_out.examples)}
        if fitting:
            replies = generate_replies(model, self.tokenizer, fitting[:20], MAX_NEW_TOKENS)
            scores["stop_rate"] = stop_rate(replies, self.tokenizer.eos_token_id)
        return scores

    def record(self) -> dict[str, Any]:
        """Returns the counts of conversations, for `provenance.json`."""
        return {
            "conversations": {
                "source": ", ".join(source.path for source in self.config.data.conversations),
                "train": len(self.train.examples),
                "held_out": len(self.held_out.examples),
                "dropped": (self.train.dropped + self.held_out.dropped).total(),
            }
        }


def joined_row(examples: Sequence[TrainingExample]) -> dict[str, list[int]]:
    """Returns conversations one after the other, in the form of TRL's packed rows.

    `labels` has the token at each position with loss, and -100 elsewhere.
    """
    tokens = [token for example in examples for token in zip(*example, strict=True)]
    return {
        "input_ids": [token for token, _ in tokens],
        "labels": [token if has_loss else -100 for token, has_loss in tokens],
        "seq_lengths": [len(example.input_ids) for example in examples],
    }


def finetune_run(
    run: FinetuneRun, overwrite: bool = False, after_checkpoint: Callable[[Path], None] | None = None
) -> None:
    """Fine-tunes, and writes a plain Llama folder with chat template and provenance.

    Args:
        run (`FinetuneRun`): from [`open_run`].
        overwrite (`bool`, *optional*, defaults to `False`): replace an earlier fine-tuned model in `output_dir`.
        after_checkpoint (`Callable`, *optional*): called with the folder of the run.

    Raises:
        InputError, Stopped, DivergedError: as in [`train`].
    """

    def finish(model: TrainedModel, state: RunState) -> None:
        scores = write_tuned_folder(run, model, state, run.record(), run.score)
        for name, values in scores.items():
            print(f"{_SCORES[name]}: {values['before']:.3f} before training, {values['after']:.3f} after")

    train(run, run.make_trainer, run.evaluate, finish, overwrite, after_checkpoint)


def open_run(config: ConversationConfig, overwrite: bool = False) -> FinetuneRun:
    """Checks a recipe and loads tokenizer and conversations. Writes nothing.

    Raises:
        InputError: if model, template, conversations or output cannot be used, or a package is not installed.
    """
    opened = open_base(config, overwrite)
    config, tokenizer, max_length = opened.config, opened.tokenizer, opened.max_length
    data = read_sources(config.data.conversations, config.data.invalid)
    parts = split_conversations(data.conversations, config.data.validation_fraction)
    show = processes().is_main_process
    train, held_out = (render_all(tokenizer, part, max_length, config.data.too_long, show) for part in parts)
    if not train.examples or not held_out.examples:
        raise InputError(f"data.max_length: {max_length} drops all conversations. Raise it")
    longest = config.data.max_length or max(train.max_length, held_out.max_length)
    config = config.model_copy(update={"data": config.data.model_copy(update={"max_length": longest})})
    return FinetuneRun(
        config=config,
        output=opened.output,
        base=opened.base,
        tokenizer=tokenizer,
        template=opened.template,
        order=_order(config, train),
        settings=run_settings(config, opened.base, tokenizer, [train.examples, held_out.examples]),
        held_out_rows=write_rows(held_out.conversations),
        sources=data.sources,
        train=train,
        held_out=held_out,
    )


def _order(config: ConversationConfig, train: RenderedConversations) -> TrainingOrder:
    training, sources = config.training, config.data.conversations
    numbers = Counter(conversation.source for conversation in train.conversations)  # in the order of the sources
    sizes, weights = [numbers[i] for i in range(len(sources))], [source.weight for source in sources]
    steps = training_steps(sizes, weights, training.epochs, training.sequences_per_step, training.seed)
    lengths = [len(example.input_ids) for example in train.examples]
    return TrainingOrder(steps, lengths, rows_per_step(config), training.packing)
