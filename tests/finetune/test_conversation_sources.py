"""Containers of conversations, invalid rows, and several sources."""

import csv
import gzip
import json

import pytest

from tests.hub.conftest import client_of
from tests.local_hub.accounts import USER as HUB_USER
from tests.local_hub.server import LocalHub
from tinyllama_hf.data.row_files import zstd_library
from tinyllama_hf.errors import InputError
from tinyllama_hf.finetune.config import ConversationSource
from tinyllama_hf.finetune.conversations import read_conversations, read_sources, split_conversations


PAIRS = [{"prompt": f"Number {i}?", "completion": f'It is "{i}",\nas ever. Ä'} for i in range(5)]


def as_talk(pair: dict) -> list[dict]:
    return [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair["completion"]}]


def write(folder, ending: str) -> str:
    path, lines = folder / f"talk.{ending}", "".join(json.dumps(row) + "\n" for row in PAIRS).encode()
    if ending == "parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(PAIRS), path)
    elif ending == "csv":
        with path.open("w", newline="", encoding="utf-8-sig") as file:  # as Excel writes it
            writer = csv.DictWriter(file, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(PAIRS)
    elif ending == "json":
        path.write_text("\ufeff" + json.dumps(PAIRS, indent=1, ensure_ascii=False), encoding="utf-8")
    else:
        packed = {"gz": gzip.compress, "zst": lambda b: zstd_library().compress(b)}.get(ending[6:], bytes)(lines)
        path.write_bytes(packed)
    return str(path)


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "json", "csv", "parquet"])
def test_every_container_has_the_same_conversations(tmp_path, ending):
    conversations = read_conversations(write(tmp_path, ending))
    assert [conversation.messages for conversation in conversations] == [as_talk(pair) for pair in PAIRS]
    assert conversations[-1].name == f"{tmp_path / 'talk'}.{ending}, row {5 + (ending == 'csv')}"


