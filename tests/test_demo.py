"""The whole demo, as a newcomer runs it: interrupted once, then to its end, and everything that it claims."""

import gzip
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.evaluation.test_bits_per_byte import stock_bits_per_byte


STAGES = [
    *("tokenizer", "prose", "code", "pretrain", "score", "commonsense", "generate", "chat", "replies"),
    *("talk-8-bit", "talk-4-bit", "draft", "drafted", "publish", "report"),
]


def demo(folder: Path) -> subprocess.Popen:
    scripts = Path(sys.executable).parent
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tests.local_hub",
            "--storage",
            "run/hub",
            "--",
            "sh",
            str(ROOT / "recipes" / "demo" / "demo.sh"),
            "run",
        ],
        cwd=folder,
        env=os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


RECORD = """#!{python}
import json, pathlib, sys
with open({log!r}, "a") as log:
    log.write(json.dumps([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]) + "\\n")
for word in sys.argv:
    if word.startswith("output_dir="):
        (pathlib.Path(word.partition("=")[2]) / "milestones" / "step-1-token-1M").mkdir(parents=True)
"""


def test_every_command_of_the_demo_has_a_meaning(tmp_path):
    """The script with its commands only recorded: recipes with their overrides are valid, options exist."""
    from tests.test_cli import COMMANDS
    from tinyllama_hf.finetune.config import load_finetune_config
    from tinyllama_hf.pretrain.config import load_pretrain_config
    from tinyllama_hf.pretrain.setup import check_batches

    log = tmp_path / "calls.jsonl"
    for name in ("accelerate", "tinyllama-hf"):
        (tmp_path / name).write_text(RECORD.format(python=sys.executable, log=str(log)))
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    script = ["sh", str(ROOT / "recipes" / "demo" / "demo.sh"), "run"]
    done = subprocess.run(script, cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(calls) == len(STAGES)
    for program, *words in calls:
        if program == "tinyllama-hf":
            name = next(name for name in COMMANDS if tuple(words[: len(name)]) == name)
            COMMANDS[name].make_context(" ".join(name), words[len(name) :])
            continue
        place = next(i for i, word in enumerate(words) if word.endswith(".py"))
        recipe, overrides = words[place + 1], [word for word in words[place + 2 :] if not word.startswith("--")]
        if words[place].endswith("pretrain.py"):
            check_batches(load_pretrain_config(recipe, overrides), 1)
        else:
            load_finetune_config(recipe, overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """(folder of the run, what the second call printed); the first call is interrupted in its second stage."""
    folder = tmp_path_factory.mktemp("demo")
    first = demo(folder)
    deadline = time.monotonic() + 600
    while not (folder / "run" / "data" / "prose" / "work").is_dir():
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[0]
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGINT)
    first.communicate(timeout=60)
    assert first.returncode != 0
    assert sorted(p.name for p in (folder / "run" / ".done").iterdir()) == ["tokenizer"]
    second = demo(folder)
    printed = second.communicate(timeout=3000)[0]
    assert second.returncode == 0, printed[-3000:]
    return folder / "run", printed


@pytest.fixture(scope="module")
def scores(finished) -> dict:
    return json.loads((finished[0] / "pretrain" / "scores.json").read_text())


@pytest.mark.slow
def test_every_stage_is_a_printed_command_with_its_seconds(finished):
    run, printed = finished
    assert "== tokenizer: already finished" in printed
    for stage in STAGES[1:]:
        assert f"\n== {stage}\n$ " in printed and f"-- {stage} took " in printed
    assert [line.split("\t")[0] for line in (run / "stages.tsv").read_text().splitlines()] == STAGES
    assert "All stages together: " in printed and "Look at" in printed and "Try next" in printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_bits_per_byte_fall_and_end_below_the_5_gram(scores):
    models = [row["bits_per_byte"] for row in scores["models"]]
    assert len(models) == 4 and models == sorted(models, reverse=True) and len(set(models)) == 4
    same_text = {
        row["name"]: row["bits_per_byte"] for row in scores["baselines"] if row["step"] == scores["models"][-1]["step"]
    }
    assert models[-1] < same_text["5-gram"] < same_text["unigram"]


STOCK = f"""
import json, math, sys
sys.modules["tinyllama_hf"] = None
import torch
from transformers import AutoTokenizer, LlamaForCausalLM
{inspect.getsource(stock_bits_per_byte)}
print(stock_bits_per_byte(sys.argv[1], json.loads(sys.stdin.read())))
"""


@pytest.mark.slow
def test_the_last_milestone_scores_the_same_where_this_package_cannot_be_imported(finished, scores):
    run, _ = finished
    texts = []
    for file in sorted((run / "data").glob("*/validation/*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            texts += [json.loads(line)["text"] for line in lines]
    last = run.parent / scores["models"][-1]["path"]
    done = subprocess.run(
        [sys.executable, "-c", STOCK, str(last)], input=json.dumps(texts), capture_output=True, text=True
    )
    assert float(done.stdout) == pytest.approx(scores["models"][-1]["bits_per_byte"], abs=1e-5), done.stderr


@pytest.mark.slow
def test_the_story_lies_there_with_its_pictures(finished):
    from PIL import Image

    report = finished[0] / "report"
    page = (report / "index.html").read_text()
    pictures = sorted(report.glob("*.png"))
    names = {"loss", "learning_rate", "trajectory", "scaling", "tasks", "answers"}
    assert {picture.stem for picture in pictures} == names
    assert page.count("data:image/png;base64,") == len(names) and "bits per byte" in page
    for name in pictures:
        with Image.open(name) as picture:
            assert picture.width > 800 and len(picture.convert("RGB").getcolors(1 << 24)) > 50, "an empty picture"


@pytest.mark.slow
def test_unseen_questions_get_replies_that_end(finished):
    run, _ = finished
    scores = json.loads((run / "chat" / "replies.json").read_text())["models"][0]
    assert scores["replies"] == 100 and scores["stop_rate"] >= 0.95 and scores["median_length"] > 5
    losses = json.loads((run / "chat" / "provenance.json").read_text())["held_out_loss"]
    assert losses["after"] < losses["before"]
    held_out = {json.loads(line)["messages"][0]["content"] for line in (run / "chat" / "validation.jsonl").open()}
    assert {sample["question"] for sample in scores["samples"]} <= held_out


CHAT = """
import sys
sys.modules["tinyllama_hf"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
messages = [{"role": "user", "content": sys.argv[2]}]
inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
output = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1]:]
print(tokenizer.decode(output, skip_special_tokens=True).strip())
"""


@pytest.mark.slow
def test_the_chat_model_replies_the_same_to_stock_transformers(finished):
    run, _ = finished
    sample = json.loads((run / "chat" / "replies.json").read_text())["models"][0]["samples"][0]
    done = subprocess.run(
        [sys.executable, "-c", CHAT, str(run / "chat"), sample["question"]], capture_output=True, text=True
    )
    assert done.stdout.strip() == sample["reply"], done.stderr


@pytest.mark.slow
def test_it_talked_in_8_and_4_bit_and_the_draft_was_of_use(finished):
    _, printed = finished
    assert re.search(r"int8: [\d.]+ MB of weights", printed) and re.search(r"nf4: [\d.]+ MB of weights", printed)
    accepted = re.search(
        r"draft: (\d+) % of (\d+) drafted tokens accepted, (\d+) target passes for (\d+) tokens", printed
    )
    assert accepted, "the draft's line"
    assert int(accepted[1]) > 0 and int(accepted[3]) < int(accepted[4])


@pytest.mark.slow
def test_its_pair_speculates_exactly(finished):
    """The trained target and draft, batches of ragged prompts: stock `generate`'s own tokens, in fewer passes."""
    from transformers import AutoModelForCausalLM

    from tests.exactness import Reference, compare
    from tinyllama_hf import load

    run, _ = finished
    last = max((run / "pretrain" / "milestones").iterdir(), key=lambda folder: int(folder.name.split("-")[1]))
    (folder,) = (run / "draft" / "milestones").iterdir()
    (target, tokenizer), (draft, _) = load(last), load(folder)
    texts = (
        "Return a list of",
        "The file",
        "def __init__(self,",
        "import os",
        "    if not",
        "This module provides",
        "x",
        "class",
    )
    prompts = [tokenizer(text, split_special_tokens=True)["input_ids"] for text in texts]
    options = ({"max_new_tokens": 40}, {"max_new_tokens": 40, "repetition_penalty": 1.2})
    tally = compare(
        Reference(AutoModelForCausalLM.from_pretrained(last)), target, draft, prompts, options, (1, 2, 5), (2, 4)
    )
    print(tally)
    assert tally.ties == 0 and tally.statistics.row_passes < 0.8 * tally.statistics.new_tokens


@pytest.mark.slow
def test_commonsense_of_every_milestone_is_marked_as_a_sample(finished):
    run, printed = finished
    scores = json.loads((run / "pretrain" / "commonsense.json").read_text())
    assert len(scores["models"]) == 4 and all(len(row["results"]) == 7 for row in scores["models"])
    assert scores["protocol"]["sample"] and "SAMPLE: a few made-up items" in printed


PUBLISHED = """
import json, sys
sys.modules["tinyllama_hf"] = None
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from transformers import AutoModelForCausalLM, AutoTokenizer
repo = sys.argv[1]
paths = {}
for branch in [b.name for b in HfApi().list_repo_refs(repo).branches]:
    model = AutoModelForCausalLM.from_pretrained(repo, revision=branch)
    AutoTokenizer.from_pretrained(repo, revision=branch)
    paths[branch] = hf_hub_download(repo, "model.safetensors", revision=branch)
    card = ModelCard.load(hf_hub_download(repo, "README.md", revision=branch))
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
print(json.dumps(paths))
"""


@pytest.mark.slow
def test_every_published_milestone_loads_by_its_revision(finished, tmp_path):
    """In a process with stock transformers alone, against the Hub that the demo published to; equal byte for byte."""
    run, _ = finished
    milestones = {path.name: path for path in (run / "pretrain" / "milestones").iterdir()}
    done = subprocess.run(
        [sys.executable, "-m", "tests.local_hub", "--storage", str(run / "hub"), "--",
         sys.executable, "-c", PUBLISHED, "demo/nano-stdlib"],
        cwd=ROOT, env=os.environ | {"HF_HOME": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    paths = json.loads(done.stdout.splitlines()[-1])
    assert paths.keys() == {"main", *milestones}
    for branch, path in paths.items():
        newest = max(milestones, key=lambda name: int(name.split("-")[1]))
        folder = milestones[newest if branch == "main" else branch]
        assert Path(path).read_bytes() == (folder / "model.safetensors").read_bytes(), branch


@pytest.mark.slow
def test_finished_it_does_nothing(finished):
    run, _ = finished
    before = (run / "stages.tsv").read_text()
    again = demo(run.parent)
    printed = again.communicate(timeout=60)[0]
    assert again.returncode == 0 and printed.count(": already finished") == len(STAGES)
    assert (run / "stages.tsv").read_text() == before
