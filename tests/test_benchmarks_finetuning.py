"""The parts of benchmarks/gpu/run.py for fine-tuning run on a CPU, with the batches of TRL."""

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from tests.conftest import ROOT
from tests.test_benchmarks_inference import rehearse
from tinyllama_hf.finetune.conversations import TrainingExample
from tinyllama_hf.finetune.sft import joined_row


@pytest.fixture(autouse=True)
def gpu_scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "gpu")


def as_lists(batch):
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


@pytest.mark.parametrize("multiple", [1, 16])
def test_packed_batches_are_those_of_trl(multiple):
    from packed_batches import draw_conversations, packed_batch

    conversations = draw_conversations([(5, 5), (9, 4), (1, 1), (30, 12)], 64)
    examples = [TrainingExample(c.input_ids.tolist(), (c.labels != -100).int().tolist()) for c in conversations]
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True, pad_to_multiple_of=multiple)
    expected = as_lists(collate([joined_row(examples)]))
    del expected["seq_idx"]  # of linear attention
    assert as_lists(packed_batch(conversations, multiple)) == expected


def test_padded_batches_are_those_of_trl():
    from packed_batches import draw_conversations, padded_batch

    conversations = draw_conversations([(5, 5), (9, 4), (30, 12)], 64)
    rows = [{name: value.tolist() for name, value in c._asdict().items()} for c in conversations]
    assert as_lists(padded_batch(conversations)) == as_lists(DataCollatorForLanguageModeling(pad_token_id=0)(rows))


def test_all_variants_train_on_the_same_conversations():
    from packed_batches import Variant, Workload, real_lengths

    workload = Workload(real_lengths(2048), 32, 32000)
    assert len(workload.conversations) == 1098 and len(workload.steps) == 7, "98 of each source"
    for step in (0, 3):
        seen = []
        for order, passes in (("random", 4), ("sorted", 4), ("packed", 4), ("packed", 1)):
            batches = workload.batches(Variant("", order, passes), step)
            assert len(batches) == passes
            trained = torch.cat([batch["labels"][:, 1:].flatten() for batch in batches])
            seen.append(trained[trained != -100].sort().values.tolist())
        # A packed row has no loss at the first token of its conversations, as an unpacked one by shifting.
        assert seen[0] == seen[1] == seen[2] == seen[3]


@pytest.mark.slow
def test_fine_tuning_on_a_cpu(tmp_path):
    pytest.importorskip("bitsandbytes")
    parts = ["packed_rows", "full", "lora", "qlora"]
    done, rows = rehearse(tmp_path / "rows.jsonl", "--parts", *parts)
    assert done.returncode == 0, done.stdout[-2000:]
    assert not [row for row in rows if "error" in row or "stopped" in row]
    exact, full, lora, qlora = ([r for r in rows if r["part"] == part and "variant" in r] for part in parts)
    compared = [row for row in exact if "wrong" in row]
    assert [(row["variant"], row["attention"], row["dtype"]) for row in compared] == [
        *(("joined", "sdpa", "float32"), ("packed", "sdpa", "float32"), ("packed", "packed_sdpa", "float32")),
        *(("packed", "sdpa", "bfloat16"), ("packed", "packed_sdpa", "bfloat16")),
    ]
    batches = ["padded", "sorted", "packed", "packed, 4 times as long"]
    names = [[row["variant"] for row in part if "tokens_per_second" in row] for part in (full, lora, qlora)]
    assert names == [
        [*batches, "packed", "packed, multiple of 128", "packed", *batches],
        batches * 2,
        ["padded, 4 x 512", "packed, 4 x 512"] * 2 + batches,
    ]
    assert all(row["ratio"] > 0 for row in (*full, *lora, *qlora) if "tokens_per_second" in row)
    skipped = {row["attention"] for row in (*exact, *full) if "skipped" in row}
    assert skipped == {"flex_attention", "flash_attention_2", "packed_varlen"}


def test_joined_rows_are_wrong(monkeypatch):
    """The part that checks exactness can fail: an attention that ignores the bounds is above the limits."""
    from measuring import Bench
    from packed_attention import Check

    from tinyllama_hf.decoding import graphs
    from tinyllama_hf.pretrain.launch import UNPACKED_SDPA

    monkeypatch.setattr(graphs, "recorder_for", graphs.recorder_for)  # which `Bench` replaces on a CPU
    check = Check(Bench("cpu", tiny=True))
    assert check.row("packed", UNPACKED_SDPA, (1e-5, 1e-4))["wrong"] == 1
    assert check.row("packed", "sdpa", (1e-5, 1e-4))["wrong"] == 0
    assert check.row("joined", "sdpa", (0.01, 0.01))["wrong"] == 0


def test_the_exit_status_has_the_check_of_packed_rows():
    import run

    assert run.is_bad({"part": "packed_rows", "stopped": "after 90 s"})
    assert not run.is_bad({"part": "full", "stopped": "after 90 s"})


@pytest.mark.parametrize("has_autocast", [False, True])
def test_torch_accepts_the_call_of_varlen_attention(has_autocast):
    """Shapes and types of a forward and backward pass, without values: it has kernels for GPUs only."""
    from packed_attention import VARLEN
    from packed_batches import draw_conversations, packed_batch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import LlamaConfig, LlamaForCausalLM

    batch = packed_batch(draw_conversations([(9, 4), (14, 14)], 64))
    config = LlamaConfig(vocab_size=64, hidden_size=64, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=48, num_hidden_layers=2)  # fmt: skip
    dtype = torch.float32 if has_autocast else torch.bfloat16
    with FakeTensorMode() as mode, torch.autocast("cpu", torch.bfloat16, enabled=has_autocast):
        model = LlamaForCausalLM._from_config(config, attn_implementation=VARLEN, dtype=dtype).train()
        inputs = {n: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for n, v in batch.items()}
        model(**inputs, use_cache=False).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.dtype == dtype for gradient in gradients)
