"""Each case of the collected requests of clients has its right value; the names are those of the collection."""

import dataclasses
import json
import re

import pytest

from tests.serving.client_cases import CHAT, COMPLETIONS, SHARED_CASES
from tinyllama_hf.batch.prompts import chat_ids
from tinyllama_hf.serving.call import Refusal, RowRequest


DEFAULTS = {field.name: field.default for field in dataclasses.fields(RowRequest)} | {
    "logit_bias": {},
    "temperature": 0.8,
    "top_p": 0.95,
}
DETAILS = {"is_streamed": False, "has_usage": False, "prompt_texts": [], "given": {}}


def ids_of(prompt, tokenizer):
    """The tokens of a conversation, of a text, or of ids."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    return chat_ids(prompt, tokenizer) if isinstance(prompt[0], dict) else prompt


@pytest.mark.parametrize("name", SHARED_CASES)
def test_a_case(reader, local, name):
    """All attributes of the rows and of the call, not only those that the case names."""
    case = SHARED_CASES[name]
    body = json.dumps(case.body).encode()
    if case.message is not None:
        with pytest.raises(Refusal) as refusal:
            reader.read(case.kind, body)
        assert refusal.value.message.startswith(case.message) and refusal.value.status == case.status
        assert refusal.value.param in case.message
        return
    call = reader.read(case.kind, body)
    assert call.kind == case.kind and len(call.rows) == len(case.prompts)
    prompts = [tuple(ids_of(prompt, local[1])) for prompt in case.prompts]
    for place, (row, ids) in enumerate(zip(call.rows, prompts, strict=True)):
        wanted = {**DEFAULTS, **case.rows, "ids": ids, "place": place}
        if wanted["max_new_tokens"] == "room":
            wanted["max_new_tokens"] = local[0].config.max_position_embeddings - len(ids)
        assert dataclasses.asdict(row) == wanted
    assert call.prompt_tokens == sum(map(len, prompts))
    assert {name: getattr(call, name) for name in DETAILS} == {**DETAILS, **case.call}


def test_all_cases_of_the_collection_are_here(shared):
    source = (shared / "cases" / "server_requests.py").read_text()
    names = set(re.findall(r'^ "([^"]+)": dict\(', source, re.MULTILINE))
    assert names and names <= CHAT.keys()
    names = set(re.findall(r'"([\w ]+)":\s?dict\(', source.partition("completions")[2]))
    assert names and names <= COMPLETIONS.keys()
