"""Scores of quantized models: a folder saved quantized and the plain one quantized while loading have equal scores."""

import json
import re
import shutil
import sys

import pytest
import torch

import tinyllama_hf_cli
from tests.conftest import write_recipe
from tests.pretrain.runs import pretrain
from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load, load_tokenizer, progress
from tinyllama_hf.chat.templates import load_template
from tinyllama_hf.data.prepare import prepare
from tinyllama_hf.errors import InputError
from tinyllama_hf.evaluation import series, task_scores
from tinyllama_hf.evaluation.models import describe_model, load_eval_model
from tinyllama_hf.finetune import replies
from tinyllama_hf.pretrain.config import load_pretrain_config


pytest.importorskip("bitsandbytes")

KINDS = ("int8", "nf4")
DTYPES = (torch.float32, torch.bfloat16)
TASKS = ("bits_per_byte", "commonsense", "replies")


def save_quantized(plain, kind, folder):
    model, tokenizer = load(plain, quantization=kind)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tokenizer_folder, tmp_path_factory):
    """Untrained chat models by dtype, and each of them saved quantized, by dtype and kind."""
    made = {}
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.chat_template = load_template("llama2")
    rows = [
        [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": "A number. " * (i + 1)}]
        for i in range(3)
    ]
    for dtype in DTYPES:
        torch.manual_seed(0)
        model = TinyLlamaForCausalLM(TinyLlamaConfig.preset("micro", vocab_size=512, max_position_embeddings=512))
        torch.nn.init.normal_(model.lm_head.weight, std=0.2)  # a fresh one finds everything almost equally likely
        plain = made[dtype] = tmp_path_factory.mktemp("models") / "plain"
        model.to(dtype).save_pretrained(plain)
        tokenizer.save_pretrained(plain)
        (plain / "validation.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
        for kind in KINDS:
            made[dtype, kind] = save_quantized(plain, kind, plain.with_name(f"saved-{kind}"))
            shutil.copy(plain / "validation.jsonl", made[dtype, kind])
    return made


@pytest.fixture(scope="module")
def few(documents, tokenizer_folder, tmp_path_factory):
    """A prepared data set with little held-out text."""
    folder = tmp_path_factory.mktemp("few")
    lines = [json.dumps({"text": text[:300]}) + "\n" for text in documents[:20]]
    (folder / "few.jsonl").write_text("".join(lines), encoding="utf-8")
    source, options = str(folder / "few.jsonl"), {"validation_fraction": 0.3, "workers": 1, "progress": False}
    prepare([source], tokenizer_folder, folder / "data", **options)
    return folder / "data"


@pytest.fixture
def score(few):
    """Scores models on a small part of a task, and returns their rows."""

    def run(task, models, quantization="none", **options):
        models, how = [str(model) for model in models], {"quantization": quantization, **options}
        if task == "bits_per_byte":
            return [row.to_json() for row in series.score(models, [str(few)], **how).models]
        if task == "commonsense":
            scores = task_scores.score_tasks(models, "embedded:sample", limit=2, **how).file
            return [row.to_json() for row in scores.models]
        return [row.to_json() for row in replies.score_replies(models, max_new_tokens=4, **how)]

    return run


def figures(row):
    """The scores of a row, without model and time."""
    return {
        key: value
        for key, value in row.items()
        if key not in ("name", "path", "quantization", "fingerprint", "seconds", "items_file")
    }


CASES = [
    (task, kind, dtype)
    for task in TASKS
    for kind in KINDS
    for dtype in DTYPES
    if task == "bits_per_byte" or kind == "nf4"
]


@pytest.mark.parametrize(("task", "kind", "dtype"), CASES, ids=[" ".join(map(str, case)) for case in CASES])
def test_a_saved_folder_scores_as_the_option_does(folders, score, task, kind, dtype):
    plain, saved = folders[dtype], folders[dtype, kind]
    here, given, alone, without = (
        *score(task, [plain, saved], kind),
        *score(task, [saved, plain]),
    )
    assert figures(here) == figures(given) == figures(alone)
    assert figures(without) != figures(here), "quantization changes the scores"
    assert [(row["name"], row["quantization"]) for row in (here, given, alone, without)] == [
        (f"plain ({kind})", kind),
        (f"saved-{kind} ({kind})", kind),
        (f"saved-{kind} ({kind})", kind),
        ("plain", "none"),
    ]
    assert here["path"] == without["path"] == str(plain)


def test_a_model_that_was_trained(shared, score, tmp_path):
    """stories260K has widths that the kernel does not support; its tokenizer is saved for stock transformers."""
    plain = shared / "data" / "models" / "stories260K"
    load_tokenizer(plain).save_pretrained(tmp_path / "plain")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(plain / name, tmp_path / "plain")
    plain = tmp_path / "plain"
    saved = save_quantized(plain, "nf4", tmp_path / "saved")
    for task in ("bits_per_byte", "commonsense"):
        here, given = score(task, [plain, saved], "nf4")
        assert figures(here) == figures(given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_all_that_is_plain_is_fp32(folders, dtype, quantization):
    """As the protocols require, for folders of any dtype."""
    for folder in (folders[dtype], folders[dtype, "nf4"]):
        model, _ = load_eval_model(describe_model(folder, quantization))
        assert {p.dtype for p in model.parameters()} <= {torch.float32, torch.uint8} and model.dtype == torch.float32


PROGRESS = {
    "bits_per_byte": "bits per byte",
    "commonsense": "loading|requests",
    "replies": "replies: 0 of 3 conv",
}


@pytest.mark.parametrize("task", TASKS)
def test_a_log_names_model_and_task(folders, score, monkeypatch, capsys, task):
    """While the model is loaded, and later."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.001)
    score(task, [folders[torch.float32]])
    assert re.search(f"^plain: {PROGRESS[task]}", capsys.readouterr().err, re.MULTILINE)


@pytest.mark.parametrize("task", TASKS)
def test_refusals(folders, score, monkeypatch, task):
    """Before a model is loaded, with the message of `load`."""
    plain, saved = folders[torch.float32], folders[torch.float32, "nf4"]
    with pytest.raises(InputError) as of_load:
        load(saved, quantization="int8")
    with pytest.raises(InputError) as refused:
        score(task, [plain, saved], "int8")
    assert str(refused.value) == str(of_load.value)
    with pytest.raises(InputError, match=r"quantization 'nf5'.*nf4"):
        score(task, [plain], "nf5")


def test_other_quantizations_are_refused(folders, score, tmp_path):
    fields = json.loads((folders[torch.float32] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"quantization_config": {"quant_method": "awq"}}))
    for task in TASKS:
        with pytest.raises(InputError, match=r"quanti[sz]ed by awq, .* vLLM reads it"):
            score(task, [tmp_path])


def test_commonsense_keeps_both_in_one_file(folders, score, tmp_path):
    plain, output, items, notes = folders[torch.float32], tmp_path / "scores.json", tmp_path / "items.jsonl", []
    options = {"output": output, "note": notes.append}
    rows = [score("commonsense", [plain], kind, samples=items, **options)[0] for kind in ("none", "nf4")]
    assert {json.loads(line)["quantization"] for line in items.read_text().splitlines()} == {"nf4"}
    assert not notes and json.loads(output.read_text())["models"] == rows
    assert rows[0]["fingerprint"] == rows[1]["fingerprint"]
    assert [score("commonsense", [plain], kind, **options)[0] for kind in ("none", "nf4")] == rows
    assert [note.split(":")[0] for note in notes] == ["plain", "plain (nf4)"]


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Runs the command in this process, and returns what it prints."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["tinyllama-hf", "eval", *map(str, words)])
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            tinyllama_hf_cli.main()
        assert not stop.value.code
        return capsys.readouterr().out

    return run


def test_the_tables_name_it(folders, call, few):
    plain, saved = folders[torch.float32], folders[torch.float32, "nf4"]
    both = plain, saved, "--device", "cpu"
    printed = call("text", *both, "--data", few, "--quantization", "nf4").splitlines()[1:]
    assert [line.split("  ")[-1] for line in printed] == ["plain (nf4)", "saved-nf4 (nf4)"]
    printed = call("tasks", *both, "--data", "embedded:sample", "--limit", 2)
    assert "\nplain  " in printed and "\nsaved-nf4 (nf4)  " in printed
    printed = call("replies", saved, "--max-new-tokens", 4)
    assert printed.splitlines()[1].endswith("  saved-nf4 (nf4)") and (saved / "replies.json").is_file()


def test_scores_of_a_quantized_run_have_a_file_of_their_own(few, tokenizer_folder, call, tmp_path, monkeypatch):
    """They are written to scores-nf4.json, which a second call reads, and calls for the plain run do not."""
    pretrain(load_pretrain_config(write_recipe(tmp_path, few, tokenizer_folder)))
    run = tmp_path / "run"
    printed = call("text", run, "--quantization", "nf4")
    assert f"wrote {run}/scores-nf4.json" in printed and not (run / "scores.json").exists()
    rows = json.loads((run / "scores-nf4.json").read_text())["models"]
    assert [(row["step"], row["quantization"]) for row in rows] == [(6, "nf4"), (12, "nf4")]
    assert all(row["name"].endswith(" (nf4)") for row in rows)
    plain = series.score([str(run)], output=run / "scores-nf4.json").models
    assert all(a["bits_per_byte"] != b.bits_per_byte for a, b in zip(rows, plain, strict=True))
    call("text", run, "--quantization", "nf4", "--rescore")
    monkeypatch.setattr(series, "_score_folder", lambda *_: pytest.fail("scored again"))
    assert call("text", run, "--watch", "--quantization", "nf4").count("bits per byte  ") == 2
