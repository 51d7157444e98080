"""What a run on preferences is about to do, as text."""

from collections import Counter

from ..text import decode_text
from .data_summary import describe_sources
from .dpo import REFERENCE_BATCH_SIZE, PreferenceRun
from .run_summary import run_lines


def preference_lines(run: PreferenceRun) -> list[str]:
    """Returns lines with pairs, tokens, the cache of the reference, model, template and steps."""
    config, preference = run.config, run.config.preference
    with_loss = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in run.train)
    tokens = sum(run.order.lengths)
    dropped = f", {run.num_dropped:,} longer than {config.data.max_length} tokens dropped" if run.num_dropped else ""
    return [
        *(f"source        {line}" for line in describe_sources(run.sources, run.used, Counter(), Counter())),
        f"pairs         {len(run.train):,} for training, {len(run.held_out):,} held out{dropped}",
        f"tokens        {tokens:,} per epoch, {with_loss:,} with loss ({with_loss / tokens:.0%}: both replies and "
        "their stop tokens)",
        f"loss          {preference.loss} with beta {preference.beta:g}",
        f"reference     {_reference(run)}",
        *run_lines(run, "pairs", _padding(run)),
    ]


def _reference(run: PreferenceRun) -> str:
    folder = run.references.folder
    if run.references.is_complete:
        return f"log-probabilities found in {folder} ({run.references.num_bytes / 1e6:.2f} MB): 0 forward passes"
    passes = sum(-(-len(part) // REFERENCE_BATCH_SIZE) for part in (run.train, run.held_out))
    return f"log-probabilities take {passes:,} forward passes, and are kept in {folder}"


def _padding(run: PreferenceRun) -> str:
    """Returns the share of padding: all conversations of a forward pass are as long as its longest."""
    rows = [[length for number in row for length in run.train[number].lengths()] for row in run.order.rows()]
    padded = [len(row) * max(row) for row in rows]
    return f"padding {1 - sum(map(sum, rows)) / sum(padded):.0%}; at most {max(padded):,} tokens at once"


def preference_dry_run_lines(run: PreferenceRun) -> list[str]:
    """Returns lines with a pair of median length, and the folder that would be written."""
    pair = run.train[len(run.train) // 2]
    prompt, chosen, rejected = (decode_text(run.tokenizer, ids, skip_special_tokens=False) for ids in pair)
    return [
        f"a pair, tokens with loss between ⟦ and ⟧:\nprompt    {prompt}\nchosen    ⟦{chosen}⟧\nrejected  ⟦{rejected}⟧",
        f"would write {run.output}/ (dry run: nothing was written)",
    ]
