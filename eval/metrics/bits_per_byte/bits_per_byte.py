"""Bits per byte of a language model on texts: comparable between tokenizers.

metric = evaluate.load("eval/metrics/bits_per_byte")
metric.compute(predictions=[812.3, ...], references=["a text", ...])
"""

import math

import datasets
import evaluate


_DESCRIPTION = """\
What a model spends on a text, in bits, divided by the UTF-8 bytes of the text. Summed over all documents before the
division, so that a long document weighs more than a short one. 8 is no knowledge at all, lower is better.
"""

_INPUTS = """
Args:
    predictions (`list[float]`): negative log-likelihood of each document, in nats, summed over its tokens.
    references (`list[str]`): the documents.

Returns:
    `dict`: `bits_per_byte`.
"""


class BitsPerByte(evaluate.Metric):
    """Negative log-likelihoods over the bytes that they pay for."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("float64"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=datasets.Features(features)
        )

    def _compute(self, predictions: list[float], references: list[str]) -> dict[str, float]:
        num_bytes = sum(len(text.encode()) for text in references)
        if not num_bytes:
            raise ValueError("bits_per_byte: the references hold no text; give at least one byte")
        return {"bits_per_byte": math.fsum(predictions) / math.log(2) / num_bytes}
