"""The released ladder by name, and how a name becomes a folder."""

import functools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .errors import InputError, did_you_mean, one_line
from .files import read_json


_INTERMEDIATE = re.compile(r"step-(\d+)k-token-(\d+)B")
# What is fetched from the Hub where only the tokenizer is wanted.
TOKENIZER_FILES = ("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
# Everything of a model but its weights; the configurations of lit-gpt, litgpt and Meta are included.
_SMALL_FILES = ("config.json", "generation_config.json", "provenance.json", "training.yaml",
                "model_config.yaml", "lit_config.json", "params.json", *TOKENIZER_FILES)  # fmt: skip
_FILES = (".gguf", ".safetensors", ".bin", ".pth", ".pt")  # that are fetched when they are named
# Whole weights and index, in the order in which transformers looks for them; last what only `convert` reads.
_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ("*.pth", None),
)


class Released(NamedTuple):
    """A released checkpoint.

    `scores` holds the published seven, in percent, by task; it is empty where none were published. `average` is their
    unweighted mean, which for one row is not the printed one (see `note`).
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
        """Unweighted mean of the published scores, `None` where there are none."""
        return math.fsum(self.scores.values()) / len(self.scores) if self.scores else None


@functools.cache
def tables() -> dict[str, Any]:
    """The contents of `released.yaml`."""
    return yaml.safe_load(Path(__file__).with_name("released.yaml").read_text(encoding="utf-8"))


@functools.cache
def released() -> tuple[Released, ...]:
    """All released checkpoints: the ladder in the order of its tokens, then the chat models."""
    facts = tables()
    found: dict[str, Released] = {}
    for section in ("base", "chat"):
        for row in facts[section]["rows"]:
            kind = "peer" if row.get("peer") else section
            step = row.get("step")
            tokens = row.get("tokens") or (step * facts["tokens_per_step"] if step else found[row["base"]].tokens)
            scores = dict(zip(facts[section]["columns"], row.get("scores", ()), strict=False))
            found[row["name"]] = Released(row["name"], kind, row["hub"], "main", step, tokens, scores, row.get("note"))
    return tuple(found.values())


def intermediate_checkpoint(name: str) -> tuple[str, str] | None:
    """Hub id and revision of a checkpoint between the rungs of the ladder, as in `step-715k-token-1499B`.

    There is one every 5000 steps. After 480k, where the first run went wrong, the names mean the repaired run; the withdrawn
    checkpoints are reached by their full id (`TinyLlama/tinyLlama-intermediate-checkpoints@step-500k-token-1049B`) only.

    Returns:
        `None` if the name is not of this form.

    Raises:
        InputError: if there is no such checkpoint.
    """
    match = _INTERMEDIATE.fullmatch(name)
    if match is None:
        return None
    step, billions = 1000 * int(match[1]), int(match[2])
    tokens = step * tables()["tokens_per_step"]
    last = max(model.step for model in released() if model.step)
    if step % 5000 or not 0 < step <= last:
        raise InputError(
            f"model {name!r}: there is a checkpoint every 5k steps, up to {last // 1000}k; see `tinyllama-hf list`"
        )
    # The repositories do not always round in the same way.
    if abs(billions - tokens / 1e9) >= 1:
        raise InputError(f"model {name!r}: step {match[1]}k has {tokens / 1e9:,.1f}B tokens; did you mean "
                         f"'step-{match[1]}k-token-{tokens / 1e9:.0f}B'?")  # fmt: skip
    first, repaired = (row["hub"] for row in tables()["intermediate_collections"][:2])
    return (first if step <= 480_000 else repaired), name


def local_folder(name: str, only: Sequence[str] | None = None) -> Path:
    """Returns the folder of a model: a local one unchanged, a released name or a Hub id downloaded.

    Of a repository only what transformers would read is downloaded: configuration, tokenizer, and one kind of weights. Another
    file of it, such as a GGUF, is downloaded when it is named.

    Args:
        name (`str`): a folder, a name from [`released`] or of an intermediate checkpoint (`step-715k-token-1499B`),
            `user/repository`, with `@revision` if not main, or `user/repository/FILE`, which gives the path of that file.
        only (`Sequence[str]`, *optional*): download only the files that match these patterns.

    Raises:
        InputError: if there is no such thing, or the Hub cannot be reached.
    """
    path = Path(name)
    if path.exists():
        return path
    inside: list[str] = []
    known = {model.name: model for model in released()}
    loadable = [model.name for model in released() if model.kind != "peer"]
    if name in known and known[name].kind == "peer":
        raise InputError(f"model {name!r}: is no Llama; it is listed as the peer of the published table only")
    if name in known:
        repository, revision = known[name].hub, known[name].revision
    elif intermediate := intermediate_checkpoint(name):
        repository, revision = intermediate
    elif (
        (name.count("/") == 1 or (name.count("/") > 1 and path.suffix in _FILES))
        and not name.startswith((".", "/", "~"))
        and not Path(path.parts[0]).exists()
    ):
        user, repository, *inside = name.split("/", 2)
        repository, _, revision = f"{user}/{repository}".partition("@")
        only = inside or only
    else:
        raise InputError(
            f"model {name!r}: no such folder, and no released model{did_you_mean(name, loadable)} (see `tinyllama-hf list`)"
        )
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = _download(repository, revision or None, only)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"model {name!r}: {repository} cannot be fetched from the Hub ({one_line(error)}); check the "
            "name and the connection, or give a local folder"
        ) from error
    if inside and not (folder / inside[0]).exists():
        raise InputError(f"model {name!r}: {repository} has no file {inside[0]}")
    return folder.joinpath(*inside)


def _download(repository: str, revision: str | None, only: Sequence[str] | None) -> Path:
    """The snapshot of a repository with the files that match, or with those of a model: the first kind of weights that it has."""
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(repository, revision=revision, allow_patterns=only or _SMALL_FILES))
    for whole, index in () if only else _WEIGHTS:
        # By the commit's id, so that files of two commits are never mixed.
        snapshot_download(repository, revision=folder.name, allow_patterns=[whole])
        if any(folder.glob(whole)):
            break
        if index:
            snapshot_download(repository, revision=folder.name, allow_patterns=[index])
        if index and (folder / index).is_file():
            shards = _shards(folder / index)
            snapshot_download(repository, revision=folder.name, allow_patterns=shards)
            break
    return folder


def _shards(index: Path) -> list[str]:
    """The files that an index names."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: damaged, it has no weight_map; fetch the repository again")
    return sorted(set(weight_map.values()))
