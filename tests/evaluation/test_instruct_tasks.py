"""The tasks of InstructEval against its functions, transcribed from declare-lab/instruct-eval at commit 49bbd2c."""

import json
import random
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.evaluation.task_folders import (
    bbh_rows,
    drop_rows,
    humaneval_rows,
    mmlu_rows,
    parts,
    write_rows,
    write_tasks,
)
from tinyllama_hf.errors import InputError
from tinyllama_hf.evaluation.tasks.protocol_definitions import define_protocol
from tinyllama_hf.evaluation.tasks.suite import open_suite


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder = write_tasks(tmp_path_factory.mktemp("rows"))
    with open_suite(folder, define_protocol("instruct"), run_code=True) as opened:
        yield opened


def prompts(task) -> list[str]:
    task.build_all_requests()
    return [instance.args[0] for instance in task.instances]


def mmlu_prompt(row: dict, shots: list[dict], k: int) -> str:
    """`gen_prompt` and `format_example` of mmlu.py."""

    def example(row: dict) -> str:
        text = row["question"]
        for letter, choice in zip("ABCD", row["choices"], strict=True):
            text += f"\n{letter}. {choice}"
        return text + "\nAnswer:"

    subject = "".join(" " + entry for entry in row["subject"].split("_"))
    text = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    for shot in shots[:k]:
        text += example(shot) + f" {'ABCD'[shot['answer']]}\n\n"
    return text + example(row)


def shots_of(row: dict) -> list[dict]:
    return [shot for shot in mmlu_rows("solved", 5) if shot["subject"] == row["subject"]]


def test_prompts_of_mmlu(suite):
    rows = mmlu_rows("test", 3)
    assert prompts(suite.tasks["instruct_mmlu"]) == [mmlu_prompt(row, shots_of(row), 5) for row in rows]
    assert len(rows) == 57 * 3


def test_long_prompts_lose_examples(suite):
    """With a tokenizer of 20 tokens a word, where few rows keep all five examples within 2048 tokens."""
    task, rows = suite.tasks["instruct_mmlu"], mmlu_rows("test", 3)

    def count(text: str) -> int:
        return 20 * len(text.split())

    expected = []
    for row in rows:
        k = 5
        while count(mmlu_prompt(row, shots_of(row), k)) > 2048 and k > 0:
            k -= 1
        expected.append(mmlu_prompt(row, shots_of(row), k))
    task.count_tokens = count
    try:
        assert prompts(task) == expected
        assert expected != [mmlu_prompt(row, shots_of(row), 5) for row in rows]
        task.count_tokens = lambda text: 10**6
        assert prompts(task) == [mmlu_prompt(row, [], 0) for row in rows], "the question always stays"
    finally:
        task.count_tokens = None


def test_prompts_of_bbh(suite):
    """The first three rows of each task are shown, the others are asked."""
    for name in parts("bbh_fewshot"):
        rows = [row for row in bbh_rows() if row["task"] == name]
        shown = "".join(f"{row['input']}\nAnswer: {row['target']}\n\n" for row in rows[:3])
        assert prompts(suite.tasks[f"instruct_bbh_{name}"]) == [f"{shown}{row['input']}\nAnswer:" for row in rows[3:]]
    group = suite.groups["instruct_bbh"]
    assert len(group.child_names) == 27 and group.aggregate_metric_list[0].weight_by_size is False


def drop_prompts(rows: list[dict]) -> tuple[list[str], list[str]]:
    """`filter_dataset`, `train_test_split` and `evaluate` of drop.py, for (passage, question, spans)."""
    samples = [row for row in rows if len({text.strip() for text in row["spans"]}) == 1]
    random.seed(0)
    train = random.sample(samples, k=3)
    texts = {row["passage"] for row in train}
    test = [row for row in samples if row["passage"] not in texts]

    def prompt(row: dict, with_answer: bool) -> str:
        text = row["passage"].strip() + " " + row["question"].strip() + "\nAnswer:"
        return f"{text} {row['spans'][0].strip()}\n\n" if with_answer else text

    shown = "".join(prompt(row, True) for row in train)
    return [shown + prompt(row, False) for row in test], [row["spans"][0].strip() for row in test]


