"""A folder of made-up rows of MMLU, BBH, GSM8K, HumanEval and DROP, in the formats of the Hub."""

import functools
import json
from pathlib import Path

from tinyllama_hf.evaluation.tasks.task_index import choose_tasks, index_tasks


DOUBLE = {
    "task_id": "HumanEval/0",
    "prompt": 'def double(x):\n    """Returns twice x."""\n',
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
    "entry_point": "double",
}


@functools.cache
def parts(task: str) -> list[str]:
    """The parts of a data set, from the definitions of a group."""
    return [settings["dataset_name"] for settings in choose_tasks([task], index_tasks()).tasks.values()]


def write_rows(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def mmlu_rows(kind: str, count: int) -> list[dict]:
    return [
        {
            "question": f" Which {kind} number follows {number} in {subject}? ",
            "subject": subject,
            "choices": [f"{number + 1}", f"not {number}", "none", "é"],
            "answer": number % 4,
        }
        for subject in parts("mmlu")
        for number in range(count)
    ]


def bbh_rows() -> list[dict]:
    names = parts("bbh_fewshot")
    return [
        {"task": name, "input": f"Is {number} of {name} even?", "target": ("Yes", "No")[number % 2]}
        for name in names
        for number in range(6)
    ]


def gsm8k_rows(kind: str, count: int) -> list[dict]:
    return [
        {
            "question": f"A {kind} has {n} eggs and one more. How many?",
            "answer": f"{n} + 1 = <<{n}+1={n + 1}>>\n#### {n + 1}",
        }
        for n in range(count)
    ]


def humaneval_rows() -> list[dict]:
    triple = {
        key: value.replace("double", "triple")
        .replace("2 * x", "3 * x")
        .replace("== 4", "== 6")
        .replace("== -2", "== -3")
        for key, value in DOUBLE.items()
    }
    return [DOUBLE, triple | {"task_id": "HumanEval/1"}]


def drop_rows() -> list[dict]:
    """Of OpenAI's simple-evals: every fifth row has two answers."""
    return [
        {
            "context": f"Passage: Team {n // 2} scored {n} goals.\nQuestion: How many goals did it score?\nAnswer:",
            "completion": f" {n}",
            "ref_text": f"{n}|{n} goals" if n % 5 == 0 else f"{n}",
        }
        for n in range(30)
    ]


def write_tasks(folder: Path) -> Path:
    """Writes all of them."""
    write_rows(folder / "mmlu" / "test.jsonl", mmlu_rows("test", 3))
    write_rows(folder / "mmlu" / "dev.jsonl", mmlu_rows("solved", 5))
    write_rows(folder / "bbh" / "test.jsonl", bbh_rows())
    write_rows(folder / "gsm8k" / "test.jsonl", gsm8k_rows("hen", 4))
    write_rows(folder / "gsm8k" / "train.jsonl", gsm8k_rows("duck", 9))
    write_rows(folder / "humaneval" / "test.jsonl", humaneval_rows())
    write_rows(folder / "drop" / "validation_simple_evals.jsonl", drop_rows())
    return folder
