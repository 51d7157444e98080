"""Functions for the definitions of HumanEval in `eval/tasks/`: programs from replies, their outcomes, and pass@k.

lm-eval's own definition downloads a metric when it is imported, and runs the programs without limits.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from .code_sandbox import run_programs


def check_program(document: dict[str, Any], code: str) -> str:
    """Returns the program that checks whether code solves a problem: the code, the tests, and a call of the tests.

    Args:
        document (`dict`): a row of HumanEval.
        code (`str`): the whole function, including its beginning from the prompt.
    """
    return f"{code}\n{document['test']}\ncheck({document['entry_point']})"


def run_completions(replies: list[list[str]], documents: list[dict[str, Any]]) -> list[list[bool]]:
    """Filter of lm-eval: returns whether the prompt with each reply passes the tests."""
    return _run(replies, documents, lambda reply: reply)


def run_code_blocks(replies: list[list[str]], documents: list[dict[str, Any]]) -> list[list[bool]]:
    """As [`run_completions`], with each reply up to the end of its code block."""
    return _run(replies, documents, lambda reply: reply.partition("```")[0])


def run_first_paragraphs(replies: list[list[str]], documents: list[dict[str, Any]]) -> list[list[bool]]:
    """As [`run_completions`], with each reply truncated as in InstructEval."""
    return _run(replies, documents, first_paragraph)


def first_paragraph(reply: str) -> str:
    """Returns a reply up to its first blank line, with one more space before lines indented by an odd number.

    This is `filter_code(fix_indents(reply))` of InstructEval's human_eval/main.py.
    """
    lines = [" " * ((len(line) - len(line.lstrip(" "))) % 2) + line for line in reply.split("\n")]
    return "\n".join(lines).lstrip("\n").split("\n\n")[0]


def _run(replies: list[list[str]], documents: list[dict[str, Any]], cut: Callable[[str], str]) -> list[list[bool]]:
    programs = [
        check_program(document, document["prompt"] + cut(reply))
        for own, document in zip(replies, documents, strict=True)
        for reply in own
    ]
    outcomes = iter(run_programs(programs))
    return [[next(outcomes).passed for _ in own] for own in replies]


def pass_at_1(document: dict[str, Any], results: Sequence[Sequence[bool]]) -> dict[str, float]:
    """Returns the share of replies to a problem that pass; called by lm-eval as `process_results`."""
    return {"pass@1": pass_at_k(results[0], 1)}


def pass_at_2_to_64(document: dict[str, Any], results: Sequence[Sequence[bool]]) -> dict[str, float]:
    """As [`pass_at_1`], for the k of lm-eval's `humaneval_64`."""
    return {f"pass@{k}": pass_at_k(results[0], k) for k in (2, 8, 16, 32, 64)}


def pass_at_k(passed: Sequence[bool], k: int) -> float:
    """Returns the probability that one of k replies passes, 1 - C(n - c, k) / C(n, k) if c of n pass (Chen et al.
    2021, arXiv:2107.03374, equation 1)."""
    return 1 - math.comb(len(passed) - sum(passed), k) / math.comb(len(passed), k)
