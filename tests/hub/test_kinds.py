"""Converted and quantized folders and adapters on a local Hub: the code on their cards loads them correctly."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from tests.hub.conftest import files_on_hub
from tinyllama_hf import load
from tinyllama_hf.conversion.convert import convert
from tinyllama_hf.errors import InputError
from tinyllama_hf.hub.model_folder import open_folder
from tinyllama_hf.hub.publish import plan_revisions, publish
from tinyllama_hf.inference.merge import merge_adapter


def code_of(card: str) -> str:
    return card.split("```python\n")[1].split("```")[0]


def test_the_code_on_the_card_loads_what_was_saved(folders, online, capsys):
    """Loaded from the Hub with stock libraries, the models give the same logits."""
    inputs = torch.arange(3, 40)[None]
    for kind in ("base", "nf4", "adapter"):
        publish(folders / kind, f"demo/{kind}", base_model=None if kind == "base" else "demo/base")
        names: dict = {}
        exec(code_of(files_on_hub(online, f"demo/{kind}")["main"]["README.md"].decode()), names)
        assert "Return a list of" in capsys.readouterr().out, kind
        if kind == "adapter":
            expected, _ = load(folders / "base", adapter=folders / "adapter")
        else:
            expected, _ = load(folders / kind)
        with torch.no_grad():
            loaded = names["model"](inputs).logits
            torch.testing.assert_close(loaded, expected(inputs).logits, atol=1e-4, rtol=1e-4)


def test_the_command_on_the_card_makes_plain_weights_again(folders, online, tmp_path):
    """The command gives the same weights from the Hub as from the local folder."""
    for kind, file in (("awq", "model.safetensors"), ("w4a16", "model.safetensors"), ("gguf-q8_0", "model-q8_0.gguf")):
        publish(folders / kind, f"demo/{kind}")
        source = f"demo/{kind}/{file}" if "gguf" in kind else f"demo/{kind}"
        card = files_on_hub(online, f"demo/{kind}")["main"]["README.md"].decode()
        assert f"tinyllama-hf convert {source} --to llama --output plain" in card
        assert file in files_on_hub(online, f"demo/{kind}")["main"]
        for place, name in ((source, f"{kind}-hub"), (folders / kind, f"{kind}-here")):
            convert(place, "llama", tmp_path / name)
        there, here = (load_file(tmp_path / f"{kind}-{name}" / "model.safetensors") for name in ("hub", "here"))
        assert there.keys() == here.keys() and all(there[name].equal(here[name]) for name in here)


def test_the_base_of_a_merged_model(folders, tmp_path):
    """It is named on the card if it was given by its Hub id."""
    merge_adapter(folders / "base", folders / "adapter", tmp_path / "merged")
    file = tmp_path / "merged" / "provenance.json"
    assert open_folder(tmp_path / "merged").base is None
    record = json.loads(file.read_text())
    record["merge"]["base"]["path"] = "demo/base"
    file.write_text(json.dumps(record))
    model = open_folder(tmp_path / "merged")
    assert (model.kind, model.base) == ("llama", "demo/base")


FACTS = {
    "base": ["A Llama of 229,760 parameters.", "Plain Llama weights"],
    "llama": [
        "A Llama of 229,760 parameters.",
        "converted | from base (Hugging Face, model.safetensors) to llama",
        "SHA-256",
    ],
    "awq": ["quantized by AWQ: 4 bit in groups of 128", "vllm serve me/x", "to awq"],
    "w4a16": ["quantized to W4A16 (compressed-tensors)", ": 4 bit in groups of 128", "vllm serve me/x", "to w4a16"],
    "gguf-q8_0": [
        "as the GGUF file `model-q8_0.gguf`",
        "llama-cli --hf-repo me/x --hf-file model-q8_0.gguf",
        "to gguf-q8_0",
    ],
    "nf4": ["quantized to nf4 by bitsandbytes", "`bitsandbytes`"],
    "int8": ["quantized to int8 by bitsandbytes"],
}
TAGS = {
    "base": set(),
    "llama": set(),
    "awq": {"awq"},
    "w4a16": {"compressed-tensors"},
    "gguf-q8_0": {"gguf"},
    "nf4": {"bitsandbytes"},
    "int8": {"bitsandbytes"},
}


@pytest.mark.parametrize("kind", FACTS)
@pytest.mark.parametrize("base", [None, "me/base@step-3"])
def test_what_the_card_says(folders, kind, base):
    [revision] = plan_revisions(folders / kind, "me/x", license="mit", base_model=base)
    card = ModelCard(revision.files["README.md"].decode())
    for fact in FACTS[kind] if base is None else ["from [me/base@step-3](https://huggingface.co/me/base)"]:
        assert fact in card.text, fact
    fields = card.data.to_dict()
    assert set(fields["tags"]) - {"llama", "tinyllama_hf"} == TAGS[kind]
    assert (fields["license"], fields.get("base_model")) == ("mit", base and "me/base")
    assert fields.get("library_name") == (None if "gguf" in kind else "transformers")
    assert fields.get("base_model_relation") == ("quantized" if base and TAGS[kind] else None)
    assert "training.yaml" not in revision.files and str(folders) not in card.text


def test_what_the_card_of_an_adapter_says(folders):
    [revision] = plan_revisions(folders / "adapter", "me/x", base_model="me/base@step-3")
    card = ModelCard(revision.files["README.md"].decode())
    fields = card.data.to_dict()
    assert (fields["library_name"], fields["base_model"], fields["base_model_relation"]) == (
        "peft",
        "me/base",
        "adapter",
    )
    parameters = sum(
        tensor.numel() for tensor in load_file(folders / "adapter" / "adapter_model.safetensors").values()
    )
    for fact in (
        f"An adapter (LORA) of {parameters:,} parameters",
        'from_pretrained("me/base", revision="step-3")',
        'PeftModel.from_pretrained(model, "me/x")',
        "| 2 | 8 |",
        "down_proj, gate_proj",
    ):
        assert fact in card.text, fact
    config = json.loads(revision.files["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/base", "step-3")
    assert set(revision.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("folder", ["adapter"], indirect=True)
class TestTheBaseOfAnAdapter:
    """Others cannot use an adapter without its base model."""

    @pytest.mark.parametrize(
        ("given", "base", "revision"),
        [
            ("me/base", "me/base", None),
            ("/home/u/.cache/huggingface/hub/models--me--base/snapshots/0123abc", "me/base", None),
            ("chat-v1.0", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", None),
        ],
    )
    def test_ids_are_found(self, folder, given, base, revision):
        self.change(folder, base_model_name_or_path=given)
        [planned] = plan_revisions(folder, "me/x")
        content = planned.files["adapter_config.json"]
        config = json.loads(content if isinstance(content, bytes) else content.read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == (base, revision)

    @pytest.mark.parametrize("given", [None, "/home/u/base", "../base", "base", 3])
    def test_a_folder_is_refused(self, folder, given):
        self.change(folder, base_model_name_or_path=given)
        with pytest.raises(InputError, match="--base-model USER/NAME"):
            plan_revisions(folder, "me/x")

    def test_the_revision_that_it_was_trained_on_stays(self, folder):
        self.change(folder, base_model_name_or_path="me/base", revision="step-3")
        [planned] = plan_revisions(folder, "me/x")
        assert b'from_pretrained("me/base", revision="step-3")' in planned.files["README.md"]

    def test_its_own_tokens_are_room_in_the_embedding(self, folder):
        file = folder / "adapter_model.safetensors"
        name = "base_model.model.model.embed_tokens.weight"
        save_file(load_file(file) | {name: torch.zeros(515, 128)}, file, metadata={"format": "pt"})
        self.change(folder, base_model_name_or_path="me/base")
        [planned] = plan_revisions(folder, "me/x")
        assert b"model.resize_token_embeddings(515)\n" in planned.files["README.md"]

    def change(self, folder: Path, **fields) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | fields))


BROKEN = [
    ("llama", "tokenizer.json", None, "tokenizer.json is missing"),
    ("nf4", "tokenizer_config.json", None, r"tokenizer_config\.json is missing"),
    ("nf4", "model.safetensors", b"", r"model\.safetensors: damaged"),
    ("awq", "model.safetensors", None, r"model\.safetensors is missing"),
    ("w4a16", "model.safetensors", None, r"model\.safetensors is missing"),
    ("w4a16", "model.safetensors", b"", r"model\.safetensors: damaged"),
    ("gguf-q8_0", "model-q8_0.gguf", b"GGUF", r"model-q8_0\.gguf"),
    ("adapter", "adapter_model.safetensors", None, r"adapter_model\.safetensors is missing"),
    ("adapter", "adapter_model.safetensors", b"", r"adapter_model\.safetensors: damaged"),
    ("adapter", "adapter_config.json", b"{}", "peft_type"),
    ("adapter", "adapter_config.json", b"[]", r"adapter_config\.json: damaged"),
]


@pytest.mark.parametrize(("folder", "name", "content", "message"), BROKEN, indirect=["folder"])
def test_folders_that_are_not_whole(folder, name, content, message):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        plan_revisions(folder, "me/x", base_model="me/base")


@pytest.mark.parametrize("folder", ["nf4", "int8"], indirect=True)
@pytest.mark.parametrize("lost", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
def test_a_quantized_folder_without_a_tensor(folder, lost):
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"{lost} is missing"):
        plan_revisions(folder, "me/x")


def test_publishing_again(folders, online):
    """A second call recognizes its own repository, also if the folder has no provenance."""
    for kind in ("nf4", "adapter", "gguf-q8_0"):
        first, again = (publish(folders / kind, f"demo/{kind}", base_model="demo/base") for _ in range(2))
        assert first[0].changed and not again[0].changed
    publish(folders / "int8", "demo/gguf-q8_0")
    assert not [path for path in files_on_hub(online, "demo/gguf-q8_0")["main"] if path.endswith(".gguf")]
