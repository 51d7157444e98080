"""Packed rows: each conversation has the losses and gradients that it has alone, through TRL's collator and head."""

import random

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.flex_attention import WrappedFlexAttention

from tinyllama_hf.finetune.conversations import TrainingExample
from tinyllama_hf.finetune.packed_rows import PACKED_SDPA, balanced_rows, packed_sdpa_attention
from tinyllama_hf.finetune.sft import joined_row


def conversations(number, longest=120):
    """Random tokens, about half of them with loss."""
    draw = random.Random(0)
    lengths = [draw.randint(4, longest) if draw.random() < 0.8 else draw.randint(4, 12) for _ in range(number)]
    return [
        TrainingExample([draw.randrange(64) for _ in range(length)], [int(draw.random() < 0.5) for _ in range(length)])
        for length in lengths
    ]


@pytest.fixture
def flex_on_a_cpu(monkeypatch):
    """Flex attention, which is used on a GPU, with reference kernels of torch.

    torch (2.13) has gradients for these, and refuses to use them on a CPU.
    """
    compile_function = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *args, **options: compile_function(*args, **{**options, "backend": "aot_eager"})
    )
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(WrappedFlexAttention, "_instance", None)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def losses_and_gradients(rows, examples, attention=PACKED_SDPA, padding_free=True):
    """Returns the losses of each conversation by token, and the gradients of the mean, over all rows."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
    from trl.trainer.utils import add_fused_lm_head

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        num_hidden_layers=2,
        max_position_embeddings=128,
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation=attention).train()
    add_fused_lm_head(model)
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free)
    count = sum(sum(example.assistant_masks[1:]) for example in examples)
    found = {}
    for row in rows:
        groups = [row] if padding_free else [[number] for number in row]
        batch = collate([joined_row([examples[number] for number in group]) for group in groups])
        log_probs = model(**batch, fused_lm_head=True, use_cache=False).log_probs
        (-log_probs.sum() / count).backward()
        start = 0
        for place, number in enumerate(row):
            length = len(examples[number].input_ids)
            one = log_probs[0, start:] if padding_free else log_probs[place]
            found[number] = one[: length - 1].detach()
            start += length
    return found, {name: parameter.grad for name, parameter in model.named_parameters()}


def differences(found, expected):
    """The largest difference of a loss, and of a gradient relative to the largest of its parameter."""
    (losses, gradients), (other_losses, other_gradients) = found, expected
    assert losses.keys() == other_losses.keys()
    pairs = [(gradients[name], other_gradients[name]) for name in gradients]
    return (
        max((losses[number] - other_losses[number]).abs().max().item() for number in losses),
        max((((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)),
    )


@pytest.mark.parametrize("number", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_losses_and_gradients_equal_those_of_each_conversation_alone(number):
    examples = conversations(number)
    rows = balanced_rows([len(example.input_ids) for example in examples], number // 10)
    alone = losses_and_gradients([[i] for i in range(number)], examples, "sdpa", padding_free=False)
    loss, gradient = differences(losses_and_gradients(rows, examples), alone)
    assert loss <= 1e-5 and gradient <= 1e-5


def test_flex_attention_keeps_conversations_apart(flex_on_a_cpu):
    examples = conversations(40)
    rows = balanced_rows([len(example.input_ids) for example in examples], 4)
    alone = losses_and_gradients([[i] for i in range(40)], examples, "sdpa", padding_free=False)
    loss, gradient = differences(losses_and_gradients(rows, examples, "flex_attention"), alone)
    assert loss <= 1e-5 and gradient <= 1e-5


def test_flex_attention_is_not_compiled_for_each_length(flex_on_a_cpu):
    """Rows need no padding for it. Compiled are the first length, all others, one block of 128 tokens, and one
    conversation alone, which has another mask.
    """
    examples = [TrainingExample([3] * length, [1] * length) for length in range(1, 500)]

    def compiled(*lengths):
        before = counters["stats"]["unique_graphs"]
        losses_and_gradients([list(range(len(lengths)))], [examples[n - 1] for n in lengths], "flex_attention")
        return counters["stats"]["unique_graphs"] - before

    # Two functions: the one that creates the mask, and attention.
    assert compiled(150, 40) == 2 and compiled(300, 20, 37) == 2
    assert [compiled(*n) for n in ((64, 64, 64), (401, 99, 2, 17), (100, 30), (470, 300, 200))] == [0, 0, 0, 0]
    assert compiled(30, 20) == 2 and compiled(100, 28) == 0
    assert compiled(140) == 2 and compiled(400) == 0


def test_joined_rows_would_be_seen():
    """With sdpa that ignores the bounds, losses and gradients differ: the comparison can fail."""
    examples = conversations(20)
    rows = balanced_rows([len(example.input_ids) for example in examples], 2)
    alone = losses_and_gradients([[i] for i in range(20)], examples, "sdpa", padding_free=False)
    from tinyllama_hf.pretrain.launch import UNPACKED_SDPA

    loss, gradient = differences(losses_and_gradients(rows, examples, UNPACKED_SDPA), alone)
    assert loss > 0.01 and gradient > 0.01


@pytest.mark.parametrize(("rows", "mask"), [(2, None), (1, torch.ones(1, 1, 8, 8))])
def test_what_would_join_conversations_is_an_error(rows, mask):
    query = torch.zeros(rows, 2, 8, 4)
    module = torch.nn.Module()
    with pytest.raises(ValueError, match="packed_sdpa: takes one packed row and no mask"):
        packed_sdpa_attention(module, query, query, query, mask, cu_seq_lens_q=torch.tensor([0, 3, 8]))


def test_rows_are_balanced():
    draw = random.Random(1)
    lengths = [draw.randint(5, 900) for _ in range(64)]
    rows = balanced_rows(lengths, 8)
    assert sorted(number for row in rows for number in row) == list(range(64))
    sums = [sum(lengths[number] for number in row) for row in rows]
    assert max(sums) - min(sums) < 100 and max(sums) < 4 / 3 * sum(lengths) / 8
    assert all(balanced_rows([7] * 8, 8)), "no row is empty"


def test_a_model_with_packed_attention_generates_as_with_sdpa():
    """Prompts with padding on the left, and rows with padding on the right, are masked."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes)).eval()
    ids = torch.tensor([[0, 0, 0, 0, 5, 17, 33], [9, 3, 7, 41, 8, 60, 21]])
    mask = (torch.arange(7) >= torch.tensor([[4], [0]])).long()
    found = []
    for attention in ("sdpa", PACKED_SDPA):
        model.set_attn_implementation(attention)
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        right = model(ids.flip(1), attention_mask=mask.flip(1)).logits[:, :3]
        found.append((model.generate(ids, attention_mask=mask, **options), right))
    assert found[0][0].equal(found[1][0])
    torch.testing.assert_close(found[1][1], found[0][1])
