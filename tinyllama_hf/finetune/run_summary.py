"""What a fine-tuning run is about to do, as text."""

import itertools

from ..text import decode_text
from .sft import FinetuneRun
from .trainer import OpenedRun, processes


_ADAPTERS = {"lora": "LoRA", "dora": "DoRA", "qlora": "QLoRA (weights in nf4)"}


def summary_lines(run: FinetuneRun) -> list[str]:
    """Returns lines with model, template, conversations, tokens and steps."""
    config = run.config
    with_loss = sum(sum(example.assistant_masks) for example in run.train)
    tokens = sum(run.order.lengths)
    dropped = f", {run.num_dropped:,} longer than {config.data.max_length} tokens dropped" if run.num_dropped else ""
    return [
        f"conversations {len(run.train):,} for training, {len(run.held_out):,} held out{dropped}",
        f"tokens        {tokens:,} per epoch, {with_loss:,} with loss ({with_loss / tokens:.0%}: replies and stop "
        "tokens)",
        *run_lines(run, "sequences", _padding(run)),
    ]


def run_lines(run: OpenedRun, what: str, padding: str) -> list[str]:
    """Returns lines with model, template, steps and batches.

    Args:
        run (`OpenedRun`): what to train.
        what (`str`): what a step consists of.
        padding (`str`): describes the forward passes.
    """
    config, training = run.config, run.config.training
    kind = config.adapter.kind
    adapter = "all weights" if kind == "full" else f"{_ADAPTERS[kind]} of rank {config.adapter.rank}"
    steps, number = len(run.order.steps), processes().num_processes
    batches = f"{run.order.rows_per_step // number} x {training.micro_batch_size}"
    lines = [
        f"model         {run.base}, {adapter}, {training.precision}",
        f"template      {run.template}",
        f"steps         {steps:,} of {training.sequences_per_step} {what}, {training.epochs:g} epochs; {number} "
        f"process{'es' * (number > 1)} x {batches}; {padding}",
        f"evaluation    of held-out data every {run.intervals['evaluation']:,} steps, checkpoints every "
        f"{run.intervals['checkpoints']:,}; the {config.evaluation.keep} model is kept",
    ]
    if training.warmup_steps > steps:
        highest = training.learning_rate * steps / training.warmup_steps
        lines.append(
            f"warning       training.warmup_steps {training.warmup_steps} is more than the run has: the highest "
            f"learning rate is {highest:.3g}, not training.learning_rate {training.learning_rate:g}"
        )
    return lines + config.describe_defaults()


def _padding(run: FinetuneRun) -> str:
    """Returns the share of padding that remains, or that packing saves."""
    lengths = run.order.lengths
    rows = [[lengths[number] for number in row] for row in run.order.rows()]
    longest = max(map(sum, rows)) if run.order.packing else max(len(row) * max(row) for row in rows)
    padded = sum(len(row) * max(row) for row in rows)
    share = 1 - sum(map(sum, rows)) / padded
    what = f"packed without padding, which would be {share:.0%}" if run.order.packing else f"padding {share:.0%}"
    return f"{what}; at most {longest:,} tokens at once"


def dry_run_lines(run: FinetuneRun) -> list[str]:
    """Returns lines with the first conversation, and the folder that would be written."""
    return [
        f"first conversation, tokens with loss between ⟦ and ⟧:\n{first_conversation(run)}",
        f"would write {run.output}/ (dry run: nothing was written)",
    ]


def first_conversation(run: FinetuneRun) -> str:
    """Returns the first conversation as text, with the tokens that have loss in brackets."""
    example, parts = run.train[0], []
    for has_loss, tokens in itertools.groupby(zip(*example, strict=True), key=lambda token: token[1]):
        text = decode_text(run.tokenizer, [i for i, _ in tokens], skip_special_tokens=False)
        parts.append(f"⟦{text}⟧" if has_loss else text)
    return " ".join(parts)
