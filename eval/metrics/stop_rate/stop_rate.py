"""The share of replies that end in the stop token, and their median length.

metric = evaluate.load("eval/metrics/stop_rate")
metric.compute(predictions=[[306, 29889, 2], ...], eos_token_id=2)
"""

import datasets
import evaluate

from tinyllama_hf.evaluation.score_metrics import median_length, stop_rate


class StopRate(evaluate.Metric):
    """Wraps [`tinyllama_hf.evaluation.score_metrics.stop_rate`].

    Args:
        predictions (`list[list[int]]`): the generated token ids of each reply, without the prompt.
        eos_token_id (`int`): the stop token.

    Returns:
        `dict`: `stop_rate` between 0 and 1, and `median_length` in tokens without the stop token.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Sequence(datasets.Value("int64"))}
        return evaluate.MetricInfo(
            description=stop_rate.__doc__,
            citation="",
            inputs_description=self.__doc__,
            features=datasets.Features(features),
        )

    def _compute(self, predictions: list[list[int]], eos_token_id: int) -> dict[str, float]:
        return {
            "stop_rate": stop_rate(predictions, eos_token_id),
            "median_length": median_length(predictions, eos_token_id),
        }
