"""Document masking without a dense mask, and without synchronization with the host."""

import itertools
import re
from collections import Counter

import pytest
import torch

from tests.pretrain.runs import run
from tests.pretrain.test_regressions import ReadBacks
from tinyllama_hf import TinyLlamaConfig, TinyLlamaForCausalLM
from tinyllama_hf.errors import InputError
from tinyllama_hf.pretrain.launch import resolve_compile


# Two rows: one of documents of several lengths, down to one token, and one of a single document.
POSITIONS = torch.tensor([[*range(9), 0, *range(119), *range(127)], [*range(5, 261)]])


def inputs(device: str = "cpu") -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 512, POSITIONS.shape, generator=torch.Generator().manual_seed(0)).to(device)
    return {"input_ids": tokens, "labels": tokens, "position_ids": POSITIONS.to(device)}


def model(attention: str, device: str = "cpu") -> TinyLlamaForCausalLM:
    torch.manual_seed(0)
    config = TinyLlamaConfig.preset("micro", vocab_size=512)
    return TinyLlamaForCausalLM._from_config(config, attn_implementation=attention).to(device).train()


def loss_and_gradients(
    model: TinyLlamaForCausalLM, device: str = "cpu"
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = model(**inputs(device)).loss
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_near(found: tuple, expected: tuple) -> None:
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).abs().max() <= 1e-5, name


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="flex attention has a backward pass on a GPU only (torch 2.13)"
)
def test_flex_on_a_gpu_equals_the_dense_mask():
    """Loss and gradients in fp32; and the step does not wait for the device."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        flex, dense = (model(attention, "cuda") for attention in ("flex_attention", "eager"))
        assert_near(loss_and_gradients(flex, "cuda"), loss_and_gradients(dense, "cuda"))
        given = inputs("cuda")
        torch.cuda.set_sync_debug_mode("error")
        flex(**given, num_items_in_batch=512).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.set_float32_matmul_precision(precision)


@pytest.mark.slow
def test_flex_forward_equals_the_dense_mask():
    """The part of flex that runs on a CPU."""
    if not resolve_compile("auto", torch.device("cuda"))[0]:
        pytest.skip("flex attention is compiled, and no compiler is found")
    with torch.no_grad():
        losses = [model(attention)(**inputs()).loss for attention in ("flex_attention", "eager")]
    torch.testing.assert_close(*losses, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_cpu_equals_each_document_alone(attention):
    packed = loss_and_gradients(model(attention))
    given, alone = inputs(), model(attention)
    total, starts = torch.zeros(()), [0, 9, 10, 129, 256]
    shift = torch.nn.functional.pad(given["labels"], (0, 1), value=-100)[:, 1:]
    for row, begin, end in [*((0, a, b) for a, b in itertools.pairwise(starts)), (1, 0, 256)]:
        part = {
            "input_ids": given["input_ids"][row : row + 1, begin:end],
            "shift_labels": shift[row : row + 1, begin:end],
        }
        total = total + alone(**part, labels=part["input_ids"], num_items_in_batch=510).loss
    total.backward()
    assert_near(packed, (total, {name: parameter.grad for name, parameter in alone.named_parameters()}))


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_the_mask_is_that_of_transformers_and_reads_nothing_back(attention):
    from transformers.masking_utils import create_causal_mask

    from tinyllama_hf.packed_documents import document_mask

    config = model(attention).config
    with ReadBacks() as watch:
        found = document_mask(config, POSITIONS)
    assert watch.found == Counter()
    with ReadBacks() as watch:
        expected = create_causal_mask(
            config=config,
            inputs_embeds=torch.empty(2, 256, 0),
            attention_mask=None,
            past_key_values=None,
            position_ids=POSITIONS,
        )
    assert watch.found, "when this fails, transformers reads nothing back either, and document_mask can go"
    if attention == "flex_attention":
        found, expected = found.to_dense(), expected.to_dense()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_is_refused_before_anything_else(recipe, attention):
    message = f"training.attention: {attention} does not support data.document_masking"
    with pytest.raises(InputError, match=re.escape(message)):
        run(recipe, f"training.attention={attention}", "data.document_masking=true")


def test_transformers_still_joins_the_documents_of_several_rows_under_flash_attention():
    """The reason for this refusal (transformers 5.23)."""
    from transformers.modeling_flash_attention_utils import _is_packed_sequence

    assert _is_packed_sequence(POSITIONS[:1], 1) and not _is_packed_sequence(POSITIONS, 2)
    refusing = model("eager")
    refusing.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2 with 2 rows"):
        refusing(**inputs())
