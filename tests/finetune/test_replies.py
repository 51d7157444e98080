"""Scores of replies: stop rate, length, and the loss of the true replies."""

import json
import shutil

import pytest
import torch

from tests.conftest import run_here
from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load_tokenizer
from tinyllama_hf.chat.templates import load_template
from tinyllama_hf.errors import InputError
from tinyllama_hf.finetune.replies import score_replies


@pytest.fixture
def folder(tokenizer_folder, tmp_path):
    """An untrained chat model. test_sft.py tests that a trained one stops."""
    torch.manual_seed(0)
    path = tmp_path / "chat"
    TinyLlamaForCausalLM(TinyLlamaConfig.preset("micro", vocab_size=512, max_position_embeddings=96)).save_pretrained(
        path
    )
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.chat_template = load_template("llama2")
    tokenizer.save_pretrained(path)
    rows = [
        [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": "A number. " * (i % 3 + 1)}]
        for i in range(12)
    ]
    (path / "validation.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


def test_the_score_file(folder):
    done = run_here("tinyllama-hf", "eval", "replies", folder, "--limit", "10", "--max-new-tokens", "8", cwd=folder)
    assert done.returncode == 0 and f"wrote {folder}/replies.json" in done.stdout, done.stderr
    scores = json.loads((folder / "replies.json").read_text())["models"][0]
    samples = scores["samples"]
    assert scores["replies"] == len(samples) == 10 and scores["max_new_tokens"] == 8
    assert scores["stop_rate"] == sum(sample["stopped"] for sample in samples) / 10
    assert 5 < scores["loss"] < 8, "about log(512) for a model that has learned nothing"
    assert [sample["question"] for sample in samples] == [f"What is {i}?" for i in range(10)]
    (again,) = score_replies([str(folder)], limit=10, max_new_tokens=8)
    assert again.to_json() == {**scores, "path": str(folder)}


def test_the_file_is_written_after_each_model(folder, tmp_path):
    """The second model cannot be loaded; the scores of the first are in the file, in place of earlier ones."""
    shutil.copytree(folder, tmp_path / "bad")
    weights = tmp_path / "bad" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    output = tmp_path / "replies.json"
    output.write_text('{"task": "replies", "models": [{"name": "of an earlier call"}]}')
    with pytest.raises(InputError, match=r"bad.*cannot be loaded"):
        score_replies([str(folder), str(tmp_path / "bad")], limit=2, max_new_tokens=2, output=output)
    assert [row["name"] for row in json.loads(output.read_text())["models"]] == ["chat"]
    output.write_text('{"task": "commonsense"}')
    with pytest.raises(InputError, match="replies scores"):
        score_replies([str(folder)], limit=2, output=output)
    assert output.read_text() == '{"task": "commonsense"}'


def test_refusals(folder, tmp_path):
    with pytest.raises(InputError, match="--limit 0: must be at least 1"):
        score_replies([str(folder)], limit=0)
    with pytest.raises(InputError, match=r"question.*90.*the model's context of 96"):
        score_replies([str(folder)], max_new_tokens=90)
    (tmp_path / "open.jsonl").write_text(
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "c"},
                ]
            }
        )
        + "\n"
    )
    with pytest.raises(InputError, match="1 conversations do not end with the assistant"):
        score_replies([str(folder)], str(tmp_path / "open.jsonl"))
    (folder / "validation.jsonl").unlink()
    with pytest.raises(InputError, match=r"validation\.jsonl: no such file\. .*--data"):
        score_replies([str(folder)])
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(InputError, match=r"conversation 1, message 1: the chat template"):
        (folder / "validation.jsonl").write_text(
            json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
        )
        score_replies([str(folder)])
