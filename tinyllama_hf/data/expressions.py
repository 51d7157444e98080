"""A small language to choose rows: `meta.redpajama_set_name != "RedPajamaGithub" and max_stars_count >= 2`.

Dotted paths into a row; strings, numbers, `true`, `false`, `null` and lists of them; `== != < <= > >=`, `in`, `not in`; `and`,
`or`, `not`, parentheses. Nothing else: no calls, no arithmetic, no code. (pyarrow's expressions know columns of tables only,
jmespath knows no comparison of strings by order and no error for a missing key.)
"""

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import InputError


_COMPARISONS: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda value, many: value in many,
    ast.NotIn: lambda value, many: value not in many,
}
_NAMED = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}


class MissingColumn(KeyError):
    """A row has no value under a path; the message names what it has."""


def value_at(row: Any, path: str) -> Any:
    """The value of a row under a dotted path; a key that itself holds dots is found too.

    Raises:
        MissingColumn: if there is none.
    """
    value = row
    if isinstance(row, Mapping) and path in row:
        return row[path]
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            columns = ", ".join(sorted(_paths(row))) if isinstance(row, Mapping) else type(row).__name__
            raise MissingColumn(f"nothing under {path!r}, but: {columns}")
        value = value[name]
    return value


def _paths(row: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, value in row.items():
        found += _paths(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [f"{prefix}{name}"]
    return found


class Expression:
    """A compiled expression; call it with a row.

    Args:
        text (`str`): in the language above.

    Raises:
        InputError: naming the part that is not of the language.
    """

    def __init__(self, text: str):
        self.text = text
        try:
            tree = ast.parse(text.strip(), mode="eval")
        except (SyntaxError, ValueError) as error:
            raise InputError(
                f'--where {text!r}: no expression ({error}); for example: meta.source != "GitHub"'
            ) from error
        self._tree = tree.body
        self._check(self._tree)

    def __call__(self, row: Any) -> bool:
        """Whether the row is chosen.

        Raises:
            MissingColumn: if the row lacks a path of the expression.
            InputError: if values cannot be compared, as a number with a string.
        """
        return bool(self._value(self._tree, row))

    def _check(self, node: ast.AST) -> None:
        known = (ast.BoolOp, ast.UnaryOp, ast.Compare, ast.List, ast.Tuple, ast.Name, ast.Attribute, ast.Constant)
        wrong = not isinstance(node, known)
        if isinstance(node, ast.UnaryOp):
            operand = getattr(node.operand, "value", None)
            is_number = isinstance(node.op, ast.USub) and type(operand) in (int, float)
            wrong = not (isinstance(node.op, ast.Not) or is_number)
        elif isinstance(node, ast.Compare):
            wrong = any(type(op) not in _COMPARISONS for op in node.ops)
        elif isinstance(node, ast.Attribute):
            wrong = not isinstance(node.value, (ast.Attribute, ast.Name))
        elif isinstance(node, ast.Constant):
            wrong = not isinstance(node.value, (str, int, float, bool, type(None)))
        if wrong:
            raise InputError(
                f"--where {self.text!r}: {ast.unparse(node)!r} is not of the language: paths, values, == != < <= > >=, in, "
                "not in, and, or, not, parentheses"
            )
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self._check(child)

    def _value(self, node: ast.AST, row: Any) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name) and node.id in _NAMED:
            return _NAMED[node.id]
        if isinstance(node, (ast.Name, ast.Attribute)):
            return value_at(row, ast.unparse(node))
        if isinstance(node, (ast.List, ast.Tuple)):
            return [self._value(element, row) for element in node.elts]
        if isinstance(node, ast.UnaryOp):
            value = self._value(node.operand, row)
            return not value if isinstance(node.op, ast.Not) else -value
        if isinstance(node, ast.BoolOp):
            results = (self._value(value, row) for value in node.values)
            return all(results) if isinstance(node.op, ast.And) else any(results)
        return self._compare(node, row)

    def _compare(self, node: ast.Compare, row: Any) -> bool:
        left = self._value(node.left, row)
        for op, right_node in zip(node.ops, node.comparators, strict=True):
            right = self._value(right_node, row)
            try:
                if not _COMPARISONS[type(op)](left, right):
                    return False
            except TypeError as error:
                raise InputError(
                    f"--where {self.text!r}: {left!r} and {right!r} cannot be compared so ({error})"
                ) from error
            left = right
        return True
