"""The examples of docs/conversations.md are read, and its messages are printed."""

import json
import re

import pytest
import yaml

from tests.conftest import ROOT
from tinyllama_hf.errors import InputError
from tinyllama_hf.finetune.config import ConversationDataSection, ConversationSource
from tinyllama_hf.finetune.conversations import read_conversations, read_sources
from tinyllama_hf.finetune.preferences import read_preferences


PAGE = (ROOT / "docs" / "conversations.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
ROWS = re.findall(r"^\| `(\{.*?\})` \| `(.*?)` \|$", PAGE, re.MULTILINE)
NAMES = ["messages", "prompt/completion", "ShareGPT", "Alpaca", "preferences", "preferences"]


@pytest.mark.parametrize(("number", "name"), list(enumerate(NAMES)))
def test_an_example_has_the_format_that_it_is_named_for(tmp_path, number, name):
    assert len(EXAMPLES) == len(NAMES)
    (tmp_path / "a.json").write_text(f"[{EXAMPLES[number]}]")
    sources = [ConversationSource(path=str(tmp_path / "a.json"))]
    data = read_preferences(sources) if name == "preferences" else read_sources(sources)
    assert data.sources[0].format == name
    if name != "preferences":
        assert f"\n`{name}`: " in PAGE and data.conversations[0].messages[-1]["content"] == "4"
    else:
        assert [data.pairs[0].chosen[0]["content"], data.pairs[0].rejected[0]["content"]] == ["4", "5"]


def test_the_section_of_the_recipe_is_valid():
    (section,) = re.findall(r"```yaml\ndata:\n(.*?)```", PAGE, re.DOTALL)
    data = ConversationDataSection.model_validate(yaml.safe_load(section))
    assert [source.weight for source in data.conversations] == [1, 2] and data.too_long == "truncate"


@pytest.mark.parametrize(("row", "message"), ROWS)
def test_a_row_is_refused_with_its_message(tmp_path, monkeypatch, row, message):
    assert len(ROWS) == 9
    monkeypatch.chdir(tmp_path)
    (tmp_path / "talk.jsonl").write_text(json.dumps(json.loads(row)) + "\n")
    with pytest.raises(InputError) as caught:
        read_conversations("talk.jsonl")
    assert str(caught.value).startswith(message)
