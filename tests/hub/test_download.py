"""Only the files of a repository that transformers would read are downloaded."""

import json

import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from tests.local_hub.accounts import WRITE_TOKEN
from tinyllama_hf.errors import InputError
from tinyllama_hf.inference.adapters import adapter_folder
from tinyllama_hf.released import local_folder


SMALL = (
    "config.json",
    "generation_config.json",
    "training.yaml",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
OTHER = (
    "optimizer.pt",
    "training_args.bin",
    "model-q4_0.gguf",
    "onnx/model.onnx",
    "tf_model.h5",
    "README.md",
    "step-5/config.json",
)
SHARDS = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
BIN_SHARDS = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
# The weights of each repository, and the files that are downloaded in addition to the small ones.
REPOSITORIES = {
    "whole": (
        ("model.safetensors", "pytorch_model.bin", "model.fp16.safetensors", "lit_model.pth"),
        ("model.safetensors",),
    ),
    "shards": (
        ("model.safetensors.index.json", *SHARDS.values(), "model-00003-of-00003.safetensors", "pytorch_model.bin"),
        ("model.safetensors.index.json", *SHARDS.values()),
    ),
    "both": (("model.safetensors", "model.safetensors.index.json", *SHARDS.values()), ("model.safetensors",)),
    "bin": (("pytorch_model.bin", "lit_model.pth"), ("pytorch_model.bin",)),
    "bin-shards": (
        ("pytorch_model.bin.index.json", *BIN_SHARDS.values()),
        ("pytorch_model.bin.index.json", *BIN_SHARDS.values()),
    ),
    "meta": (("consolidated.00.pth", "params.json"), ("consolidated.00.pth", "params.json")),
    "gguf": (("model-q8_0.gguf",), ()),
}
ADAPTERS = {
    "adapter": (("adapter_model.safetensors", "adapter_model.bin"), ("adapter_model.safetensors",)),
    "old-adapter": (("adapter_model.bin",), ("adapter_model.bin",)),
}


def downloaded(api: HfApi, name: str, files: tuple[str, ...], contents: dict[str, object]) -> set[str]:
    """Publishes files and downloads the model; returns what came."""
    api.create_repo(f"demo/{name}")
    operations = [CommitOperationAdd(file, json.dumps(contents.get(file, file)).encode()) for file in files]
    api.create_commit(f"demo/{name}", operations, commit_message="all")
    folder = (adapter_folder if "adapter" in name else local_folder)(f"demo/{name}")
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_exactly_what_is_needed(online):
    indexes = {"model.safetensors.index.json": SHARDS, "pytorch_model.bin.index.json": BIN_SHARDS}
    contents = {name: {"weight_map": shards} for name, shards in indexes.items()} | {"adapter_config.json": {}}
    api = HfApi(online.endpoint, token=WRITE_TOKEN)
    for name, (weights, wanted) in REPOSITORIES.items():
        assert downloaded(api, name, (*SMALL, *OTHER, *weights), contents) == {*SMALL, *wanted}, name
    tokenizer = set(SMALL) - {"config.json", "generation_config.json", "training.yaml"}
    for name, (weights, wanted) in ADAPTERS.items():
        files = (*SMALL, *OTHER, "adapter_config.json", *weights)
        assert downloaded(api, name, files, contents) == {"adapter_config.json", *tokenizer, *wanted}, name
    file = local_folder("demo/gguf/model-q8_0.gguf")
    assert file.read_text() == '"model-q8_0.gguf"'
    assert [path.name for path in file.parent.iterdir() if "gguf" in path.name] == ["model-q8_0.gguf"]
    for name, message in (
        ("demo/gguf/model-q5_0.gguf", "has no file model-q5_0.gguf"),
        ("demo/gguf@nowhere", r"cannot be fetched from the Hub \(RevisionNotFoundError"),
    ):
        with pytest.raises(InputError, match=message):
            local_folder(name)
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json: damaged"):
        downloaded(api, "damaged", ("model.safetensors.index.json",), {"model.safetensors.index.json": {}})
