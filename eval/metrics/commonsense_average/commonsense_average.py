"""The commonsense average of TinyLlama's table: the unweighted mean of seven scores, with its standard error.

metric = evaluate.load("eval/metrics/commonsense_average")
metric.compute(predictions=[43.5, ...], references=["hellaswag", ...], standard_errors=[0.5, ...])
"""

import datasets
import evaluate

from tinyllama_hf.evaluation.score_metrics import average_standard_error, commonsense_average


class CommonsenseAverage(evaluate.Metric):
    """Wraps [`tinyllama_hf.evaluation.score_metrics.commonsense_average`].

    Args:
        predictions (`list[float]`): one score per task, all in the same unit.
        references (`list[str]`): the names of the seven tasks, each once, in the order of the scores.
        standard_errors (`list[float]`, *optional*): standard errors, in the order of the scores.

    Returns:
        `dict`: `average`, and `standard_error` (`None` without `standard_errors`), in the unit of the scores.
    """

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("float64"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=commonsense_average.__doc__,
            citation="",
            inputs_description=self.__doc__,
            features=datasets.Features(features),
        )

    def _compute(
        self, predictions: list[float], references: list[str], standard_errors: list[float] | None = None
    ) -> dict[str, float | None]:
        error = None if standard_errors is None else average_standard_error(standard_errors)
        return {"average": commonsense_average(predictions, references), "standard_error": error}
