"""A small language to choose rows: `meta.redpajama_set_name != "RedPajamaGithub" and max_stars_count >= 2`.

Dotted paths into a row; strings, numbers, `true`, `false`, `null` and lists of them; `== != < <= > >=`, `in`, `not in`; `and`,
`or`, `not`, parentheses. Nothing else: no calls, no arithmetic, no code. (pyarrow's expressions know columns of tables only,
jmespath knows no comparison of strings by order and no error for a missing key.)
"""

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
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
_NAMED = {"true": True, "false": False, "null": None}


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
        self._value = self._compile(tree.body)

    def __call__(self, row: Any) -> bool:
        """Whether the row is chosen.

        Raises:
            MissingColumn: if the row lacks a path of the expression.
            InputError: if values cannot be compared, as a number with a string.
        """
        return bool(self._value(row))

    def _compile(self, node: ast.AST) -> Callable[[Any], Any]:
        """A function from a row to the value of a part of the expression."""
        match node:
            case ast.Constant(value=str() | int() | float() | None as value):
                return lambda row: value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)) if (
                number is not True
            ):
                return lambda row: -number
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                negated = self._compile(operand)
                return lambda row: not negated(row)
            case ast.Name(id=name) if name in _NAMED:
                return lambda row: _NAMED[name]
            case ast.Name() | ast.Attribute() if _is_path(node):
                path = ast.unparse(node)
                return lambda row: value_at(row, path)
            case ast.List(elts=elements) | ast.Tuple(elts=elements):
                members = [self._compile(element) for element in elements]
                return lambda row: [member(row) for member in members]
            case ast.BoolOp(op=op, values=values):
                parts, combine = [self._compile(value) for value in values], all if isinstance(op, ast.And) else any
                return lambda row: combine(part(row) for part in parts)
            case ast.Compare(left=left, ops=ops, comparators=others) if all(type(op) in _COMPARISONS for op in ops):
                sides = [self._compile(side) for side in (left, *others)]
                return lambda row: self._compare([type(op) for op in ops], sides, row)
        raise InputError(
            f"--where {self.text!r}: {ast.unparse(node)!r} is not of the language: paths, values, == != < <= > >=, in, "
            "not in, and, or, not, parentheses"
        )

    def _compare(self, ops: Sequence[type], sides: Sequence[Callable[[Any], Any]], row: Any) -> bool:
        """A chain of comparisons, of which Python computes no more than it needs."""
        left = sides[0](row)
        for op, side in zip(ops, sides[1:], strict=True):
            right = side(row)
            try:
                if not _COMPARISONS[op](left, right):
                    return False
            except TypeError as error:
                raise InputError(
                    f"--where {self.text!r}: {left!r} and {right!r} cannot be compared so ({error})"
                ) from error
            left = right
        return True


def _is_path(node: ast.AST) -> bool:
    """Whether a node is a name, or a name with others after dots."""
    return isinstance(node, ast.Name) or (isinstance(node, ast.Attribute) and _is_path(node.value))
