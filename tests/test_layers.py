"""Imports point one way, and each optional package is imported in one place. The sources are read, not run."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT


# From top to bottom: a module imports from its own room and those below, never from another room at its level.
MODEL = {"configuration_tinyllama", "modeling_tinyllama", "tokenization_tinyllama", "losses", "packed_documents"}
FOUNDATION = {"errors", "files", "text", "progress", "provenance", "portable", "recipe", "released", "devices",
              "registration", "presets", ""}  # fmt: skip
ROOMS: tuple[set[str], ...] = (
    {"tinyllama_hf_cli", "recipes", "eval"},
    {"hub"},
    {"report"},
    {"planning"},
    {"finetune"},
    {"evaluation"},
    {"pretrain"},
    {"serving"},
    {"batch"},
    {"inference"},
    {"quantization"},
    {"conversion"},
    {"data"},
    MODEL,
    {"decoding"},
    {"chat"},
    {"gguf"},
    FOUNDATION,
)
# transformers' own layout: a configuration names its tokenizer and its model, which name their configuration.
CIRCLE = {
    f"tinyllama_hf.{name}" for name in ("configuration_tinyllama", "modeling_tinyllama", "tokenization_tinyllama")
}
# Launchers named after what they launch.
LAUNCHERS = {
    *("recipes/sft.py", "recipes/dpo.py", "recipes/slurm/prepare.py", "eval/bits_per_byte.py", "eval/commonsense.py"),
    "eval/metrics/bits_per_byte/bits_per_byte.py",
}
# Packages that `import tinyllama_hf` must do without, and the only module or folder that may import them at the top.
OPTIONAL = {
    "datatrove": "tinyllama_hf/data/pipeline.py",
    "matplotlib": "tinyllama_hf/report/plots.py",
    "gguf": None,
    "datasets": "eval/metrics/",
    "trl": None,
    "peft": None,
    "bitsandbytes": "tinyllama_hf/quantization/repacking.py",
    "lm_eval": (
        "tinyllama_hf/evaluation/harness/local_harness.py",
        "tinyllama_hf/evaluation/harness/server_harness.py",
        "eval/tasks/",
    ),
    "tenacity": "tinyllama_hf/evaluation/harness/server_harness.py",
    "aiohttp": None,
    "evaluate": "eval/metrics/",
    "fastapi": (
        "tinyllama_hf/serving/app.py",
        "tinyllama_hf/serving/client_access.py",
        "tinyllama_hf/serving/run_server.py",
    ),
    "uvicorn": "tinyllama_hf/serving/run_server.py",
    "llguidance": None,
    "prometheus_client": "tinyllama_hf/serving/server_metrics.py",
    "openai": None,
}
SOURCES = sorted(
    p for part in ("tinyllama_hf", "tinyllama_hf_cli", "recipes", "eval") for p in (ROOT / part).rglob("*.py")
)


def floor(parts: tuple[str, ...]) -> int:
    """Height of the room of a module given by its dotted name, 0 at the bottom."""
    name = parts[0] if parts[0] != "tinyllama_hf" else parts[1] if len(parts) > 1 else ""
    return len(ROOMS) - 1 - next(i for i, names in enumerate(ROOMS) if name in names)


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


def module_of(path: Path) -> str:
    """The dotted name of a source."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def import_graph() -> dict[str, set[str]]:
    """Of each module, those of ours that it imports anywhere."""
    modules = {module_of(path): path for path in SOURCES}
    graph = {}
    for name, path in modules.items():
        found = (".".join(parts) for parts in imported(path))
        graph[name] = {m for f in found for m in (f, f.rpartition(".")[0]) if m in modules} - {name, "tinyllama_hf"}
    return graph


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    """What a module imports, and what that imports, and so on."""
    seen, ahead = set(), [start]
    while ahead:
        new = graph[ahead.pop()] - seen
        seen |= new
        ahead += new
    return seen


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_nothing_imports_from_above(path):
    own = path.relative_to(ROOT)
    if own.as_posix() == "tinyllama_hf/__init__.py":  # public names, imported when they are asked for
        own_names = {name[:2] for name in imported(path, top_level_only=True) if name[0].startswith("tinyllama_hf")}
        assert own_names == {("tinyllama_hf", "released"), ("tinyllama_hf", "registration")}
        return
    height = floor(own.with_suffix("").parts)
    above = {".".join(name) for name in imported(path) if name[0].startswith("tinyllama_hf") and floor(name) > height}
    assert above == set()


def test_no_files_import_each_other_in_a_circle():
    graph = import_graph()
    assert {name for name in graph if name in reached(graph, name)} == CIRCLE


def test_a_file_name_stands_for_one_thing():
    places: dict[str, list[str]] = {}
    for path in SOURCES:
        own = path.relative_to(ROOT).as_posix()
        if path.name not in {"__init__.py", "config.py"} and own not in LAUNCHERS:
            places.setdefault(path.name, []).append(own)
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_a_public_name_stands_for_one_thing():
    """Functions and classes of the two packages; the sections of two recipes have equal names."""
    places: dict[str, list[str]] = {}
    for path in SOURCES:
        own = path.relative_to(ROOT)
        if own.parts[0].startswith("tinyllama_hf") and path.name != "config.py":
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                    places.setdefault(node.name, []).append(own.as_posix())
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
    assert len(places) > 300


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_optional_packages_stay_in_their_place(path):
    found = {name[0] for name in imported(path, top_level_only=True)} & OPTIONAL.keys()
    assert all(OPTIONAL[name] and path.relative_to(ROOT).as_posix().startswith(OPTIONAL[name]) for name in found)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_locks_and_renames_are_in_one_place(path):
    """All writers go through `files.py`, so that nothing is half-written and one lock behaves like the others."""
    found = re.findall(
        r"\bfcntl\b|\bos\.(?:replace|rename|link)\b|\.rename\(|\bshutil\.move\b", path.read_text(encoding="utf-8")
    )
    assert not found or path.relative_to(ROOT).as_posix() == "tinyllama_hf/files.py"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_modules_can_be_imported_where_there_is_no_posix(path):
    assert not {name[0] for name in imported(path, top_level_only=True)} & {"fcntl", "resource"}


@pytest.mark.parametrize("path", sorted((ROOT / "tinyllama_hf_cli").glob("*.py")), ids=lambda p: p.name)
def test_the_command_imports_nothing_heavy_at_its_top(path):
    allowed = {"contextlib", "functools", "os", "pathlib", "sys", "typing", "typer", "tinyllama_hf_cli"}
    assert {name[0] for name in imported(path, top_level_only=True)} <= allowed


def test_this_test_sees_what_it_looks_for():
    assert len(SOURCES) > 40
    assert floor(("tinyllama_hf_cli",)) == len(ROOMS) - 1 and floor(("tinyllama_hf", "errors")) == 0
    assert floor(("tinyllama_hf", "report", "page")) > floor(("tinyllama_hf", "pretrain", "loop"))
    graph = import_graph()
    assert "tinyllama_hf.pretrain.step" in graph["tinyllama_hf.pretrain.loop"]
    assert "tinyllama_hf.data.shards" in reached(graph, "recipes.pretrain")
    names = {".".join(name[:3]) for name in imported(ROOT / "tinyllama_hf" / "report" / "page.py")}
    assert "tinyllama_hf.pretrain.metrics" in names and "tinyllama_hf.files.read_json" in names
