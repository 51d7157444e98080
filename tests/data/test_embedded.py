"""The embedded corpus: real text, no overlap between its kinds, and the same documents in every call."""

import ast
import functools

import pytest

from tinyllama_hf.data import embedded
from tinyllama_hf.errors import InputError


KINDS = ["prose", pytest.param("code", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def documents():
    """The documents of a kind; those of code take 8 seconds."""
    return functools.cache(lambda kind: list(embedded.documents(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_size_and_names(documents, kind):
    found = documents(kind)
    assert sum(len(d.text) for d in found) > {"prose": 2_000_000, "code": 5_000_000}[kind]
    names = [d.name for d in found]
    assert names == sorted(names) and len(set(names)) == len(names)
    assert len({d.text for d in found}) == len(found), "a text twice would be trained on and held out"


@pytest.mark.parametrize("kind", KINDS)
def test_no_tests_and_no_installed_packages(documents, kind):
    assert not any("test" in d.name.split("/") or "site-packages" in d.name for d in documents(kind))


def test_what_is_in_the_prose(documents):
    prose = documents("prose")
    assert any("Return an iterator" in d.text for d in prose)
    assert any(d.name.startswith("help/") for d in prose) and any(d.name == "builtin/builtins" for d in prose)


@pytest.mark.slow
def test_code_is_valid_and_has_no_docstring(documents):
    for document in documents("code"):
        nodes = [n for n in ast.walk(ast.parse(document.text)) if isinstance(n, embedded._Documented)]
        assert not any(ast.get_docstring(node) for node in nodes), document.name


def test_without_docstrings_keeps_the_program():
    source = '''"""Module."""
import os  # é

class A:
    """Only this."""

def f(x): "one line"; return x

async def g():
    """Ä

    many lines"""
    return "not a docstring"
'''
    stripped = embedded.without_docstrings(source)
    expected = (
        'import os  # é\n\nclass A:\n    ...\n\ndef f(x): return x\n\nasync def g():\n    return "not a docstring"\n'
    )
    assert ast.dump(ast.parse(stripped)) == ast.dump(ast.parse(expected))
    assert "# é" in stripped


def test_without_docstrings_counts_lines_as_the_parser_does():
    """Several modules of the standard library contain form feeds, at which str.splitlines would split."""
    source = "a = 1\n\f\ndef f():\n    '''doc'''\n    return a\n"
    expected = "a = 1\ndef f():\n    return a\n"
    assert ast.dump(ast.parse(embedded.without_docstrings(source))) == ast.dump(ast.parse(expected))


def test_unknown_kind():
    with pytest.raises(InputError, match="did you mean 'prose'"):
        list(embedded.documents("proze"))
