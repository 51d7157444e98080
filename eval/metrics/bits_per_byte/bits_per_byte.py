"""Bits per byte of a language model on texts, comparable between tokenizers.

metric = evaluate.load("eval/metrics/bits_per_byte")
metric.compute(predictions=[812.3, ...], references=["a text", ...])
"""

import datasets
import evaluate

from tinyllama_hf.evaluation.score_metrics import bits_per_byte


class BitsPerByte(evaluate.Metric):
    """Wraps [`tinyllama_hf.evaluation.score_metrics.bits_per_byte`].

    Args:
        predictions (`list[float]`): negative log-likelihood of each document, in nats, summed over its tokens.
        references (`list[str]`): the documents.

    Returns:
        `dict`: `bits_per_byte`.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("float64"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=bits_per_byte.__doc__,
            citation="",
            inputs_description=self.__doc__,
            features=datasets.Features(features),
        )

    def _compute(self, predictions: list[float], references: list[str]) -> dict[str, float]:
        return {"bits_per_byte": bits_per_byte(predictions, references)}
