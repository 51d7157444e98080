"""Runs with a damaged part: one message, never a published model that a stock loader completes at random."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinyllama_hf.errors import InputError
from tinyllama_hf.hub.publish import plan_revisions


TEXTS = {
    ("provenance.json", None): "holds no provenance.json; copy the milestone again",
    ("provenance.json", "{}"): "provenance.json: names no step",
    ("provenance.json", "[]"): "provenance.json: damaged, no JSON object",
    ("config.json", "[]"): "model_type None, and only plain Llama folders",
    ("training.yaml", "a: [1"): "training.yaml: damaged, not valid YAML",
    ("../../metrics.jsonl", '{"step": 1, "to\n'): "metrics.jsonl: damaged, a row is not valid JSON",
}


@pytest.mark.parametrize(("name", "text"), TEXTS, ids=str)
def test_damaged_texts(run, name, text):
    file = next((run / "milestones").iterdir()) / name
    file.write_text(text) if text is not None else file.unlink()
    with pytest.raises(InputError, match=TEXTS[name, text]):
        plan_revisions(run, "me/my-model")


@pytest.mark.parametrize("shape", [None, 3])
def test_weights_that_a_stock_loader_would_draw_at_random(run, shape):
    file = next((run / "milestones").iterdir()) / "model.safetensors"
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(weights | ({"model.norm.weight": torch.ones(shape)} if shape else {}), file, metadata={"format": "pt"})
    found = r"has shape \[3\]" if shape else "is missing"
    with pytest.raises(InputError, match=rf"weight model\.norm\.weight {found}, and config\.json wants \[64\]"):
        plan_revisions(run, "me/my-model")
