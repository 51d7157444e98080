"""Words of docstrings, comments, messages, help, YAML and Markdown: plain English, in the terms of the field.

Each idiom is a regular expression with what to write instead. A place where one is right is in ALLOWED, with a reason.
Spelling is checked by codespell, in `make lint`.
"""

import ast
import functools
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT


# In any text. White space stands for any white space, line ends included.
IDIOMS = {
    r"(?:go|goes|going|gone|went) on": "resume, continue",
    r"(?:come|comes|came|coming|travels?) along": "is bundled, ships with the package",
    r"none of (?:this|that|the) name": "unknown X 'abc'",
    r"(?:is|are) no (?!such)[\w.`-]+ (?:folder|file|model|checkpoint|adapter|recipe|dataset)s?": "is not a X",
    r"(?:is|are) none of": "is not a valid X",
    r"(?:to|cannot|can) be had": "is not available",
    r"(?:lie|lies|lay|lying) (?:there|here|beside)": "is in, is next to",
    r"who is done": "finished; finished rows are removed",
    r"mend(?:s|ed|ing)?": "fix",
    r"anew": "recreate, start over, again",
    r"what (?:it|this|that) brings": "the gain",
    r"pays": "is faster, is worth it, costs",
    r"one for each": "one per X",
    r"so many": "N",
    r"as (?:it is|they are)(?=[.,;:)]|$)": "unchanged",
    r"beside": "next to, in, compared with, alongside",
    r"whose [^.;:]* whose": "two sentences",
    r"(?:nobody|somebody|anybody|whoever)": "no process, a user, any client",
    r"story": "run report",
    r"judg(?:e|es|ed|ing)": "verified, checked, compared",
    r"ladder": "checkpoint series",
}
# In names of functions, classes, arguments and fields, of which words are parts.
NAME_PARTS = {
    "says": "message, summary",
    "facts": "summary",
    "judged": "verified",
    "judge": "verify",
    "mend": "fix",
    "anew": "again",
    "ladder": "series",
    "whose": "owner",
    "somebody": "the role",
    "nobody": "the role",
    "beside": "next_to",
}
# (file, text) -> why the words are right there; the text is what the expression matches.
ALLOWED: dict[tuple[str, str], str] = {
    ("tests/conversion/test_gguf_peer.py", "story"): "a prompt",
}

FOLDERS = ("tinyllama_hf", "tinyllama_hf_cli", "recipes", "eval", "benchmarks", "tests", "docs")
KINDS = (".py", ".html", ".css", ".js", ".yaml", ".md", ".jinja", ".sh", ".sbatch", ".cfg", ".toml")
SKIPPED = ("benchmarks/results/", "tests/test_words.py", "tests/upstream/")


def checked_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("needs a clone: the list of files comes from git")
    names = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    ours = [name for name in names if name.split("/")[0] in FOLDERS or "/" not in name]
    return [n for n in ours if (n.endswith(KINDS) or n == "Makefile") and not n.startswith(SKIPPED)]


def texts(name: str, source: str) -> Iterator[tuple[int, str]]:
    """The line at which each text of a file begins, and the text."""
    if not name.endswith(".py"):
        yield 1, source
        return
    yield from comments(source)
    tree = ast.parse(source)
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            yield node.lineno, "".join(parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.lineno, node.value


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Comments of Python; those on lines that follow each other are one."""
    begin, lines, last = 0, [], -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != last + 1 and lines:
                yield begin, "\n".join(lines)
                lines = []
            begin, last = (begin if lines else token.start[0]), token.start[0]
            lines.append(token.string.lstrip("# "))
    if lines:
        yield begin, "\n".join(lines)


def names(source: str) -> Iterator[tuple[int, str]]:
    """The names that a Python file defines, with their lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr


@functools.cache
def expression(idiom: str) -> re.Pattern[str]:
    """An idiom as whole words, over line ends too, in any case."""
    return re.compile(r"\b(?:" + idiom.replace(" ", r"\s+(?:#\s*)?") + r")(?!\w)", re.IGNORECASE)


def problems(name: str, source: str) -> list[str]:
    """`FILE:LINE: words; write ...` for each idiom in a file."""
    found = set()
    for begin, text in texts(name, source):
        if not expression("|".join(IDIOMS)).search(text):
            continue
        for idiom, better in IDIOMS.items():
            for match in expression(idiom).finditer(text):
                words = " ".join(match[0].replace("#", " ").split())
                if (name, words) not in ALLOWED:
                    found.add((begin + text.count("\n", 0, match.start()), words, better))
    if name.endswith(".py") and not name.startswith("tests/"):
        for line, given in names(source):
            for part in set(re.split(r"_|(?<=[a-z])(?=[A-Z])", given)):
                if part.lower() in NAME_PARTS and (name, given) not in ALLOWED:
                    found.add((line, given, NAME_PARTS[part.lower()]))
    return [f"{name}:{line}: {words!r}; write: {better}" for line, words, better in sorted(found)]


def test_words():
    found = [line for name in checked_files() for line in problems(name, (ROOT / name).read_text(encoding="utf-8"))]
    assert not found, f"{len(found)} places:\n" + "\n".join(found)


def test_what_is_allowed_is_still_there():
    for name, words in ALLOWED:
        text = " ".join((ROOT / name).read_text(encoding="utf-8").replace("#", " ").split())
        assert words in text, f"{name}: no {words!r} any more; remove it from ALLOWED"


@pytest.mark.parametrize(
    ("name", "source", "line"),
    [
        ("a.py", 'x = 1\ny = f"{x} is read; the run goes " "on"\n', 2),
        ("a.py", '"""First.\n\nA run is going\non.\n"""\n', 3),
        ("a.py", "# one line\n# it goes\n# on here\n", 2),
        ("a.py", "x = 1  # mended\n", 1),
        ("a.py", "def f(says): pass\n", 1),
        ("a.py", "class Whose_Facts: pass\n", 1),
        ("a.yaml", "a: 1\n# somebody's\nb: 2  # lies\n# there\n", 2),
        ("a.md", "Text.\n\nThe file lies there, and\nnobody reads it.\n", 3),
    ],
)
def test_planted_idioms_are_found(name, source, line):
    assert problems(name, source)[0].startswith(f"{name}:{line}: ")


def test_plain_words_are_not():
    assert (
        problems(
            "a.py", '"""Depends on x; passes data on. The piecewise rule; besides, one per row, as it is read."""\n'
        )
        == []
    )
