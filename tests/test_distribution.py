"""What is published: metadata in one place each, everything in the wheel, and an installation that needs no clone."""

import configparser
import itertools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Runs a command without anything of the clone in its environment; fails with what it printed."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=clean | env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """(sdist, wheel) built from the files under version control alone; the wheel is built from the sdist."""
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("needs a clone: the list of files comes from git")
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--no-isolation", source, cwd=source)
    return next((source / "dist").glob("*.tar.gz")), next((source / "dist").glob("*.whl"))


def configuration() -> tuple[dict, configparser.ConfigParser]:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8")), parser


def test_no_key_is_in_both_files():
    """setup.cfg holds metadata and options, pyproject.toml the build system and the tools, and nothing else."""
    pyproject, setup = configuration()
    assert set(pyproject) == {"build-system", "tool"} and "setuptools" not in pyproject["tool"]
    assert {section.split(".")[0] for section in setup.sections()} == {"metadata", "options"}


# Not in `all`: accounts with others, and what only GPUs use.
APART = {"trackers", "gpu", "quantization-gpu"}


def test_extras_and_all():
    _, setup = configuration()
    extras = dict(setup["options.extras_require"])
    named = extras["all"].split("[")[1].split("]")[0].split(",")
    assert set(named) == set(extras) - {"all", "dev"} - APART


def test_every_requirement_is_pinned():
    """constraints.txt pins everything that `.[all,dev]` asks for."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    _, setup = configuration()
    extras = setup["options.extras_require"]
    texts = [setup["options"]["install_requires"], *(extras[name] for name in set(extras) - APART)]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    wanted = {canonicalize_name(Requirement(line).name) for line in lines if line and not line.startswith("#")}
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    assert all(next(iter(pin.specifier)).operator == "==" for pin in pins)
    assert wanted - {canonicalize_name(pin.name) for pin in pins} <= {"tinyllama-hf", "setuptools", "wheel"}


def test_the_type_checker_leaves_nothing_out():
    """Every module is checked, libraries without types are named, and what is ignored has its code and a reason."""
    pyproject, _ = configuration()
    settings = pyproject["tool"]["mypy"]
    assert settings["files"] == ["tinyllama_hf", "tinyllama_hf_cli", "recipes", "eval"]
    assert not {"exclude", "ignore_errors", "ignore_missing_imports", "disable_error_code"} & set(settings)
    for override in settings["overrides"]:
        assert set(override) == {"module", "ignore_missing_imports"} and "*" not in override["module"]
    ignored = []
    for file in (file for part in settings["files"] for file in sorted((ROOT / part).rglob("*.py"))):
        lines = ["", *file.read_text(encoding="utf-8").splitlines()]
        for before, line in itertools.pairwise(lines):
            if "# type: ignore" in line:
                ignored.append((file.name, line.strip()))
                explained = re.search(r"# type: ignore\[[\w, -]+\](  # \S.*)?$", line)
                assert explained and (explained[1] or before.strip().startswith("#")), ignored[-1]
    assert len(ignored) <= 20


def test_version_is_the_newest_of_the_changelog():
    _, setup = configuration()
    headings = [
        line for line in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines() if line.startswith("## ")
    ]
    assert headings[0].split()[1] == setup["metadata"]["version"]


def test_wheel_holds_everything_that_a_user_needs(distributions):
    sdist, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for part in ("recipes", "eval"):
        for file in (ROOT / part).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                assert f"tinyllama_hf/{part}/{file.relative_to(ROOT / part).as_posix()}" in names
    for package in ("tinyllama_hf", "tinyllama_hf_cli"):
        for file in (ROOT / package).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                assert file.relative_to(ROOT).as_posix() in names
        assert f"{package}/py.typed" in names  # type checkers of users read our annotations
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "docs"))]
    with tarfile.open(sdist) as archive:
        assert {"README.md", "setup.cfg", "pyproject.toml"} <= {name.split("/", 1)[-1] for name in archive.getnames()}


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory) -> Path:
    """The scripts folder of an empty environment into which the wheel was installed, as the README says."""
    environment = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(environment, with_pip=True)
    scripts = environment / ("Scripts" if os.name == "nt" else "bin")
    pip = (scripts / "python", "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt")
    run(*pip, "torch", cwd=environment)
    run(*pip, f"{distributions[1]}[data,eval]", cwd=environment)
    return scripts


@pytest.mark.slow
def test_installed_it_trains_without_the_clone(installed, corpus, tmp_path):
    path = f"{installed}{os.pathsep}{os.environ['PATH']}"

    def call(*command):
        return run(installed / command[0], *command[1:], cwd=tmp_path, PATH=path, HF_HUB_OFFLINE="1")

    assert str(installed.parent) in call("python", "-c", "import tinyllama_hf; print(tinyllama_hf.__file__)")
    assert "pretrain/micro.yaml" in call("tinyllama-hf", "recipes", "list")
    call("tinyllama-hf", "recipes", "copy", "mine")
    call("tinyllama-hf", "tokenizer", "train", corpus, "--vocab-size", "512", "--output", "tokenizer")
    call(
        *("tinyllama-hf", "prepare", corpus, "--tokenizer", "tokenizer", "--output", "data"),
        *("--validation-fraction", "0.1"),
    )
    call(
        *("accelerate", "launch", "--config_file", "mine/accelerate/cpu.yaml"),
        *("mine/pretrain.py", "mine/pretrain/micro.yaml", "output_dir=run"),
        *("data.tokenizer=tokenizer", "data.sources=[{path: data, weight: 1.0}]"),
        *("training.total_tokens=24_576", "milestones.tokens=[10_000]", "validation.max_tokens=2000"),
    )
    milestones = sorted(p.name for p in (tmp_path / "run" / "milestones").iterdir())
    assert milestones == ["step-12-token-0.02M", "step-5-token-0.01M"]
    assert "wrote run/scores.json" in call("tinyllama-hf", "eval", "run", "--baselines")
    assert "step-12" in call(
        "python", "mine/eval/bits_per_byte.py", f"run/milestones/{milestones[0]}", "--data", "data"
    )
    assert call(
        "tinyllama-hf", "generate", f"run/milestones/{milestones[0]}", "def ", "--max-new-tokens", "5"
    ).startswith("def ")
    assert "step-1431k-3T" in call("tinyllama-hf", "list")
