"""N-gram models fitted to the text that each milestone of a run was trained on, as baselines for its bits per byte."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ...data.mixture import Mixture
from ...pretrain.milestones import read_record
from ...progress import progress_bar
from ..score_files import BaselineRow
from .bits_per_byte import document_tokens, summarize
from .held_out_text import HeldOut
from .ngram import NGramModel


BASELINES = {"unigram": 1, "5-gram": 5}


def fit_baselines(
    mixture: Mixture,
    tokenizer: PreTrainedTokenizerBase,
    milestones: Sequence[Path],
    held_out: Sequence[HeldOut],
    known: Sequence[BaselineRow] = (),
) -> Iterator[list[BaselineRow]]:
    """Fits n-gram models to the text that each milestone was trained on, without repeated epochs.

    Yields the rows of all milestones so far. Rows in `known` are reused.
    """
    rows: list[BaselineRow] = []
    with progress_bar("Fitting n-gram models", "milestones", len(milestones)) as update:
        for folder in milestones:
            record = read_record(folder)
            fitted = [row for row in known if (row.step, row.tokens) == (record["step"], record["tokens"])]
            if [row.name for row in fitted] != list(BASELINES):
                fitted = _fit(mixture, tokenizer, record, held_out)
            rows += fitted
            yield rows
            update(advance=1)


def _fit(
    mixture: Mixture, tokenizer: PreTrainedTokenizerBase, record: dict, held_out: Sequence[HeldOut]
) -> list[BaselineRow]:
    """Returns the rows of one milestone. The held-out documents are read once for all models."""
    blocks = sorted(set(mixture.blocks(0, record["tokens"] // mixture.block_size)))
    text = mixture.tokens(blocks)[:, :-1].reshape(-1)  # consecutive blocks are consecutive text
    models = {name: NGramModel(text, len(tokenizer), order) for name, order in BASELINES.items()}
    nats = {name: [0.0] * len(held_out) for name in models}
    for number, h in enumerate(held_out):
        for document in h.texts:
            tokens = document_tokens(tokenizer, document)
            for name, model in models.items():
                nats[name][number] -= float(model.log_probabilities(tokens).sum())
    about = {"step": record["step"], "tokens": record["tokens"], "distinct_tokens": len(text)}
    return [BaselineRow(name=name, **about, **vars(summarize(nats[name], held_out))) for name in models]
