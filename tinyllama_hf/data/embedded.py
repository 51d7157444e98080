"""The embedded corpus: the Python standard library.

It has two kinds of documents without common content, so that held-out text of one kind never appears in the other:

- `prose`: the docstrings of each module, the language reference of `help()`, the docstrings of modules written in C,
and
  the text files among the sources;
- `code`: the sources without docstrings.

Some packages are in neither: data/questions.py makes conversations for fine-tuning from their docstrings.

The same Python version gives the same documents. Tests are left out because some distributions do not ship them, and
generated tables because they have no content to learn.
"""

import ast
import importlib
import inspect
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError, did_you_mean


KINDS = ("prose", "code")
# Tests, vendored packages, build data of this machine, and tables of numbers.
_EXCLUDED_FOLDERS = {
    "site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "_bundled", "encodings",
    "turtledemo",
}  # fmt: skip
_EXCLUDED_FILES = {"pydoc_data/topics.py", "this.py", "antigravity.py", "__phello__.foo.py", "sitecustomize.py"}
# Top-level modules and packages in every build of Python 3.11 to 3.14. data/questions.py reads them.
_CONVERSATIONS = {
    "asyncio", "email", "http", "ipaddress.py", "logging", "mailbox.py", "multiprocessing", "tarfile.py", "unittest",
    "urllib", "wsgiref", "xml", "xmlrpc",
}  # fmt: skip
# Modules written in C that are in every build, built in or as files.
_C_MODULES = ("builtins", "sys", "time", "itertools", "math", "gc", "marshal", "errno", "_io", "_thread", "_functools",
              "_operator", "_codecs", "_signal", "_struct", "_random", "_datetime", "_socket")  # fmt: skip
_EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")
_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef  # nodes with docstrings
_MIN_CHARACTERS = 200  # shorter documents are mostly headings


class SourceDocument(NamedTuple):
    """A document of a source, with its place as `name`."""

    name: str
    text: str


def check_kind(kind: str) -> None:
    """Checks that a part of the corpus exists.

    Raises:
        InputError: if it does not.
    """
    if kind not in KINDS:
        raise InputError(f"embedded:{kind} is not part of the embedded corpus{did_you_mean(kind, KINDS)}")


def documents(kind: str) -> Iterator[SourceDocument]:
    """Yields the documents of one kind, ordered by name.

    Args:
        kind (`str`): `"prose"` or `"code"`.

    Raises:
        InputError: if `kind` is unknown.
    """
    check_kind(kind)
    code = ((name, without_docstrings(source)) for name, source in stdlib_files())
    seen: set[str] = set()
    for name, text in sorted(code if kind == "code" else _prose()):
        if len(text) >= _MIN_CHARACTERS and text not in seen:
            seen.add(text)
            yield SourceDocument(name, text)


def stdlib_files(pattern: str = "*.py", for_conversations: bool = False) -> Iterator[tuple[str, str]]:
    """Yields (path, text) of the UTF-8 files of the standard library, with relative paths.

    Args:
        pattern (`str`, *optional*, defaults to `"*.py"`): pattern of file names.
        for_conversations (`bool`, *optional*, defaults to `False`): yield the files that are reserved for
            conversations instead of those of the corpus.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob(pattern)):
        relative = path.relative_to(root)
        name = relative.as_posix()
        excluded = _EXCLUDED_FOLDERS.intersection(relative.parts) or name in _EXCLUDED_FILES
        if excluded or relative.parts[0].startswith(_EXCLUDED_PREFIXES):
            continue
        if (relative.parts[0] in _CONVERSATIONS) != for_conversations:
            continue
        try:
            yield name, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few sources declare another encoding, for tests


def _prose() -> Iterator[tuple[str, str]]:
    for name, source in stdlib_files():
        yield name, _docstrings(name, source)
    for pattern in ("*.rst", "*.txt"):
        for name, text in stdlib_files(pattern):
            if not name.endswith("Grammar.txt"):  # a grammar table, not prose
                yield name, text
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield f"help/{name}", text.strip() + "\n"
    for name in _C_MODULES:
        yield f"builtin/{name}", _builtin_docstrings(name)


def without_docstrings(source: str) -> str:
    """Returns Python source without docstrings. A body with only a docstring becomes `...`."""
    lines = re.findall(r".*\n|.+$", source)  # str.splitlines also splits at form feeds, ast does not
    tree = ast.parse(source)
    for node in [n for n in ast.walk(tree) if isinstance(n, _Documented) and ast.get_docstring(n, clean=False)]:
        docstring = node.body[0]
        first, last = docstring.lineno - 1, (docstring.end_lineno or docstring.lineno) - 1
        # Column offsets of ast count UTF-8 bytes.
        before = lines[first].encode()[: docstring.col_offset].decode()
        after = lines[last].encode()[docstring.end_col_offset :].decode()
        keep = before + "..." + after if len(node.body) == 1 else before + after.lstrip("; ")
        # Blank lines stay in the list, so that the line numbers of other docstrings remain valid.
        lines[first : last + 1] = [keep if keep.strip() else ""] + [""] * (last - first)
    return "".join(lines).strip() + "\n"


def dotted_name(path: str) -> str:
    """The dotted name of a standard library module."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _docstrings(name: str, source: str) -> str:
    """The docstrings of a module, each after the dotted name and signature of its object."""
    module = dotted_name(name)
    parts: list[str] = []

    def visit(node: _Documented, qualified: str, signature: str) -> None:
        if docstring := ast.get_docstring(node):
            parts.append(f"{qualified}{signature}\n\n{docstring.strip()}\n")
        for child in node.body:
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                visit(child, f"{qualified}.{child.name}", f"({ast.unparse(child.args)})")
            elif isinstance(child, ast.ClassDef):
                visit(child, f"{qualified}.{child.name}", "")

    visit(ast.parse(source), module, "")
    return "\n".join(parts)


def _builtin_docstrings(module_name: str) -> str:
    """The docstrings of a module written in C, with its classes and methods."""
    module = importlib.import_module(module_name)
    parts = [f"{module_name}\n\n{inspect.cleandoc(module.__doc__)}\n"] if module.__doc__ else []
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or getattr(value, "__module__", None) != module_name:
            continue
        members = sorted(vars(value).items()) if isinstance(value, type) else []
        named = [(name, value), *((f"{name}.{member}", v) for member, v in members if not member.startswith("_"))]
        for qualified, member in named:
            docstring = getattr(member, "__doc__", None)
            if isinstance(docstring, str) and docstring.strip():
                parts.append(f"{module_name}.{qualified}\n\n{inspect.cleandoc(docstring)}\n")
    return "\n".join(parts)
