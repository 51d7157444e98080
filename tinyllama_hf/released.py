"""The released checkpoints by name, and downloading them."""

import difflib
import functools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import yaml

from .errors import InputError, one_line
from .files import read_json


_INTERMEDIATE = re.compile(r"step-(\d+)k-token-(\d+)B")
# What is downloaded if only the tokenizer is needed.
TOKENIZER_FILES = ("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
# All files of a model except its weights, including the configurations of lit-gpt, litgpt and Meta.
_SMALL_FILES = ("config.json", "generation_config.json", "provenance.json", "training.yaml",
                "model_config.yaml", "lit_config.json", "params.json", *TOKENIZER_FILES)  # fmt: skip
_FILES = (".gguf", ".safetensors", ".bin", ".pth", ".pt")  # downloaded if named
# Weights in one file and the index of sharded ones, in the order transformers looks for them. Only `convert` reads
# .pth files.
_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ("*.pth", None),
)


class Released(NamedTuple):
    """A released checkpoint.

    `scores` are the seven published scores in percent, by task, or empty if none were published. `average` is their
    unweighted mean, which differs from the published one in one row (see `note`).
    """

    name: str
    kind: str  # "base", "chat" or "peer"
    hub: str
    revision: str
    step: int | None
    tokens: float
    scores: dict[str, float]
    note: str | None

    @property
    def average(self) -> float | None:
        """Unweighted mean of the published scores, or `None` if there are none."""
        return math.fsum(self.scores.values()) / len(self.scores) if self.scores else None


@functools.cache
def tables() -> dict[str, Any]:
    """Returns the contents of `released.yaml`."""
    return yaml.safe_load(Path(__file__).with_name("released.yaml").read_text(encoding="utf-8"))


@functools.cache
def released() -> tuple[Released, ...]:
    """Returns all released checkpoints: base models in the order of their tokens, then the chat models."""
    table = tables()
    found: dict[str, Released] = {}
    for section in ("base", "chat"):
        for row in table[section]["rows"]:
            kind = "peer" if row.get("peer") else section
            step = row.get("step")
            tokens = row.get("tokens") or (step * table["tokens_per_step"] if step else found[row["base"]].tokens)
            scores = dict(zip(table[section]["columns"], row.get("scores", ()), strict=False))
            found[row["name"]] = Released(row["name"], kind, row["hub"], "main", step, tokens, scores, row.get("note"))
    return tuple(found.values())


def find_repository(name: str) -> tuple[str, str] | None:
    """Returns Hub id and revision of a released or intermediate checkpoint, `None` for any other name.

    Raises:
        InputError: if the model is not a Llama, or no intermediate checkpoint has this name.
    """
    model = next((model for model in released() if model.name == name), None)
    if model is None:
        return intermediate_checkpoint(name)
    if model.kind == "peer":
        raise InputError(f"model {name!r}: not a Llama, and listed only for comparison with the published scores")
    return model.hub, model.revision


def intermediate_checkpoint(name: str) -> tuple[str, str] | None:
    """Returns Hub id and revision of an intermediate checkpoint, such as `step-715k-token-1499B`.

    There is one every 5000 steps. The first run was faulty after step 480k, so later names refer to the repaired run.
    A withdrawn checkpoint needs its full id (`TinyLlama/tinyLlama-intermediate-checkpoints@step-500k-token-1049B`).

    Returns:
        `None` if the name does not have this form.

    Raises:
        InputError: if there is no checkpoint of this name.
    """
    match = _INTERMEDIATE.fullmatch(name)
    if match is None:
        return None
    step, billions = 1000 * int(match[1]), int(match[2])
    tokens = step * tables()["tokens_per_step"]
    last = max(model.step for model in released() if model.step)
    if step % 5000 or not 0 < step <= last:
        raise InputError(
            f"model {name!r}: checkpoints exist every 5k steps, up to {last // 1000}k. See `tinyllama-hf list`"
        )
    # The repositories do not always round the same way.
    if abs(billions - tokens / 1e9) >= 1:
        near = f"step-{match[1]}k-token-{tokens / 1e9:.0f}B"
        raise InputError(f"model {name!r}: step {match[1]}k has {tokens / 1e9:,.1f}B tokens. Did you mean {near!r}?")
    first, repaired = (row["hub"] for row in tables()["intermediate_collections"][:2])
    return (first if step <= 480_000 else repaired), name


class HubPlace(NamedTuple):
    """A repository of the Hub at a revision, and a file in it if one is named."""

    repository: str
    revision: str | None
    file: str | None = None


