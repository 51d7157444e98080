"""Tokenizers from damaged files or with code of their own: a clear error, and the code never runs."""

import collections
import io
import json
import random
import shutil
import sys

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase, dynamic_module_utils

from tests.conversion.mutants import _changed, _moved, _odd_fields
from tests.conversion.test_gguf_tokenizer import byte_level
from tinyllama_hf import load_tokenizer
from tinyllama_hf.errors import InputError
from tinyllama_hf.files import read_json
from tinyllama_hf.tokenization_tinyllama import _translate_errors


KINDS = ("sentencepiece", "tokenizer.json", "byte-level")


@pytest.fixture(scope="module")
def sources(documents, tokenizer_folder, tmp_path_factory):
    """Returns an undamaged folder of every kind."""
    root = tmp_path_factory.mktemp("tokenizers")
    files = {
        "chat_template.jinja": "{{ messages }}",
        "special_tokens_map.json": json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>"}),
        "added_tokens.json": json.dumps({"<|im_start|>": 512, "<|im_end|>": 513}),
        "tokenizer_config.json": json.dumps({"tokenizer_class": "LlamaTokenizer", "model_max_length": 77}),
    }
    (root / "sentencepiece").mkdir()
    shutil.copy(tokenizer_folder / "tokenizer.model", root / "sentencepiece")
    for name, text in files.items():  # as from transformers 4
        (root / "sentencepiece" / name).write_text(text)
    load_tokenizer(root / "sentencepiece").save_pretrained(root / "tokenizer.json")
    (root / "tokenizer.json" / "tokenizer.model").unlink()
    tokenizer = byte_level("smollm", documents, 300)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(root / "byte-level")
    for name in ("special_tokens_map.json", "added_tokens.json"):
        (root / "byte-level" / name).write_text(
            json.dumps({"eos_token": "<|end|>"} if "map" in name else {"<|x|>": 300})
        )
    return root


@pytest.fixture
def folder(request, sources, tmp_path):
    """Returns a copy of one of them."""
    return shutil.copytree(sources / request.param, tmp_path / "copy")


def edited(edit):
    """Returns a change of the bytes of a JSON file that applies a change to its fields."""

    def change(data: bytes) -> bytes:
        fields = json.loads(data)
        edit(fields)
        return json.dumps(fields).encode()

    return change


def test_code_in_the_folder_never_runs(sources, tmp_path, monkeypatch):
    """Not even if the standard input answers yes to the question of transformers."""
    folder, canary = shutil.copytree(sources / "byte-level", tmp_path / "evil"), tmp_path / "canary"
    settings = {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "evil.py").write_text(
        f"from transformers import PreTrainedTokenizerFast\nopen({str(canary)!r}, 'w').close()\n"
        "class Evil(PreTrainedTokenizerFast):\n    pass\n"
    )
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 5))
    with pytest.raises(InputError, match=rf"^{folder}: .*auto_map in tokenizer_config\.json"):
        load_tokenizer(folder)
    assert not canary.exists()
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert canary.exists(), "the control"


def set_subword_prefix(fields: dict) -> None:
    fields["model"]["continuing_subword_prefix"] = "x" * 40


PIECE = "▁t".encode()


