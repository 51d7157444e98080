"""The hashes of task definitions: what changes them, what does not, and score files under a changed definition."""

import json
import shutil

import pytest

from tests.evaluation.task_folders import write_rows
from tests.evaluation.test_commonsense import save
from tinyllama_hf.errors import InputError
from tinyllama_hf.evaluation.comparison.compared_models import find_compared_models
from tinyllama_hf.evaluation.comparison.score_comparison import check_comparison
from tinyllama_hf.evaluation.task_scores import score_tasks
from tinyllama_hf.evaluation.tasks.definition_hashes import hash_definitions
from tinyllama_hf.evaluation.tasks.protocol_definitions import define_protocol
from tinyllama_hf.evaluation.tasks.task_index import choose_tasks, index_tasks


FILES = {
    "tasks/capitals.yaml": """
task: capitals
include: ../shared/base.yaml
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
doc_to_text: "The capital of {{country}} is"
metadata: {version: 7, written: 2026-01-01}
""",
    "tasks/mine.yaml": """
group: mine
task: [{task: capitals, target_delimiter: " "}]
aggregate_metric_list: [{metric: acc}]
""",
    "shared/base.yaml": """
output_type: multiple_choice
doc_to_choice: "{{cities}}"
doc_to_target: !function answers.right
metric_list: [{metric: acc}]
""",
    "shared/answers.py": """
import json

def right(row):
    return find(row)

def find(row):
    return row["right"]
""",
}


@pytest.fixture
def own(tmp_path):
    """A folder with a task, a group, an included definition with a function, and rows."""
    rows = [
        {"country": name, "cities": ["N'Djamena", "Oslo"], "right": n} for n, name in enumerate(("Chad", "Norway"))
    ]
    file = write_rows(tmp_path / "own" / "rows.jsonl", rows)
    for name, text in FILES.items():
        (tmp_path / "own" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "own" / name).write_text(text.replace("ROWS", str(file)))
    return tmp_path / "own"


def change(file, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def hashes(folder) -> dict[str, str]:
    return hash_definitions(choose_tasks(["mine"], index_tasks(folder / "tasks")))


def test_they_do_not_depend_on_the_folder(own, tmp_path):
    found = hashes(own)
    assert found.keys() == {"mine", "capitals"}
    moved = shutil.copytree(own, tmp_path / "elsewhere")
    change(moved / "tasks" / "capitals.yaml", str(own), str(moved))
    assert hashes(moved) == found


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        ("tasks/capitals.yaml", "The capital", "Capital", ["capitals"]),
        ("tasks/capitals.yaml", "test: /", "test: https://host/", ["capitals"]),
        ("tasks/capitals.yaml", "2026-01-01", "2026-01-02", ["capitals"]),
        ("tasks/mine.yaml", '" "', '""', ["capitals", "mine"]),
        ("tasks/mine.yaml", "{metric: acc}", "{metric: acc, weight_by_size: false}", ["mine"]),
        ("shared/base.yaml", "{{cities}}", "{{cities[:2]}}", ["capitals"]),
        ("shared/answers.py", 'row["right"]', '1 - row["right"]', ["capitals"]),
    ],
)
def test_what_changes_them(own, file, old, new, changed):
    before = hashes(own)
    change(own / file, old, new)
    after = hashes(own)
    assert sorted(name for name in before if before[name] != after[name]) == changed


def test_functions_of_installed_modules(own):
    """A compiled one has no source."""
    found = set()
    for name in ("answers.right", "json.loads", "math.sqrt", "tinyllama_hf.evaluation.tasks.code_tasks.pass_at_1"):
        (own / "shared" / "base.yaml").write_text(f"doc_to_target: !function {name}\n")
        found.add(hashes(own)["capitals"])
    assert len(found) == 4


@pytest.fixture
def score(own, tokenizer_folder, tmp_path):
    """Scores a model on the task, and returns the notes."""
    model = save(tmp_path / "model", tokenizer_folder, 1)

    def run(output):
        notes, include = [], own / "tasks"
        definition = define_protocol("modern", ["mine"], include)
        score_tasks([str(model)], output=output, definition=definition, include=include, note=notes.append)
        return notes

    return run


def test_scores_under_a_changed_definition(own, score, tmp_path):
    """Regression: the file was taken for one of the same protocol, with the old scores, and `compare` agreed."""
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    score(first)
    assert "already scored" in score(first)[0]
    change(own / "tasks" / "capitals.yaml", "The capital", "Capital")
    with pytest.raises(InputError, match=r"another protocol \(different: definitions of capitals\)"):
        score(first)
    score(second)
    with pytest.raises(InputError, match=r"a different protocol .*: definitions of capitals\. "):
        check_comparison(find_compared_models([str(first), str(second)]))


def test_a_file_of_an_early_version_is_continued(own, score, tmp_path):
    output = tmp_path / "scores.json"
    score(output)
    contents = json.loads(output.read_text())
    hashes = contents["protocol"].pop("definitions")
    output.write_text(json.dumps(contents))
    assert "already scored" in score(output)[0]
    assert json.loads(output.read_text())["protocol"]["definitions"] == hashes