def test_a_byte_order_mark_and_windows_lines(tmp_path):
    rows = "\r\n".join(json.dumps({"messages": as_talk(pair)}) for pair in PAIRS)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + rows.encode())
    assert [c.messages for c in read_conversations(str(tmp_path / "a.jsonl"))] == [as_talk(pair) for pair in PAIRS]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A data set on the local Hub with two splits, and a second one with two configurations."""
    from datasets import config as datasets_config
    from huggingface_hub import HfApi

    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets_config, "HF_CACHE_HOME", str(tmp_path / "hf-home"))
    with LocalHub(tmp_path / "hub").serving() as hub, client_of(hub.endpoint, tmp_path / "hf-home"):
        monkeypatch.setattr(datasets_config, "HF_ENDPOINT", hub.endpoint)
        monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", False)
        api, rows = HfApi(endpoint=hub.endpoint), "".join(json.dumps(row) + "\n" for row in PAIRS)
        for repo, names in (("one", ["train"]), ("two", ["train", "test"])):
            api.create_repo(f"{HUB_USER}/{repo}", repo_type="dataset")
            for name in names:
                content = rows.replace("Number", name).encode()
                api.upload_file(
                    path_or_fileobj=content,
                    path_in_repo=f"{name}.jsonl",
                    repo_id=f"{HUB_USER}/{repo}",
                    repo_type="dataset",
                )
        yield hub


def test_data_sets_of_the_hub(hub):
    one, two = f"hub:{HUB_USER}/one", f"hub:{HUB_USER}/two"
    talks = read_conversations(one)
    assert [talk.messages[1]["content"] for talk in talks] == [pair["completion"] for pair in PAIRS]
    assert talks[0].name == f"{one}, row 1" and talks[0].messages[0]["content"] == "train 0?"
    assert [c.messages for c in read_conversations(f"{one}@main:train")] == [c.messages for c in talks]
    assert read_conversations(f"{two}:test")[0].messages[0]["content"] == "test 0?"
    assert read_conversations(f"{two}:default/test")[0].messages[0]["content"] == "test 0?"
    for name, message in (
        (two, f"{two}: has the splits train, test. Name one, as in {two}:train"),
        (f"{two}:validation", f"{two}:validation: cannot be loaded .*Unknown split"),
        (f"{two}:other/test", f"{two}:other/test: cannot be loaded .*'other' not found"),
        (f"hub:{HUB_USER}/none", f"hub:{HUB_USER}/none: cannot be loaded .*Check name, access and network"),
        (f"{two}/test.jsonl", f"{two}/test.jsonl: the form is hub:OWNER/NAME"),
    ):
        with pytest.raises(InputError, match=message):
            read_conversations(name)


def write_cases(folder) -> str:
    good = {"messages": as_talk(PAIRS[0])}
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    bad = [
        {"messages": [good["messages"][0], call]},
        {"messages": [good["messages"][1]]},
        {"messages": [*good["messages"], {"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
        {"messages": [good["messages"][0], {"role": "assistant", "content": ""}]},
        {"messages": [good["messages"][0], {"role": "assistant", "content": "x \ud83d"}]},
        {"messages": [good["messages"][0], {"role": "assistant", "content": "xyz \ud83d"}]},
        {"messages": [{**good["messages"][0], "speaker": "Ann"}, good["messages"][1]]},
        {"messages": [*good["messages"], {"role": "tool", "content": "3"}]},
        {"text": "a"},
    ]
    path = folder / "cases.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [good, *bad, good]))
    return str(path)


REASONS = {
    2: ", message 1: key 'tool_calls' not supported",
    3: ": starts with the assistant",
    4: ": turn 3 has the role 'user', expected 'assistant'",
    5: ", message 1: the reply is empty",
    6: ", message 1: character 2 is '\\ud83d', half of a surrogate pair",
    7: ", message 1: character 4 is '\\ud83d', half of a surrogate pair",
    8: ", message 0: key 'speaker' not supported",
    9: ", message 2: unknown role 'tool'",
    10: ": no known format",
}


def test_invalid_rows_are_dropped_with_a_count_and_a_reason(tmp_path):
    """Rows 6 and 7 have the same reason, since only the number of the character differs."""
    path = write_cases(tmp_path)
    data = read_sources([ConversationSource(path=path)], "drop")
    assert [conversation.name for conversation in data.conversations] == [f"{path}, row 1", f"{path}, row 11"]
    (source,) = data.sources
    assert (source.num_rows, source.num_invalid, source.formats) == (11, 9, {"messages": 2})
    wanted = [(number, reason) for number, reason in REASONS.items() if number != 7]
    for (count, first), (number, reason) in zip(source.invalid.values(), wanted, strict=True):
        assert count == 1 + (number == 6) and first.startswith(f"{path}, row {number}{reason}")


@pytest.mark.parametrize("number", REASONS)
def test_an_invalid_row_is_an_error_with_its_place(tmp_path, number):
    rows = open(write_cases(tmp_path), encoding="utf-8").readlines()
    (tmp_path / "one.jsonl").write_text("\n" * (number - 1) + rows[number - 1])
    with pytest.raises(InputError) as caught:
        read_conversations(str(tmp_path / "one.jsonl"))
    assert str(caught.value).startswith(f"{tmp_path / 'one.jsonl'}, row {number}{REASONS[number]}")


def test_a_data_set_without_a_usable_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl: no usable row of 2: .*row 1: no known format"):
        read_sources([ConversationSource(path=str(tmp_path / "a.jsonl"))], "drop")
    for name, text in (("empty.json", "[]"), ("empty.csv", "prompt,completion\n"), ("empty.jsonl", "\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=rf"{name}: no usable row$"):
            read_conversations(str(tmp_path / name))


def test_several_sources(tmp_path):
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": as_talk(PAIRS[1])}) + "\n")
    sources = [
        ConversationSource(path=write(tmp_path, "csv")),
        ConversationSource(path=str(tmp_path / "b.jsonl"), weight=0.5),
    ]
    data = read_sources(sources)
    assert [conversation.source for conversation in data.conversations] == [0] * 5 + [1]
    assert [(s.name, s.weight, s.format, s.num_rows) for s in data.sources] == [
        (sources[0].path, 1.0, "prompt/completion", 5),
        (sources[1].path, 0.5, "messages", 1),
    ]
    held_out = split_conversations(data.conversations, 0.5)[1]
    assert sum(c.messages == as_talk(PAIRS[1]) for c in held_out) in (0, 2), "one that occurs twice is in one part"


BAD_FILES = {
    "a table with too many cells": (
        "a.csv",
        "prompt,completion\nQ,A,B\n",
        r"a\.csv, row 2: has 3 cells, the header 2",
    ),
    "a table with an open quote": ("a.csv", 'prompt,completion\nQ,A\n"Q,A\n', r"a\.csv: not valid CSV after row 2"),
    "two columns of one name": ("a.csv", "prompt,prompt\nQ,A\n", r"a\.csv: two columns have the name 'prompt'"),
    "an array that ends early": ("a.json", '[{"prompt": "Q"', r"a\.json: not a valid JSON array"),
    "another type": ("a.txt", "text", r"a\.txt: unknown type of file\. Name a file of type \.jsonl"),
}


@pytest.mark.parametrize(("name", "text", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_files_that_cannot_be_read(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_sources([ConversationSource(path=str(tmp_path / name))], "drop")


def test_json_lines_under_the_name_of_an_array(tmp_path):
    write(tmp_path, "jsonl")
    (tmp_path / "talk.jsonl").rename(tmp_path / "talk.json")
    assert len(read_conversations(str(tmp_path / "talk.json"))) == 5
