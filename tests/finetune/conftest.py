"""A base model and a recipe that trains it in seconds."""

import json

import pytest
import torch
import yaml

from tests.conftest import ROOT
from tests.finetune.runs import COLORS, THINGS
from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM, load_tokenizer


@pytest.fixture(scope="module")
def base(tokenizer_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    torch.manual_seed(0)
    config = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "max_position_embeddings": 96}
    TinyLlamaForCausalLM(TinyLlamaConfig.preset("micro", vocab_size=512, **config)).save_pretrained(folder)
    load_tokenizer(tokenizer_folder).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(base, tmp_path):
    rows = [
        [
            {"role": "user", "content": f"Which {thing} is number {i}?"},
            {"role": "assistant", "content": f"The {color} one."},
        ]
        for thing in THINGS
        for i, color in enumerate(COLORS)
    ]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in rows))
    values = yaml.safe_load((ROOT / "recipes" / "sft" / "full.yaml").read_text())
    values["output_dir"] = str(tmp_path / "chat")
    values["model"]["path"] = str(base)
    values["data"] |= {"conversations": str(tmp_path / "talk.jsonl"), "max_length": 96, "validation_fraction": 0.2}
    values["training"] |= {"epochs": 12, "learning_rate": 5e-3, "sequences_per_step": 8, "micro_batch_size": 8}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml"
