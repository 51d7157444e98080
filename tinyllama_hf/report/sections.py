"""Parts of the page that tell what became of the last milestone: how it replies, and its commonsense scores."""

import html
from pathlib import Path
from typing import Any

from .. import provenance
from ..errors import InputError
from ..evaluation.protocol import caveat


_SHOWN_REPLIES = 8


def replies(chat: Path) -> str:
    """What a fine-tuned model learned, from its `provenance.json` and `replies.json`.

    Raises:
        InputError: if it was not scored.
    """
    scores = _read(chat / "replies.json", f"tinyllama-hf eval {chat} --task replies")["models"][0]
    record = _read(chat / "provenance.json", "recipes/sft.py")
    losses, counts = record["held_out_loss"], record["conversations"]
    rows = "".join(
        f"<tr><td>{html.escape(sample['question'])}</td><td>{html.escape(sample['reply'])}</td>"
        f"<td>{html.escape(sample['true'])}</td></tr>"
        for sample in _spread(scores["samples"])
    )
    return (
        f"<h2>It learned to reply</h2><p>Fine-tuned on {counts['train']:,} conversations ({html.escape(counts['source'])}), "
        f"with the loss on replies and stop tokens only. The loss of held-out replies fell from {losses['before']:.2f} to "
        f"<b>{losses['after']:.2f} nats a token</b>. Of {scores['replies']} unseen questions "
        f"<b>{scores['stop_rate']:.0%}</b> of the replies end in the stop token within {scores['max_new_tokens']} tokens; "
        f"their median length is {scores['median_length']:g} tokens. (A model of this size learns the form of an answer, "
        "not the facts.)</p>"
        f'<table class="words"><tr><th>question</th><th>reply</th><th>true answer</th></tr>{rows}</table>'
    )


def commonsense(scores: dict[str, Any]) -> str:
    """The commonsense table, from `commonsense.json`."""
    tasks = list(scores["models"][0]["results"])
    head = "".join(f'<th class="n">{html.escape(task)}</th>' for task in tasks)
    rows = ""
    for row in scores["models"]:
        cells = "".join(
            f'<td class="n">{row["results"][task]["score"]:.1f} ± {row["results"][task]["standard_error"]:.1f}</td>'
            for task in tasks
        )
        average = f"{row['average']:.1f} ± {row['average_standard_error']:.1f}"
        rows += f'<tr><td>{html.escape(row["name"])}</td>{cells}<td class="n"><b>{average}</b></td></tr>'
    made_on = caveat(scores["protocol"], scores["models"][0]["results"])
    items = sum(result["items"] for result in scores["models"][0]["results"].values())
    return (
        f"<h2>Commonsense, by lm-eval</h2><p>Percent ± standard error over {items:,} questions, zero-shot, under the protocol "
        f"of TinyLlama's table; the last column is the mean of the tasks.{f' <b>Scored on {made_on}.</b>' if made_on else ''}</p>"
        f'<table class="wide"><tr><th>milestone</th>{head}<th class="n">average</th></tr>{rows}</table>'
    )


def _spread(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Some of the samples, evenly spread."""
    step = max(len(samples) // _SHOWN_REPLIES, 1)
    return samples[::step][:_SHOWN_REPLIES]


def _read(file: Path, maker: str) -> Any:
    if not file.is_file():
        raise InputError(f"{file} does not exist; `{maker}` writes it")
    return provenance.read_json(file)
