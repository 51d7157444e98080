"""The commonsense average of TinyLlama's table: the unweighted mean of seven scores, with its standard error.

metric = evaluate.load("eval/metrics/commonsense_average")
metric.compute(predictions=[43.5, ...], references=["hellaswag", ...], standard_errors=[0.5, ...])
"""

import math

import datasets
import evaluate


TASKS = ("hellaswag", "openbookqa", "winogrande", "arc_challenge", "arc_easy", "boolq", "piqa")

_DESCRIPTION = """\
The unweighted mean of the scores on HellaSwag, OpenBookQA, WinoGrande, ARC-Challenge, ARC-Easy, BoolQ and PIQA. The
tasks are independent samples, so the standard error of the mean is the root of the summed squares, divided by seven.
"""

_INPUTS = """
Args:
    predictions (`list[float]`): a score for each task, all in one unit.
    references (`list[str]`): the tasks that they belong to, each of the seven once, in any order.
    standard_errors (`list[float]`, *optional*): of the scores, in their order.

Returns:
    `dict`: `average`, and `standard_error` (`None` without `standard_errors`), in the unit of the scores.
"""


class CommonsenseAverage(evaluate.Metric):
    """Mean of the seven scores; a missing or doubled task is an error, since the mean of six is another figure."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("float64"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_INPUTS, features=datasets.Features(features)
        )

    def _compute(
        self, predictions: list[float], references: list[str], standard_errors: list[float] | None = None
    ) -> dict[str, float | None]:
        if sorted(references) != sorted(TASKS):
            raise ValueError(
                f"commonsense_average: got the tasks {', '.join(references)}; needs each of {', '.join(TASKS)} once"
            )
        if not all(map(math.isfinite, [*predictions, *(standard_errors or ())])):
            raise ValueError("commonsense_average: a score or a standard error is not a number; score that task again")
        if standard_errors is not None and len(standard_errors) != len(predictions):
            raise ValueError(
                f"commonsense_average: {len(standard_errors)} standard errors for {len(predictions)} scores; give one each"
            )
        error = None if standard_errors is None else math.hypot(*standard_errors) / len(TASKS)
        return {"average": math.fsum(predictions) / len(TASKS), "standard_error": error}
