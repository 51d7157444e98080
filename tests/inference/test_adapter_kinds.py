"""Adapters of every kind: the loaded model computes the same as after training, with the tokenizer saved with it."""

import json

import pytest
import torch

from tests.inference.conftest import CASES, NEW_TOKENS, ROWS, TEMPLATE, trained
from tinyllama_hf import load
from tinyllama_hf.batch.job import open_job
from tinyllama_hf.errors import InputError
from tinyllama_hf.inference.adapters import add_adapter
from tinyllama_hf.inference.chat import ChatSession
from tinyllama_hf.inference.options import Sampling


pytest.importorskip("peft")


@pytest.mark.parametrize(("kind", "resized"), CASES, ids=[f"{kind}{', resized' * r}" for kind, r in CASES])
def test_logits_of_the_trained_model(base, tmp_path, kind, resized):
    adapted = trained(base, kind, resized, tmp_path)
    rows = ROWS + resized * len(NEW_TOKENS)
    ids = torch.tensor([[1, 3, 4, *range(50, 60), rows - 1, rows - 2]])
    for trainable in (False, True):
        model, tokenizer = load(base, adapter=tmp_path, trainable=trainable)
        with torch.no_grad():
            assert torch.equal(model.eval()(ids).logits, adapted(ids).logits)
        assert model.config.vocab_size == rows == len(tokenizer)
    assert tokenizer.chat_template == (TEMPLATE if resized else None)


def test_its_tokenizer_and_template_are_used(base, tmp_path):
    """In a chat, and for a file of prompts, which is read before the weights are loaded."""
    trained(base, "plain", True, tmp_path / "adapter")
    model, tokenizer = load(base, adapter=tmp_path / "adapter")
    assert ChatSession(model, tokenizer)
    messages = [{"role": "user", "content": "Hello"}]
    (tmp_path / "in.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    names = (tmp_path / "in.jsonl", tmp_path / "out.jsonl", str(base))
    job = open_job(*names, adapter=str(tmp_path / "adapter"), sampling=Sampling(0.0, max_new_tokens=4))
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert job.prompts.prompts[0].ids == expected and ROWS in expected


def test_a_template_without_a_tokenizer(base, tmp_path):
    trained(base, "plain", True, tmp_path / "resized")
    trained(base, "plain", False, tmp_path / "plain")
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        (tmp_path / "plain" / name).unlink(missing_ok=True)
    (tmp_path / "plain" / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = load(base, adapter=tmp_path / "plain")[1]
    assert (len(tokenizer), tokenizer.chat_template) == (ROWS, TEMPLATE)


class TestRefusals:
    def test_new_tokens_without_their_embeddings(self, base, tmp_path):
        """The new rows were random in training, and were not saved."""
        trained(base, "plain", True, tmp_path, save_embedding_layers=False)
        with pytest.raises(InputError, match=r"has 515 tokens, .* 512 rows.*save_embedding_layers=True"):
            load(base, adapter=tmp_path)

    def test_another_base_is_named(self, base, nano_folder, tmp_path):
        trained(base, "plain", True, tmp_path)
        with pytest.raises(InputError, match=f"trained on .*{base.name}"):
            add_adapter(load(nano_folder)[0], tmp_path)

    def test_code_is_not_imported(self, base, tmp_path):
        trained(base, "plain", False, tmp_path)
        path = tmp_path / "adapter_config.json"
        fields = {"megatron_config": {"tensor_model_parallel_size": 1}, "megatron_core": "antigravity"}
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        with pytest.raises(InputError, match="megatron_config"):
            load(base, adapter=tmp_path)