def test_prompts_of_drop(suite):
    """The file of simple-evals has passage, question and answers in other fields."""
    rows = []
    for row in drop_rows():
        passage, question = row["context"].removeprefix("Passage: ").removesuffix("\nAnswer:").split("\nQuestion: ")
        rows.append({"passage": passage, "question": question, "spans": row["ref_text"].split("|")})
    task = suite.tasks["instruct_drop"]
    expected, answers = drop_prompts(rows)
    assert prompts(task) == expected and 15 < len(expected) < 24
    assert [task.doc_to_target(instance.doc) for instance in task.instances] == answers


def test_prompts_of_humaneval(suite):
    start = (
        "Please complete the following Python code without providing any additional tasks such as testing or "
        "explanations\n"
    )
    task = suite.tasks["instruct_humaneval"]
    assert prompts(task) == [start + row["prompt"] for row in humaneval_rows()]
    settings = {"do_sample": True, "temperature": 0.1, "max_gen_toks": 512, "until": []}
    assert task.instances[0].args[1] == settings


def test_what_is_right(suite):
    task = suite.tasks["instruct_mmlu"]
    row = mmlu_rows("test", 1)[0]
    assert row["answer"] == 0
    for reply, right in ((" A", 1), ("\nA.", 1), ("A)", 1), ("Answer", 1), ("B", 0), ("a", 0), ("", 0), ("(A", 0)):
        assert task.process_results(row, [reply]) == {"acc": right}
    lengths = {name: task.config.generation_kwargs["max_gen_toks"] for name, task in suite.tasks.items()}
    assert lengths["instruct_mmlu"] == 2 and lengths["instruct_drop"] == 8 and lengths["instruct_bbh_snarks"] == 32
    assert set(suite.metrics.values()) == {"acc", "pass@1,create_test"} and suite.runs_code
    assert suite.num_fewshot == {
        **dict.fromkeys(suite.tasks, 3),
        "instruct_mmlu": 5,
        "instruct_humaneval": 0,
    }


def test_the_27_tasks_are_alike():
    folder = ROOT / "eval" / "tasks" / "instruct" / "bbh"
    group = yaml.safe_load((folder / "instruct_bbh.yaml").read_text())
    names = parts("bbh_fewshot")
    assert group["task"] == [f"instruct_bbh_{name}" for name in names]
    for name in names:
        task = yaml.safe_load((folder / f"{name}.yaml").read_text())
        assert task == {"include": "../_bbh_template.yaml", "task": f"instruct_bbh_{name}", "dataset_name": name}
    assert {path.stem for path in folder.iterdir()} == {*names, "instruct_bbh"}


def test_rows_of_drop_in_the_format_of_the_hub(tmp_path: Path, suite):
    """The class takes both; a folder has the file of simple-evals."""
    rows = [
        {"passage": f" P{n // 2} ", "question": f"Q{n}?", "answers_spans": {"spans": [f"{n} "] * (1 + n % 2)}}
        for n in range(20)
    ]
    own = tmp_path / "own"
    own.mkdir()
    file = write_rows(tmp_path / "rows.jsonl", rows)
    stock = ROOT / "eval" / "tasks" / "instruct" / "instruct_drop.yaml"
    settings = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": str(file)}}}
    (own / "drop.yaml").write_text(json.dumps({"include": str(stock), "task": "own_drop", **settings}))
    with open_suite(tmp_path, define_protocol("modern", ["own_drop"], own), own) as opened:
        task = opened.tasks["own_drop"]
        plain = [
            {"passage": r["passage"], "question": r["question"], "spans": r["answers_spans"]["spans"]} for r in rows
        ]
        expected, answers = drop_prompts(plain)
        assert prompts(task) == expected and answers == [task.doc_to_target(i.doc) for i in task.instances]
    with (
        pytest.raises(InputError, match="humaneval"),
        open_suite(tmp_path, define_protocol("instruct", ["humaneval"])),
    ):
        pytest.fail("the suite was opened")