def find_model(name: str) -> Path | HubPlace:
    """Returns the local path of a model, or its place on the Hub. Downloads nothing.

    Args:
        name (`str`): as for [`local_folder`].

    Raises:
        InputError: if it is neither an existing path nor a name that the Hub could have.
    """
    path = Path(name)
    if path.exists():
        return path
    if found := find_repository(name):
        return HubPlace(*found)
    is_path = name.startswith((".", "/", "~"))
    if (
        (name.count("/") == 1 or (name.count("/") > 1 and path.suffix in _FILES))
        and not is_path
        and not Path(path.parts[0]).exists()
    ):
        user, repository, *inside = name.split("/", 2)
        repository, _, revision = f"{user}/{repository}".partition("@")
        return HubPlace(repository, revision or None, *inside)
    if is_path:
        raise InputError(f"model {name!r}: no such folder")
    near = difflib.get_close_matches(name, [model.name for model in released() if model.kind != "peer"], n=1)
    hint = f"did you mean {near[0]!r}?" if near else "`tinyllama-hf list` shows the released models"
    raise InputError(f"model {name!r}: no such folder, and no released model; {hint}")


def check_model(name: str) -> None:
    """Checks the name of a model, and its folder if it is local. Downloads nothing, and imports neither torch nor
    transformers.

    Raises:
        InputError: as [`find_model`] and [`read_llama_fields`].
    """
    place = find_model(name)
    if isinstance(place, Path):
        read_llama_fields(place)


def read_llama_fields(folder: Path) -> dict[str, Any]:
    """Returns the contents of the `config.json` of a model folder.

    Raises:
        InputError: if it is missing, or the model is not a Llama.
    """
    config = folder / "config.json"
    if folder.is_file():
        if folder.with_name("config.json").is_file() and folder.suffix in (".safetensors", ".bin"):
            raise InputError(f"model {folder}: a file, not a model folder. Give the folder {folder.parent}")
        raise InputError(f"model {folder}: a file, not a model folder. {_convert_first(folder)}")
    if not config.is_file():
        milestones = sorted(path.parent for path in folder.glob("milestones/*/config.json"))
        hint = f"; did you mean {milestones[-1]}?" if milestones else ""
        if any(path.suffix in (".gguf", ".pth") for path in folder.glob("*")):
            hint = f". {_convert_first(folder)}"
        if (folder / "adapter_config.json").is_file():
            hint = f". It is an adapter: give its base model with --adapter {folder}, or merge the two first"
        raise InputError(f"model {folder}: holds no config.json, so it is not a model folder{hint}")
    fields = read_json(config)
    model_type = fields.get("model_type") if isinstance(fields, dict) else None
    if model_type not in ("llama", "tinyllama"):
        raise InputError(f"{config}: model_type {model_type!r} is not a Llama; tinyllama_hf loads Llama folders only")
    return fields


def _convert_first(path: Path) -> str:
    return f"Convert it first: tinyllama-hf convert {quote(str(path))} --to llama --output FOLDER"


def local_folder(name: str, only: Sequence[str] | None = None) -> Path:
    """Returns the folder of a model: a local folder unchanged, or the download of a released name or Hub id.

    Only the files that transformers would read are downloaded: configuration, tokenizer and one kind of weights. Any
    other file of the repository, such as a GGUF file, is downloaded if it is named.

    Args:
        name (`str`): a folder, a name from [`released`], an intermediate checkpoint (`step-715k-token-1499B`),
            `user/repository`, optionally with `@revision`, or `user/repository/FILE`, which returns the path of that
            file.
        only (`Sequence[str]`, *optional*): download only files that match these patterns.

    Raises:
        InputError: if there is no such model, or the Hub cannot be reached.
    """
    place = find_model(name)
    if isinstance(place, Path):
        return place
    repository, revision, file = place
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = _download(repository, revision, [file] if file else only)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"model {name!r}: {repository} cannot be fetched from the Hub ({one_line(error)}). Check the name and "
            "the connection, or use a local folder"
        ) from error
    if file and not (folder / file).exists():
        raise InputError(f"model {name!r}: {repository} has no file {file}")
    return folder / file if file else folder


def _download(repository: str, revision: str | None, only: Sequence[str] | None) -> Path:
    """Downloads the files of a repository that match; by default small files and the first kind of weights it has."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(repository, revision=revision, allow_patterns=list(only or _SMALL_FILES)))
    # By the id of the commit, so that files of two commits are never mixed.
    fetch = functools.partial(snapshot_download, repository, revision=folder.name)
    for whole, index in () if only else _WEIGHTS:
        fetch(allow_patterns=[whole])
        if any(folder.glob(whole)):
            break
        if index:
            fetch(allow_patterns=[index])
        if index and (folder / index).is_file():
            fetch(allow_patterns=_shards(folder / index))
            break
    return folder


def _shards(index: Path) -> list[str]:
    """Returns the files that an index names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: damaged, it has no weight_map. Download the repository again")
    return sorted(set(weight_map.values()))
