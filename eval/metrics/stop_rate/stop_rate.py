"""The share of replies that end by themselves, and how long they are.

metric = evaluate.load("eval/metrics/stop_rate")
metric.compute(predictions=[[306, 29889, 2], ...], eos_token_id=2)
"""

import statistics

import datasets
import evaluate


_DESCRIPTION = """\
A chat model that never learned its stop token talks on until it is cut off. The stop rate is the share of replies whose
last token is the stop token; the median length tells a model that answers from one that stops at once.
"""

_INPUTS = """
Args:
    predictions (`list[list[int]]`): the new token ids of each reply, the prompt left out.
    eos_token_id (`int`): the stop token.

Returns:
    `dict`: `stop_rate` between 0 and 1, and `median_length` in tokens, a stop token at the end not counted.
"""


class StopRate(evaluate.Metric):
    """Share of replies that end in the stop token, and their median length."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Sequence(datasets.Value("int64"))}
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=datasets.Features(features)
        )

    def _compute(self, predictions: list[list[int]], eos_token_id: int) -> dict[str, float]:
        if not predictions:
            raise ValueError("stop_rate: got no reply; give at least one")
        stopped = [bool(reply) and reply[-1] == eos_token_id for reply in predictions]
        lengths = [len(reply) - stop for reply, stop in zip(predictions, stopped, strict=True)]
        return {"stop_rate": sum(stopped) / len(predictions), "median_length": float(statistics.median(lengths))}
