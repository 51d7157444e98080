"""Runs one upstream test on the stock class and on ours, and compares the outcomes."""

import traceback
import unittest
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Outcome:
    """The outcome of a test: `state` is `"passed"`, `"skipped"` or `"failed"`, `detail` the reason or traceback."""

    state: str
    detail: str = ""


class _Result(unittest.TestResult):
    """Keeps the first failure or skip. A test that calls `pytest.skip` counts as skipped."""

    outcome = Outcome("passed")

    def _keep(self, outcome: Outcome) -> None:
        if self.outcome.state != "failed":
            self.outcome = outcome

    def addSkip(self, test, reason):
        self._keep(Outcome("skipped", reason))

    def addError(self, test, err):
        if isinstance(err[1], pytest.skip.Exception):
            self.addSkip(test, str(err[1]))
        else:
            self._keep(Outcome("failed", "".join(traceback.format_exception(*err))))

    addFailure = addError

    def addSubTest(self, test, subtest, err):
        if err is not None:
            self.addError(subtest, err)

    def addExpectedFailure(self, test, err):
        self._keep(Outcome("skipped", "expected to fail upstream"))

    def addUnexpectedSuccess(self, test):
        self._keep(Outcome("failed", "expected to fail upstream, but passed"))


def run_case(case: unittest.TestCase) -> Outcome:
    """Runs a test with the fixtures of its class."""
    result = _Result()
    unittest.TestSuite([case]).run(result)
    return result.outcome


def compare(stock: unittest.TestCase, ours: unittest.TestCase, difference: str | None) -> None:
    """Passes if both pass, skips if stock does not pass, and expects our failure if `difference` gives a reason.

    Fails if stock passes and ours fails without a `difference`, or ours passes with one.
    """
    of_stock = run_case(stock)
    if of_stock.state != "passed":
        pytest.skip(f"stock {of_stock.state}: {of_stock.detail.strip().rpartition(chr(10))[2]}")
    of_ours = run_case(ours)
    if difference is None and of_ours.state != "passed":
        pytest.fail(f"stock passes, ours {of_ours.state}: {of_ours.detail}", pytrace=False)
    if difference is not None and of_ours.state == "passed":
        pytest.fail("listed in differences.yaml, but ours passes as stock does. Remove the line.", pytrace=False)
    if difference is not None:
        pytest.xfail(difference)