@pytest.mark.parametrize(
    "folder, file, change, reason",
    [
        (
            "sentencepiece",
            "tokenizer.model",
            lambda data: data.replace(PIECE, b"\xe2\xe2\xe2t", 1),
            "UnicodeDecodeError",
        ),
        ("sentencepiece", "added_tokens.json", lambda _: b"[1]", "AttributeError"),
        ("sentencepiece", "tokenizer_config.json", lambda _: b'{"added_tokens_decoder": {"512": {}}}', "KeyError"),
        ("sentencepiece", "tokenizer_config.json", lambda _: b"[]", "AttributeError"),
        ("sentencepiece", "tokenizer_config.json", lambda _: b'{"bos_token": 5}', "TypeError"),
        ("sentencepiece", "tokenizer_config.json", lambda _: b'{"bos_token": "\\ud800"}', "UnicodeEncodeError"),
        ("sentencepiece", "tokenizer_config.json", lambda _: b'{"model_max_length": "x"}', "TypeError"),
        ("tokenizer.json", "tokenizer.json", edited(lambda fields: fields.pop("normalizer")), "KeyError"),
        ("tokenizer.json", "tokenizer.json", edited(lambda fields: fields["model"].update(merges=5)), "TypeError"),
        ("tokenizer.json", "tokenizer_config.json", lambda _: b'{"tokenizer_class": 5}', "AttributeError"),
        ("byte-level", "tokenizer.json", edited(lambda fields: fields.update(version="")), "Exception"),
        ("byte-level", "tokenizer.json", edited(set_subword_prefix), "PanicException"),
        ("byte-level", "tokenizer_config.json", lambda data: data[:-5], "JSONDecodeError"),
        ("byte-level", "special_tokens_map.json", lambda _: b"[1]", "AttributeError"),
        ("byte-level", "added_tokens.json", lambda _: b"[1]", "AttributeError"),
        ("byte-level", "chat_template.jinja", lambda _: b"\xff", "UnicodeDecodeError"),
    ],
    indirect=["folder"],
)
def test_damage_is_named(folder, file, change, reason):
    load_tokenizer(folder)
    data = (folder / file).read_bytes()
    assert change(data) != data
    (folder / file).write_bytes(change(data))
    with pytest.raises(InputError, match=rf"\({reason}: .+\)") as refusal:
        load_tokenizer(folder)
    assert str(refusal.value).startswith(f"tokenizer {folder}") and refusal.value.__cause__ is not None


@pytest.mark.parametrize("folder", ["sentencepiece", "tokenizer.json"], indirect=True)
def test_a_damaged_template_is_named(folder):
    (folder / "chat_template.jinja").write_bytes(b"{{ \xff }}")
    with pytest.raises(InputError, match=r"chat_template\.jinja: not UTF-8 \(.+ at byte 3\)"):
        load_tokenizer(folder)


def test_seeded_mutants(sources, tmp_path):
    """Each gives an error that names the folder, or a tokenizer that can be called."""
    ends: dict[str, collections.Counter] = {kind: collections.Counter() for kind in KINDS}
    for kind in KINDS:
        files = sorted(path.name for path in (sources / kind).iterdir())
        for i in range(60):
            choose = random.Random(f"{kind} {i}")
            folder = shutil.copytree(sources / kind, tmp_path / f"{kind} {i}")
            file = folder / choose.choice(files)
            data = file.read_bytes()
            if file.suffix == ".json" and choose.random() < 0.6:
                file.write_bytes(_odd_fields(file, choose))
            else:
                way = choose.choice((_changed, _moved, None))
                file.write_bytes(way(data, 0, len(data), choose) if way else data[: choose.randrange(len(data))])
            try:
                tokenizer = load_tokenizer(folder)
            except InputError as error:
                assert str(folder) in str(error)
                ends[kind]["refused"] += 1
            else:
                assert isinstance(tokenizer, PreTrainedTokenizerBase)
                assert tokenizer("Hello  world\n").input_ids
                ends[kind]["loaded"] += 1
    assert all(count["refused"] >= 10 and count["loaded"] >= 5 for count in ends.values()), ends


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError, InputError])
def test_what_is_no_damage_passes(error, tmp_path):
    with pytest.raises(error, match=r"^as it was$"), _translate_errors(tmp_path):
        raise error("as it was")


def test_a_package_that_is_missing_is_no_damage(tmp_path):
    with pytest.raises(InputError, match=r"ModuleNotFoundError: No module named 'nowhere'\). Install it"):
        with _translate_errors(tmp_path):
            import nowhere  # noqa: F401


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' * 100_000, "9" * 5000, "\xff", "{"])
def test_json_that_python_cannot_read(text, tmp_path):
    (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"a\.json: .*not valid JSON \(.+\)"):
        read_json(tmp_path / "a.json")
