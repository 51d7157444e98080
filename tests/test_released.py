"""The registry against the published facts."""

import json
import shutil

import pytest
import yaml
from transformers import AutoTokenizer

from tinyllama_hf import TinyLlamaConfig, TinyLlamaTokenizer, load_tokenizer, released
from tinyllama_hf.errors import InputError
from tinyllama_hf.released import intermediate_checkpoint, local_folder, tables


def test_every_published_figure(shared):
    facts = yaml.safe_load((shared / "facts" / "released.yaml").read_text())
    for section in ("protocol", "rerun", "chat", "intermediate_collections", "instruct_eval", "tokens_per_step"):
        assert tables()[section] == facts[section], section
    rows = {model.name: model for model in released()}
    assert len(rows) == 18
    for section in ("base", "chat"):
        for row in facts[section]["rows"]:
            model = rows[row["name"]]
            assert model.hub == row["hub"]
            assert list(model.scores.values()) == row.get("scores", [])
            if section == "base":
                tokens = row.get("tokens") or row["step"] * facts["tokens_per_step"]
                assert model.tokens == float(tokens)


def test_averages_are_the_printed_ones_but_for_one():
    """The row of 3T prints an average that is not the mean of its own scores, and one row rounds another way."""
    rows = [row for section in ("base", "chat") for row in tables()[section]["rows"] if "scores" in row]
    by_name = {model.name: model for model in released()}
    off = [row["name"] for row in rows if abs(by_name[row["name"]].average - row["printed_average"]) > 0.0051]
    assert off == ["step-1431k-3T"]
    assert by_name["step-1431k-3T"].average == pytest.approx(52.97, abs=0.005)


def test_list_prints_every_name(run_command, tmp_path):
    printed = run_command("tinyllama-hf", "list", cwd=tmp_path).stdout
    lines = [line.split() for line in printed.splitlines()]
    for model in released():
        line = next(words for words in lines if words and words[0] == model.name)
        assert model.hub in line and model.revision in line
        assert model.average is None or f"{model.average:.2f}" in line


def test_names_that_are_none_and_a_hub_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"did you mean 'v1\.1'"):
        local_folder("v1.2")
    with pytest.raises(InputError, match="cannot be fetched from the Hub"):
        local_folder("step-50k-105b")
    with pytest.raises(InputError, match="cannot be fetched from the Hub"):
        local_folder("no-user/no-model@revision")
    assert local_folder(str(tmp_path)) == tmp_path


def test_every_intermediate_checkpoint_has_a_name_and_withdrawn_ones_have_none():
    first, repaired = (row["hub"] for row in tables()["intermediate_collections"][:2])
    for thousands in range(5, 1431, 5):
        name = f"step-{thousands}k-token-{thousands * 1000 * tables()['tokens_per_step'] / 1e9:.0f}B"
        assert intermediate_checkpoint(name) == (first if thousands <= 480 else repaired, name)
    assert intermediate_checkpoint("step-715k-token-1499B") == (repaired, "step-715k-token-1499B")
    assert intermediate_checkpoint("step-480k-1T") is None and intermediate_checkpoint("other") is None
    with pytest.raises(InputError, match=f"{repaired} cannot be fetched"):
        local_folder("step-500k-token-1049B")
    with pytest.raises(InputError, match=f"{first} cannot be fetched"):
        local_folder(f"{first}@step-500k-token-1049B")


@pytest.mark.parametrize(
    ("name", "message"),
    [("step-7k-token-15B", "every 5k steps"), ("step-1435k-token-3009B", "up to 1431k"),
     ("step-715k-token-1510B", "step-715k-token-1499B")],
)  # fmt: skip
def test_intermediate_checkpoints_that_do_not_exist(name, message):
    with pytest.raises(InputError, match=message):
        local_folder(name)


def test_a_tokenizer_is_that_of_the_revision(tokenizer_folder, tmp_path, monkeypatch):
    """Two branches of a repository in the Hub's cache, told apart by a setting of their tokenizers."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--me--model"
    (repository / "refs").mkdir(parents=True)
    for number, branch in enumerate(("main", "step-2"), start=1):
        (repository / "refs" / branch).write_text(str(number) * 40)
        snapshot = repository / "snapshots" / (str(number) * 40)
        snapshot.mkdir(parents=True)
        shutil.copy(tokenizer_folder / "tokenizer.model", snapshot)
        (snapshot / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 100 * number}))
        TinyLlamaConfig.preset("micro").save_pretrained(snapshot)
    assert load_tokenizer("me/model").model_max_length == 100
    assert load_tokenizer("me/model@step-2").model_max_length == 200
    for loader in (TinyLlamaTokenizer, AutoTokenizer):
        assert loader.from_pretrained("me/model").model_max_length == 100
        assert loader.from_pretrained("me/model", revision="step-2").model_max_length == 200
    folder = repository / "snapshots" / ("1" * 40)
    assert TinyLlamaTokenizer.from_pretrained(folder, revision="step-2").model_max_length == 100, "a folder has one"
