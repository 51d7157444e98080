"""The corpus that every Python installation carries: its own standard library.

Two kinds of documents, disjoint in content so that a text held out of one never reappears in the other:

- `prose`: the docstrings of each module, the language reference behind `help()`, the docstrings of the modules written
  in C, and the text files that lie beside the sources;
- `code`: the sources without their docstrings.

Some packages appear in neither: data/questions.py makes the conversations for fine-tuning from their docstrings.

The same Python version gives the same documents. Tests and generated tables are left out: some distributions do not
ship the first, and nothing can be learned from the second.
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
# Tests, vendored packages, build data that names this machine, and tables of numbers.
_EXCLUDED_FOLDERS = {
    "site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "_bundled", "encodings", "turtledemo",
}  # fmt: skip
_EXCLUDED_FILES = {"pydoc_data/topics.py", "this.py", "antigravity.py", "__phello__.foo.py", "sitecustomize.py"}
# Top-level modules and packages that every build of Python 3.11 to 3.14 has; data/questions.py reads them.
_CONVERSATIONS = {
    "asyncio", "email", "http", "ipaddress.py", "logging", "mailbox.py", "multiprocessing", "tarfile.py", "unittest",
    "urllib", "wsgiref", "xml", "xmlrpc",
}  # fmt: skip
# Modules written in C that every build has, whether linked in or as a file.
_C_MODULES = ("builtins", "sys", "time", "itertools", "math", "gc", "marshal", "errno", "_io", "_thread", "_functools",
              "_operator", "_codecs", "_signal", "_struct", "_random", "_datetime", "_socket")  # fmt: skip
_EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_MIN_CHARACTERS = 200  # shorter documents are headings, not text


class EmbeddedDocument(NamedTuple):
    """A document of the embedded corpus: a stable name and its text."""

    name: str
    text: str


def check_kind(kind: str) -> None:
    """Refuses a name that is not of a part of the corpus."""
    if kind not in KINDS:
        raise InputError(f"embedded:{kind} is not part of the embedded corpus{did_you_mean(kind, KINDS)}")


def documents(kind: str) -> Iterator[EmbeddedDocument]:
    """Yields the documents of one kind, in the order of their names.

    Args:
        kind (`str`): `"prose"` or `"code"`.

    Raises:
        InputError: if `kind` is neither.
    """
    check_kind(kind)
    found = _code() if kind == "code" else _prose()
    seen: set[str] = set()
    for document in sorted(found):
        if len(document.text) >= _MIN_CHARACTERS and document.text not in seen:
            seen.add(document.text)
            yield document


def sources(pattern: str = "*.py", for_conversations: bool = False) -> Iterator[tuple[str, str]]:
    """Yields (path relative to the standard library, text) of its files, UTF-8 ones only.

    Args:
        pattern (`str`, *optional*, defaults to `"*.py"`): of the file names.
        for_conversations (`bool`, *optional*, defaults to `False`): the files that the corpus leaves out for
            conversations, instead of those that it reads.
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
            continue  # a handful of sources declare another encoding, to be test subjects


def _code() -> Iterator[EmbeddedDocument]:
    for name, source in sources():
        yield EmbeddedDocument(name, without_docstrings(source))


def _prose() -> Iterator[EmbeddedDocument]:
    for name, source in sources():
        yield EmbeddedDocument(name, _docstrings(name, source))
    for pattern in ("*.rst", "*.txt"):
        for name, text in sources(pattern):
            if name.endswith("Grammar.txt"):
                continue  # a table
            yield EmbeddedDocument(name, text)
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield EmbeddedDocument(f"help/{name}", text.strip() + "\n")
    for name in _C_MODULES:
        yield EmbeddedDocument(f"builtin/{name}", _builtin_docstrings(name))


def without_docstrings(source: str) -> str:
    """Returns Python source with every docstring cut out; a body that was only a docstring becomes `...`."""
    lines = re.findall(r".*\n|.+$", source)  # str.splitlines would also break at form feeds, where ast does not
    tree = ast.parse(source)
    for node in [n for n in ast.walk(tree) if isinstance(n, _DOCUMENTED) and ast.get_docstring(n, clean=False)]:
        docstring = node.body[0]
        first, last = docstring.lineno - 1, docstring.end_lineno - 1
        # Columns are offsets into the UTF-8 bytes.
        before = lines[first].encode()[: docstring.col_offset].decode()
        after = lines[last].encode()[docstring.end_col_offset :].decode()
        keep = before + "..." + after if len(node.body) == 1 else before + after.lstrip("; ")
        # Blanked lines stay in the list, so that the positions of the other docstrings hold.
        lines[first : last + 1] = [keep if keep.strip() else ""] + [""] * (last - first)
    return "".join(lines).strip() + "\n"


def dotted_name(path: str) -> str:
    """The dotted name of a module of the standard library."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _docstrings(name: str, source: str) -> str:
    """The docstrings of a module, each under the dotted name and signature of what it documents."""
    module = dotted_name(name)
    parts: list[str] = []

    def visit(node: ast.AST, qualified: str, signature: str) -> None:
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
    """The docstrings of a module written in C, its classes and their methods."""
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
