"""`position_ids` in evaluation mode: equal to stock, documents kept apart, compiled and exported in one graph."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from transformers import DynamicCache

from tests.pretrain.test_regressions import ReadBacks
from tests.test_modeling import ids, make_pair
from tinyllama_hf import packed_documents


TOKENS = ids(2, 12, 96)
ORDINARY = torch.arange(12).expand(2, 12)
MASK = torch.ones(2, 12, dtype=torch.long)
MASK[1, :5] = 0
PADDED = (MASK.cumsum(-1) - 1).clamp(min=0)
PACKED = torch.tensor([[*range(5), *range(4), *range(3)], [*range(12)]])


@pytest.fixture(scope="module")
def pair():
    """Returns (ours, stock) in evaluation mode with equal weights."""
    return make_pair(hidden_size=64, intermediate_size=96, vocab_size=96, num_hidden_layers=1)


class Logits(torch.nn.Module):
    """A model without the cache in its output, which `torch.export` does not support."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **inputs) -> torch.Tensor:
        return self.model(**inputs).logits


def as_it_is(model: torch.nn.Module, inputs: dict) -> Callable[..., torch.Tensor]:
    return Logits(model)


def compiled(model: torch.nn.Module, inputs: dict) -> Callable[..., torch.Tensor]:
    torch.compiler.reset()
    return torch.compile(Logits(model), fullgraph=True, backend="eager")


def exported(model: torch.nn.Module, inputs: dict) -> Callable[..., torch.Tensor]:
    return torch.export.export(Logits(model), (), inputs, strict=False).module()


HOW = pytest.mark.parametrize("how", [as_it_is, compiled, exported])


@HOW
@pytest.mark.parametrize(
    "arguments",
    [{"position_ids": ORDINARY}, {"position_ids": PADDED, "attention_mask": MASK}],
    ids=["ordinary", "padded"],
)
@torch.no_grad()
def test_equal_to_stock(pair, how, arguments):
    inputs = {"input_ids": TOKENS, **arguments}
    found, expected = how(pair[0], inputs)(**inputs), pair[1](**inputs).logits
    if how is as_it_is:
        assert torch.equal(found, expected)
    else:  # where stock creates a mask that it otherwise omits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_cache", [None, True, False])
@torch.no_grad()
def test_the_cache_is_returned_as_by_stock(pair, use_cache):
    ours, stock = (model(input_ids=TOKENS, position_ids=ORDINARY, use_cache=use_cache) for model in pair)
    assert torch.equal(ours.logits, stock.logits)
    assert (ours.past_key_values is None) == (stock.past_key_values is None) == (use_cache is False)


@pytest.mark.parametrize(
    ("how", "masked"), [(as_it_is, False), (as_it_is, True), pytest.param(compiled, True, marks=pytest.mark.slow)]
)
@torch.no_grad()
def test_a_chunk_on_top_of_a_cache(pair, how, masked):
    inputs = {"input_ids": TOKENS, "position_ids": PADDED if masked else ORDINARY}
    first, second = ({name: value[:, part] for name, value in inputs.items()} for part in (slice(8), slice(8, 12)))
    if masked:
        first["attention_mask"], second["attention_mask"] = MASK[:, :8], MASK
    logits = []
    for model, way in zip(pair, (how, as_it_is), strict=True):
        cache = model(**first, use_cache=True).past_key_values
        logits.append(way(model, second)(**second, past_key_values=cache))
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
    assert how is not as_it_is or torch.equal(*logits)


@HOW
@torch.no_grad()
def test_documents_are_apart(pair, how):
    ours, _ = pair
    inputs = {"input_ids": TOKENS, "position_ids": PACKED, "use_cache": False}
    packed = how(ours, inputs)(**inputs)
    for begin, end in ((0, 5), (5, 9), (9, 12)):
        alone = ours(input_ids=TOKENS[:1, begin:end]).logits
        torch.testing.assert_close(packed[:1, begin:end], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed[1:], ours(input_ids=TOKENS[1:]).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("how", "given"),
    [
        *((as_it_is, name) for name in ("attention_mask", "past_key_values", "use_cache")),
        (compiled, "past_key_values"),
        (exported, "attention_mask"),
        (exported, "use_cache"),
    ],
)
@torch.no_grad()
def test_what_would_join_documents_is_refused(pair, how, given):
    ours, _ = pair
    value = {
        "attention_mask": torch.ones_like(MASK),
        "use_cache": True,
        "past_key_values": DynamicCache(config=ours.config),
    }
    inputs = {"input_ids": TOKENS, given: value[given]}
    run = how(ours, {**inputs, "position_ids": ORDINARY})
    with pytest.raises(ValueError if how is as_it_is else RuntimeError, match=given):
        run(**inputs, position_ids=PACKED)


@torch.no_grad()
def test_a_graph_with_the_configured_cache_refuses_documents(pair):
    """It returns the cache for ordinary positions, as stock does, so the same graph cannot disable it."""
    run = exported(pair[0], {"input_ids": TOKENS, "position_ids": ORDINARY})
    with pytest.raises(RuntimeError, match="use_cache"):
        run(input_ids=TOKENS, position_ids=PACKED)


@pytest.mark.parametrize(
    ("rows", "positions", "refused"), [(1, PACKED, False), (2, ORDINARY, False), (2, PACKED, True)]
)
@pytest.mark.parametrize("use_cache", [None, False])
def test_flash_attention_keeps_documents_of_one_row_apart_only(pair, rows, positions, refused, use_cache):
    config = pair[0].config.__class__()
    config._attn_implementation = "flash_attention_2"
    inputs = dict.fromkeys(("attention_mask", "past_key_values", "inputs_embeds"))
    inputs |= {"input_ids": TOKENS[:rows], "position_ids": positions[:rows], "use_cache": use_cache}
    with pytest.raises(ValueError, match="flash_attention_2") if refused else contextlib.nullcontext():
        packed_documents.use_cache_for_positions(config, inputs, training=False)


def test_nothing_is_read_where_an_accelerator_would_wait(pair):
    """After a cache, in training and without cache. A `meta` tensor has no values to read."""
    config = pair[0].config
    positions = PACKED.to("meta")
    inputs = {"input_ids": positions, "inputs_embeds": None, "position_ids": positions}
    for training, attention_mask, past, use_cache, expected in (
        (False, None, DynamicCache(config=config), None, None),
        (False, MASK.to("meta"), DynamicCache(config=config), True, True),
        (False, None, None, False, False),
        (True, None, None, None, False),
        (True, MASK.to("meta"), None, False, False),
    ):
        given = {"attention_mask": attention_mask, "past_key_values": past, "use_cache": use_cache}
        assert packed_documents.use_cache_for_positions(config, inputs | given, training) == expected


def test_a_step_of_one_token_is_not_looked_at(pair):
    ours, _ = pair
    with torch.no_grad(), ReadBacks() as watch:
        cache = ours(input_ids=TOKENS[:, :8], use_cache=True).past_key_values
        ours(input_ids=TOKENS[:, 8:9], position_ids=ORDINARY[:, 8:9], past_key_values=cache)
    assert not watch.found
