"""MMLU, GSM8K, BBH, HumanEval and InstructEval's tasks from local rows to scores, with lm-eval's own model class."""

import pytest
from lm_eval import evaluate
from lm_eval.models.huggingface import HFLM

from tests.evaluation.task_folders import DOUBLE, humaneval_rows, write_rows, write_tasks
from tests.evaluation.test_commonsense import model
from tinyllama_hf import load_tokenizer
from tinyllama_hf.evaluation.tasks.protocol_definitions import define_protocol
from tinyllama_hf.evaluation.tasks.suite import open_suite, quiet_harness


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def harness_model(tokenizer_folder):
    return HFLM(pretrained=model(3), tokenizer=load_tokenizer(tokenizer_folder), batch_size=8, max_length=512)


def score(suite, harness_model, limit: int = 2) -> dict:
    with quiet_harness():
        return evaluate(
            lm=harness_model,
            task_dict={"tasks": suite.tasks, "groups": suite.groups},
            limit=limit,
            confirm_run_unsafe_code=suite.runs_code,
        )


@pytest.mark.parametrize(
    ("protocol", "tasks"),
    [
        ("modern", ["mmlu"]),
        ("modern", ["gsm8k"]),
        ("modern", ["bbh_fewshot"]),
        ("instruct", ["mmlu", "drop", "humaneval", "instruct_bbh_snarks"]),
    ],
)
def test_to_the_end(folder, harness_model, protocol, tasks, monkeypatch):
    monkeypatch.setattr(HFLM, "max_gen_toks", 8)  # a random model never stops
    with open_suite(folder, define_protocol(protocol, tasks), run_code=True) as suite:
        for task in suite.tasks.values():
            if task.OUTPUT_TYPE == "generate_until":
                task.config.generation_kwargs["max_gen_toks"] = 8
        output = score(suite, harness_model)
        for name, metric in suite.metrics.items():
            key = metric if "," in metric else f"{metric},none"
            assert 0 <= output["results"][name][key] <= 1
            assert len(output["samples"][name]) == 2 * max(1, len(suite.tasks[name].config.filter_list or []))
            assert output["n-shot"][name] == suite.num_fewshot[name]
        assert suite.groups.keys() <= output["results"].keys()


def test_a_model_that_solves_problems(folder, tokenizer_folder):
    """HumanEval with the replies of a model that is right on the first of two problems, in all definitions."""

    class Solver(HFLM):
        def generate_until(self, requests, disable_tqdm=False):
            return [DOUBLE["canonical_solution"] + "\n\n" for _ in requests]

    solver = Solver(pretrained=model(3), tokenizer=load_tokenizer(tokenizer_folder), max_length=512)
    definition = define_protocol("modern", ["humaneval", "instruct_humaneval", "humaneval_instruct"])
    with open_suite(folder, definition, run_code=True) as suite:
        assert suite.runs_code
        output = score(suite, solver)
    for name in definition.tasks:
        assert output["results"][name]["pass@1,create_test"] == 0.5
        assert [sample["filtered_resps"] for sample in output["samples"][name]] == [[[True]], [[False]]]
    rows = humaneval_rows()
    write_rows(folder / "humaneval" / "test.jsonl", [rows[0]] * 3)
    with open_suite(folder, define_protocol("modern", ["humaneval_64"]), run_code=True) as suite:
        suite.tasks["humaneval_64"].config.repeats = 64
        output = score(suite, solver)
        assert {metric: output["results"]["humaneval_64"][f"pass@{metric},create_test"] for metric in (2, 64)} == {
            2: 1,
            64: 1,
        }
        assert suite.metrics["humaneval_64"] == "pass@2,create_test"
    write_rows(folder / "humaneval" / "test.jsonl", rows)


def test_lm_eval_refuses_to_run_code_without_confirmation(folder, harness_model):
    with open_suite(folder, define_protocol("modern", ["humaneval"]), run_code=True) as suite:
        with pytest.raises(ValueError, match="unsafe"):
            evaluate(lm=harness_model, task_dict={"tasks": suite.tasks, "groups": suite.groups}, limit=2)
