"""Replies in JSON: what a grammar allows after each token, and 200 replies of a real model."""

import json
import random

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from tests.serving.json_schemas import SCHEMAS, follows
from tinyllama_hf import load
from tinyllama_hf.batch.prompts import chat_ids
from tinyllama_hf.inference.generation import stop_token_ids
from tinyllama_hf.serving.response_formats import GrammarProcessor, grammar_of, grammar_tokenizer
from tinyllama_hf.text import decode_text


PROMPT = [5, 6, 7]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 8}, "b": {"type": "array", "items": {"type": "integer"}}},
    "required": ["a"],
    "additionalProperties": False,
}


def grammar_for(schema):
    return grammar_of({"type": "json_schema", "json_schema": {"schema": schema}}, "response_format")


@pytest.fixture(scope="module")
def processors(local):
    """A function that returns a new processor of a grammar; the tokenizer is of SentencePiece's kind."""
    tokenizer = grammar_tokenizer(*local)
    return lambda grammar: GrammarProcessor(tokenizer, grammar, len(PROMPT))


def allowed(processor, reply):
    """The tokens that a processor leaves after a reply; all 512 after one that is no beginning of a valid text."""
    scores = processor(torch.tensor([[*PROMPT, *reply]]), torch.zeros(1, 512))
    assert scores.shape == (1, 512) and not scores[torch.isfinite(scores)].any()
    return set(torch.isfinite(scores[0]).nonzero()[:, 0].tolist())


def test_a_reply_token_by_token(local, processors):
    """Byte tokens, the space that a word begins with, characters outside of ASCII, and the end."""
    tokenizer, processor = local[1], processors(grammar_for(SCHEMA))
    text = '{"a": "\u00e9\\" x", "b": [1, -20]}'
    reply = grammar_tokenizer(*local).tokenize_str(text)
    assert decode_text(tokenizer, reply) == text
    for place, token in enumerate(reply):
        found = allowed(processor, reply[:place])
        assert token in found and 2 not in found and len(found) < 512, place
    assert allowed(processor, reply) == {2}, "only the end"
    assert not processor.error


def test_the_end_is_allowed_where_the_text_may_end(local, processors):
    encode = grammar_tokenizer(*local).tokenize_str
    processor = processors(grammar_for({"type": "array", "items": {"type": "integer"}, "maxItems": 2}))
    assert allowed(processor, encode("[]")) == {2} and 2 not in allowed(processor, encode("[1"))
    number = processors(grammar_for({"type": "integer"}))
    found = allowed(number, encode("12"))
    assert 2 in found and len(found) > 1


def test_any_order_of_prefixes(processors):
    """Drafted tokens, rejected ones, tokens after the end, and the same prefix twice: as a new processor."""
    grammar, chance = grammar_for(SCHEMA), random.Random(0)
    processor, seen = processors(grammar), [[]]
    ended = wrong = 0
    for _ in range(120):
        reply = list(chance.choice(seen))[: chance.randrange(40)]
        for _ in range(chance.randrange(1, 12)):
            found = allowed(processor, reply)
            assert found == allowed(processors(grammar), reply)
            seen.append(list(reply))
            is_wrong = chance.random() < 0.15
            token = chance.randrange(512) if is_wrong else 2 if 2 in found else chance.choice(sorted(found))
            ended, wrong = ended + (token == 2), wrong + (len(found) == 512)
            reply.append(token)
    assert ended > 20 and wrong > 20 and not processor.error


def test_white_space_is_that_of_json_dumps(local, processors):
    """Small models repeat line breaks without end where any amount of white space is allowed."""
    encode = grammar_tokenizer(*local).tokenize_str
    for own in ({}, {"x-guidance": {"whitespace_flexible": True, "item_separator": ","}}):
        processor = processors(grammar_for({**SCHEMA, **own}))
        for wrong in ('{ "', '{"a":"', '{"a" :', "{\n", '{"a": "", "b": [1,2', " {"):
            assert len(allowed(processor, encode(wrong))) == 512, wrong
        assert len(allowed(processor, encode('{"a": "", "b": [1, 2'))) < 512


def test_any_object(local, processors):
    encode = grammar_tokenizer(*local).tokenize_str
    processor = processors(grammar_of({"type": "json_object"}, "response_format"))
    text = '{"x": {"y": [1.5e3, null, true, "z"]}}'
    assert allowed(processor, encode(text)) == {2} and len(allowed(processor, encode("[1"))) == 512


def test_a_grammar_that_cannot_be_followed(processors):
    """The reply ends, and the reason is kept."""
    endless = processors(grammar_for({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}))
    reply = []
    while (found := allowed(endless, reply)) != {2}:
        reply.append(min(found))
        assert len(reply) < 20
    assert endless.error and "<state>" not in endless.error and len(endless.error) <= 300
    assert allowed(endless, [*reply, 2]) == {2}, "finite scores after the end, too"


class ByRow(LogitsProcessor):
    """Applies one processor to each row."""

    def __init__(self, processors):
        self.processors = processors

    def __call__(self, input_ids, scores):
        rows = zip(self.processors, input_ids.split(1), scores.split(1), strict=True)
        return torch.cat([processor(ids, row) for processor, ids, row in rows])


QUESTIONS = (
    "Who wrote Hamlet?", "Describe Paris.", "Tell me about Ada Lovelace.", "I love this phone, but it is slow.",
    "What is 17 plus 25?", "Name three animals.", "When did the second world war end?", "Plan a dinner for two.",
    "Invent a person who lives in Rome.", "How tall is Mount Everest?",
)  # fmt: skip


def test_200_of_200_replies_are_valid(smollm2):
    """Of a real model with a byte-level tokenizer: 20 sampled replies to each schema."""
    model, tokenizer = load(smollm2, dtype=torch.float32)
    guided, tokenizer.padding_side = grammar_tokenizer(model, tokenizer), "left"
    torch.manual_seed(0)
    wrong, num_replies = [], 0
    for schema in SCHEMAS.values():
        keys = " and ".join(schema.get("properties", ("city", "is_capital")))
        asked = [{"role": "user", "content": f"{question} Answer in JSON with {keys}."} for question in QUESTIONS * 2]
        inputs = tokenizer.pad({"input_ids": [chat_ids([each], tokenizer) for each in asked]}, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        by_row = ByRow([GrammarProcessor(guided, grammar_for(schema), length) for _ in asked])
        output = model.generate(
            **inputs, do_sample=True, temperature=0.8, top_p=0.95, top_k=0, max_new_tokens=150,
            eos_token_id=stop_token_ids(model, tokenizer), pad_token_id=tokenizer.pad_token_id,
            logits_processor=LogitsProcessorList([by_row]),
        )  # fmt: skip
        texts = [decode_text(tokenizer, ids) for ids in output[:, length:].tolist()]
        num_replies += len(texts)
        wrong += [text for text in texts if not is_valid(text, schema)]
    assert num_replies == 200 and wrong == []


def is_valid(text, schema):
    try:
        return follows(json.loads(text), schema)
    except ValueError:
        return False
