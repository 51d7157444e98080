"""Shows the data of a fine-tuning run before it starts: the sources, the lengths, and a conversation with its mask."""

import itertools
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ..text import decode_text
from .conversation_sources import SourceSummary
from .conversations import TrainingExample


_MAX_BARS, _BAR_WIDTH = 12, 40


def describe_sources(
    sources: Sequence[SourceSummary], used: Counter[int], too_long: Counter[int], truncated: Counter[int]
) -> list[str]:
    """Returns a line per source with its format and counts, and one per reason why rows of it are invalid.

    Args:
        sources (`Sequence[SourceSummary]`): what was read.
        used (`Counter[int]`): number of conversations for training and held out, by source.
        too_long (`Counter[int]`): number of those that were left out.
        truncated (`Counter[int]`): number of those that were truncated.
    """
    lines = []
    for number, source in enumerate(sources):
        counts = {
            "invalid": source.num_invalid,
            "too long": too_long[number],
            "truncated": truncated[number],
        }
        weight = f", weight {source.weight:g}" if source.weight != 1 else ""
        left_out = "".join(f", {count:,} {what}" for what, count in counts.items() if count)
        lines.append(
            f"{source.name} ({source.format}{weight}): {source.num_rows:,} rows{left_out}, {used[number]:,} used"
        )
        lines += [f"  {rows.number:,} invalid: {rows.first}" for rows in source.invalid.values()]
    return lines


def draw_lengths(lengths: Sequence[int]) -> list[str]:
    """Returns median, 95th percentile and maximum of the lengths in one line, then the lines of a histogram.

    Args:
        lengths (`Sequence[int]`): number of tokens of each conversation, at least one.
    """
    ordered = sorted(lengths)
    longest, high = ordered[-1], ordered[-(-95 * len(ordered) // 100) - 1]
    size = next(size for size in _round_numbers() if longest <= size * _MAX_BARS)
    counts = Counter((length - 1) // size for length in lengths)
    most, digits = max(counts.values()), len(f"{longest:,}") + 1
    lines = [f"median {statistics.median(ordered):,g} tokens, 95 % at most {high:,}, longest {longest:,}"]
    for number in range((longest - 1) // size + 1):
        first, last, count = number * size + 1, (number + 1) * size, counts[number]
        bar = "█" * -(-_BAR_WIDTH * count // most)
        lines.append(f"{first:>{digits},} to {last:>{digits},}  {bar} {count:,}")
    return lines


def _round_numbers() -> Iterator[int]:
    """Yields 1, 2, 5, 10, 20, 50, ..."""
    return (factor * 10**power for power in itertools.count() for factor in (1, 2, 5))


def draw_conversation(tokenizer: PreTrainedTokenizerBase, example: TrainingExample, color: bool) -> Text:
    """Returns a conversation as text that shows which tokens have loss.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        example (`TrainingExample`): the rendered conversation.
        color (`bool`): for a terminal: tokens with loss are green, the others dim. Otherwise the tokens with loss are
            between ⟦ and ⟧.
    """
    parts = []
    for has_loss, tokens in itertools.groupby(zip(*example, strict=True), key=lambda token: token[1]):
        text = decode_text(tokenizer, [i for i, _ in tokens], skip_special_tokens=False)
        if color:
            parts.append(Text(text, style="green" if has_loss else "dim"))
        else:
            parts.append(Text(f"⟦{text}⟧" if has_loss else text))
    return Text(" ").join(parts)
