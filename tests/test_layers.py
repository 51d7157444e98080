"""Imports point one way, and optional packages are imported in one place each. Read from the sources, not from a run."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT


# From the top down; a module imports from its own layer and those below. Modules that are not named are at the bottom.
LAYERS = (
    {"tinyllama_hf_cli", "recipes", "eval"},
    {"report", "hub"},
    {"pretrain", "finetune", "inference", "evaluation", "conversion"},
    {"data", "chat"},
)
# Generating with a draft is a method of the model; it is imported when it is called, and needs no model class itself.
UPWARD = {
    "tinyllama_hf/modeling_tinyllama.py": {
        "tinyllama_hf.inference.speculative.draft_of_generate",
        "tinyllama_hf.inference.speculative.speculative_generate",
    }
}
# Packages that `import tinyllama_hf` must do without, and the only module or folder that may import them at the top.
OPTIONAL = {
    "datatrove": "tinyllama_hf/data/pipeline.py",
    "matplotlib": "tinyllama_hf/report/plots.py",
    "gguf": None,
    "datasets": "eval/metrics/",
    "trl": None,
    "peft": None,
    "bitsandbytes": "tinyllama_hf/inference/repacking.py",
    "lm_eval": None,
    "evaluate": "eval/metrics/",
    "fastapi": None,
    "uvicorn": None,
    "openai": None,
}
SOURCES = sorted(
    p for part in ("tinyllama_hf", "tinyllama_hf_cli", "recipes", "eval") for p in (ROOT / part).rglob("*.py")
)


def layer(parts: tuple[str, ...]) -> int:
    """Height of a module given by its dotted name, 0 at the bottom."""
    name = parts[1] if parts[0] == "tinyllama_hf" and len(parts) > 1 else parts[0]
    return next((len(LAYERS) - i for i, names in enumerate(LAYERS) if name in names), 0)


def imported(path: Path, top_level_only: bool = False) -> Iterator[tuple[str, ...]]:
    """Dotted names that a source imports, relative ones made absolute; imports for type checkers are left out."""
    package = path.relative_to(ROOT).parts[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unchecked = {
        id(n)
        for b in ast.walk(tree)
        if isinstance(b, ast.If) and "TYPE_CHECKING" in ast.unparse(b.test)
        for n in ast.walk(b)
    }
    for node in tree.body if top_level_only else ast.walk(tree):
        if id(node) in unchecked:
            continue
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            yield from ((*module, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_nothing_imports_from_above(path):
    own = layer(path.relative_to(ROOT).with_suffix("").parts)
    above = {".".join(name) for name in imported(path) if name[0].startswith("tinyllama_hf") and layer(name) > own}
    assert above == UPWARD.get(path.relative_to(ROOT).as_posix(), set())


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_optional_packages_stay_in_their_place(path):
    found = {name[0] for name in imported(path, top_level_only=True)} & OPTIONAL.keys()
    assert all(OPTIONAL[name] and path.relative_to(ROOT).as_posix().startswith(OPTIONAL[name]) for name in found)


@pytest.mark.parametrize("path", sorted((ROOT / "tinyllama_hf_cli").glob("*.py")), ids=lambda p: p.name)
def test_the_command_imports_nothing_heavy_at_its_top(path):
    allowed = {"functools", "pathlib", "sys", "typing", "typer", "tinyllama_hf_cli"}
    assert {name[0] for name in imported(path, top_level_only=True)} <= allowed


def test_this_test_sees_what_it_looks_for():
    assert len(SOURCES) > 40
    assert (
        layer(("tinyllama_hf", "report", "page"))
        > layer(("tinyllama_hf", "pretrain", "loop"))
        > layer(("tinyllama_hf", "data"))
    )
    assert layer(("tinyllama_hf_cli",)) == 4 and layer(("tinyllama_hf", "errors")) == 0
    names = {".".join(name[:3]) for name in imported(ROOT / "tinyllama_hf" / "report" / "page.py")}
    assert "tinyllama_hf.pretrain.metrics" in names and "tinyllama_hf.provenance" in names
