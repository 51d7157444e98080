"""Only the files of a repository that transformers would read are downloaded."""

import json


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
CODE = """
import json, sys
from pathlib import Path
from huggingface_hub import CommitOperationAdd, HfApi
from tinyllama_hf.errors import InputError
from tinyllama_hf.inference.adapters import adapter_folder
from tinyllama_hf.released import local_folder
api, repositories, contents = HfApi(), json.loads(sys.argv[1]), json.loads(sys.argv[2])
found = {}
for name, files in repositories.items():
    api.create_repo(f"demo/{name}")
    operations = [CommitOperationAdd(file, json.dumps(contents.get(file, file)).encode()) for file in files]
    api.create_commit(f"demo/{name}", operations, commit_message="all")
    folder = (adapter_folder if "adapter" in name else local_folder)(f"demo/{name}")
    found[name] = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
file = local_folder("demo/gguf/model-q8_0.gguf")
found["named"] = [file.read_text(), *sorted(path.name for path in file.parent.iterdir() if "gguf" in path.name)]
api.create_repo("demo/damaged")
damaged = [CommitOperationAdd("model.safetensors.index.json", b"{}")]
api.create_commit("demo/damaged", damaged, commit_message="all")
for name in ("demo/gguf/model-q5_0.gguf", "demo/gguf@nowhere", "demo/damaged"):
    try:
        local_folder(name)
    except InputError as error:
        found[name] = str(error)
print(json.dumps(found))
"""


def test_exactly_what_is_needed(python):
    indexes = {"model.safetensors.index.json": SHARDS, "pytorch_model.bin.index.json": BIN_SHARDS}
    contents = {name: {"weight_map": shards} for name, shards in indexes.items()} | {"adapter_config.json": {}}
    repositories = {name: (*SMALL, *OTHER, *weights) for name, (weights, _) in REPOSITORIES.items()}
    repositories |= {
        name: (*SMALL, *OTHER, "adapter_config.json", *weights) for name, (weights, _) in ADAPTERS.items()
    }
    found = json.loads(python(CODE, json.dumps(repositories), json.dumps(contents)))
    for name, (_, wanted) in REPOSITORIES.items():
        assert set(found[name]) == {*SMALL, *wanted}, name
    tokenizer = set(SMALL) - {"config.json", "generation_config.json", "training.yaml"}
    for name, (_, wanted) in ADAPTERS.items():
        assert set(found[name]) == {"adapter_config.json", *tokenizer, *wanted}, name
    assert found["named"] == ['"model-q8_0.gguf"', "model-q8_0.gguf"]
    assert "has no file model-q5_0.gguf" in found["demo/gguf/model-q5_0.gguf"]
    assert "cannot be fetched from the Hub (RevisionNotFoundError" in found["demo/gguf@nowhere"]
    assert "model.safetensors.index.json: damaged" in found["demo/damaged"]
