"""All text from users is read alike: a byte order mark is dropped, half of a surrogate pair is an error."""

import codecs
import gzip
import json
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tinyllama_hf import load_tokenizer
from tinyllama_hf.batch.prompts import read_prompts
from tinyllama_hf.chat.templates import load_template
from tinyllama_hf.data.row_files import read_rows, zstd_library
from tinyllama_hf.data.sources import open_sources, read_documents
from tinyllama_hf.errors import InputError
from tinyllama_hf.finetune.config import load_finetune_config
from tinyllama_hf.finetune.conversations import read_conversations
from tinyllama_hf.inference.generation import Context, generate_text
from tinyllama_hf.text import check_text, read_text


TALK = [{"role": "user", "content": "Été?"}, {"role": "assistant", "content": "Oui."}]
ROWS = [{"text": "Été, premier"}, {"text": "two"}]


def as_windows_writes(path: Path, text: str) -> Path:
    """The text with a byte order mark and CRLF line ends."""
    path.write_bytes(codecs.BOM_UTF8 + text.replace("\n", "\r\n").encode())
    return path


def lines(*rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_a_text(tmp_path):
    file = as_windows_writes(tmp_path / "a.txt", "é\nb\n")
    assert read_text(file) == "é\nb\n" and read_text(file, newline="") == "é\r\nb\r\n"
    (tmp_path / "plain.txt").write_bytes("é\ufeff".encode())
    assert read_text(tmp_path / "plain.txt") == "é\ufeff", "only at the beginning is it a mark"
    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.txt: not UTF-8 .* at byte 1"):
        read_text(tmp_path / "latin.txt")
    with pytest.raises(InputError, match=r"none\.txt: cannot be read"):
        read_text(tmp_path / "none.txt")


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_rows(tmp_path, ending):
    plain = as_windows_writes(tmp_path / "rows", lines(*ROWS)).read_bytes()
    pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": lambda b: zstd_library().compress(b)}[ending]
    (tmp_path / f"a.{ending}").write_bytes(pack(plain))
    assert list(read_rows(tmp_path / f"a.{ending}")) == [(1, ROWS[0]), (2, ROWS[1])]


def test_documents_keep_their_line_ends(tmp_path):
    file = as_windows_writes(tmp_path / "a.txt", "Été\nb")
    assert [document.text for document in read_documents(open_sources([str(file)]))] == ["Été\r\nb"]


def test_a_recipe(tmp_path):
    recipe = ROOT / "recipes" / "sft" / "full.yaml"
    written = as_windows_writes(tmp_path / "a.yaml", recipe.read_text())
    assert load_finetune_config(written) == load_finetune_config(recipe)


def test_templates(tmp_path, tokenizer_folder):
    text = load_template("llama2")
    assert load_template(str(as_windows_writes(tmp_path / "a.jinja", text))) == text
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.save_pretrained(tmp_path / "folder")
    as_windows_writes(tmp_path / "folder" / "chat_template.jinja", text)
    assert load_tokenizer(tmp_path / "folder").chat_template == text


def test_conversations_and_prompts(tmp_path, tokenizer_folder):
    talk = as_windows_writes(tmp_path / "talk.jsonl", lines({"messages": TALK}))
    assert [c.messages for c in read_conversations(str(talk))] == [TALK]
    file = as_windows_writes(tmp_path / "prompts.jsonl", lines({"prompt": "Once"}, {"prompt": "The cat"}))
    prompts, bad = read_prompts(file, load_tokenizer(tokenizer_folder), Context(96))
    assert [prompt.fields["prompt"] for prompt in prompts] == ["Once", "The cat"] and not bad


def test_the_cases(shared, tokenizer_folder):
    folder = shared / "cases"
    rows = [row for _, row in read_rows(folder / "bom_crlf.jsonl")]
    assert len(rows) > 10 and rows[0]["text"].startswith("Line number 0 says that the café")
    (document,) = read_documents(open_sources([str(folder / "bom.txt")]))
    assert document.text == "Hello world.\r\nThis is a Windows text file.\r\n"
    prompts, bad = read_prompts(folder / "prompts.jsonl", load_tokenizer(tokenizer_folder), Context(96))
    assert [prompt.fields["id"] for prompt in prompts] == [1, 2] and not bad


def test_half_a_surrogate_pair():
    check_text("an emoji 🚀 and \ufeff", "here")
    with pytest.raises(InputError, match=r"here: character 3 is '\\ud83d', half of a surrogate pair"):
        check_text("an \ud83d", "here")
    with pytest.raises(InputError, match="prompt: character 3"):  # before the model is looked at
        generate_text(None, None, "an \udcff")


def test_half_a_surrogate_pair_in_files(tmp_path, tokenizer_folder, shared):
    bad = [TALK[0], {"role": "assistant", "content": "x \ud83d"}]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": TALK}) + "\n" + json.dumps({"messages": bad}) + "\n")
    with pytest.raises(InputError, match=r"talk\.jsonl, row 2, message 1: character 2 is '\\ud83d'"):
        read_conversations(str(tmp_path / "talk.jsonl"))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a\ud83d"}) + "\n")
    with pytest.raises(InputError, match=r"rows\.jsonl, row 1, 'text': character 1 is '\\ud83d'"):
        open_sources([str(tmp_path / "rows.jsonl")])
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "x"}\n' + json.dumps({"messages": bad}) + "\n")
    _, (line,) = read_prompts(tmp_path / "prompts.jsonl", load_tokenizer(tokenizer_folder), Context(96))
    assert line.line == 2 and line.fields == {} and r"message 1: character" in line.error
    with pytest.raises(InputError, match=r"surro\.jsonl, row 21, message 0: character 6 is '\\ud83d'"):
        read_conversations(str(shared / "cases" / "surro.jsonl"))
