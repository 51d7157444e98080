"""Questions and answers from docstrings of standard library modules that are not in the embedded corpus.

Each question asks what a function or class does, and the answer is the first sentence of its docstring. The same
Python version gives the same pairs in the same order.
"""

import ast
import hashlib
import re
from collections.abc import Iterator
from typing import NamedTuple

from .embedded import dotted_name, stdlib_files


_MAX_ANSWER, _MIN_ANSWER = 200, 20  # characters
_MAX_SIGNATURE = 60  # characters; longer signatures are left out
_FUNCTION_QUESTIONS = ("What does {} do?", "What is {} for?", "Explain {}.", "Tell me what {} does.")
_CLASS_QUESTIONS = ("What is {}?", "What is the class {} for?", "Explain the class {}.", "Tell me about {}.")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
# Docstrings with abbreviations, lists or examples in the first paragraph, which give no complete sentence.
_UNFIT = re.compile(r">>>|::|\n\s*[-*]|e\.g\.$|i\.e\.$|etc\.$")


class Question(NamedTuple):
    """A question about the object `name`, and its answer."""

    name: str
    question: str
    answer: str


def questions() -> Iterator[Question]:
    """Yields the questions with distinct answers."""
    seen: set[str] = set()
    for path, source in stdlib_files(for_conversations=True):
        for node, name, docstring in _documented(ast.parse(source), dotted_name(path)):
            answer = _first_sentence(docstring)
            if answer is None or answer in seen:
                continue
            seen.add(answer)
            yield Question(name, _question(node, name), answer)


_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _documented(node: ast.Module | _Definition, qualified: str) -> Iterator[tuple[_Definition, str, str]]:
    """Yields functions and classes with a docstring: the node, its dotted name, and the docstring."""
    for child in node.body:
        if isinstance(child, _Definition):
            name = f"{qualified}.{child.name}"
            if docstring := ast.get_docstring(child):
                yield child, name, docstring
            yield from _documented(child, name)


def _question(node: _Definition, name: str) -> str:
    """A question in one of several phrasings, selected by the name."""
    phrasings = _CLASS_QUESTIONS
    if not isinstance(node, ast.ClassDef):
        phrasings = _FUNCTION_QUESTIONS
        signature = ast.unparse(node.args)
        name += f"({signature})" if len(signature) <= _MAX_SIGNATURE else "()"
    return phrasings[hashlib.sha256(name.encode()).digest()[0] % len(phrasings)].format(name)


def _first_sentence(docstring: str) -> str | None:
    paragraph = docstring.strip().split("\n\n")[0]
    if _UNFIT.search(paragraph):
        return None
    sentence = _SENTENCE_END.split(" ".join(paragraph.split()))[0]
    if not _MIN_ANSWER <= len(sentence) <= _MAX_ANSWER or not sentence[0].isalpha():
        return None
    return sentence
