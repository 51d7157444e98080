"""What a fine-tuning run is about to do, as text."""

from collections import Counter

from rich.console import Console

from .data_summary import describe_sources, draw_conversation, draw_lengths
from .rehearsal import estimate_lines
from .sft import FinetuneRun
from .trainer import OpenedRun, processes


_ADAPTERS = {"lora": "LoRA", "dora": "DoRA", "qlora": "QLoRA (weights in nf4)"}


def summary_lines(run: FinetuneRun) -> list[str]:
    """Returns lines with model, template, conversations, tokens and steps."""
    examples = run.train.examples
    with_loss = sum(sum(example.assistant_masks) for example in examples)
    tokens = sum(run.order.lengths)
    return [
        *(f"source        {line}" for line in _sources(run)),
        f"conversations {len(examples):,} for training, {len(run.held_out.examples):,} held out",
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


def _sources(run: FinetuneRun) -> list[str]:
    parts = (run.train, run.held_out)
    used = Counter(conversation.source for part in parts for conversation in part.conversations)
    too_long = run.train.dropped + run.held_out.dropped
    return describe_sources(run.sources, used, too_long, run.train.truncated + run.held_out.truncated)


def dry_run_lines(run: FinetuneRun) -> list[str]:
    """Returns lines with the lengths of the conversations, one of them with its mask, and time and memory of the run.

    The mask is in color if standard output is a terminal.
    """
    console = Console()
    first = draw_conversation(run.tokenizer, run.train.examples[0], console.is_terminal)
    with console.capture() as drawn:
        console.print(first, soft_wrap=True)
    brackets = "in green" if console.is_terminal else "between ⟦ and ⟧"
    return [
        "lengths       " + "\n              ".join(draw_lengths(run.order.lengths)),
        f"first conversation, tokens with loss {brackets}:\n{drawn.get().rstrip()}",
        *estimate_lines(run),
        f"would write {run.output}/ (dry run: nothing was written)",
    ]
