"""A small language to select rows: `meta.redpajama_set_name != "RedPajamaGithub" and max_stars_count >= 2`.

It has dotted paths into a row; strings, numbers, `true`, `false`, `null` and lists of them; `== != < <= > >=`, `in`,
`not in`; `and`, `or`, `not`, parentheses. It has no calls and no arithmetic. (Expressions of pyarrow only apply to
columns of tables; jmespath does not order strings, and gives no error for a missing key.)
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
    """A row has no value at a path. The message lists its paths."""


def value_at(row: Any, path: str) -> Any:
    """Returns the value of a row at a dotted path, or of a key that contains dots.

    Raises:
        MissingColumn: if there is no such value.
    """
    value = row
    if isinstance(row, Mapping) and path in row:
        return row[path]
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            columns = ", ".join(sorted(_paths(row))) if isinstance(row, Mapping) else type(row).__name__
            raise MissingColumn(f"no value at {path!r}; available: {columns}")
        value = value[name]
    return value


def _paths(row: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, value in row.items():
        found += _paths(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [f"{prefix}{name}"]
    return found


class Expression:
    """A compiled expression, which is called with a row.

    Args:
        text (`str`): the expression.

    Raises:
        InputError: if a part of it is not supported.
    """

    def __init__(self, text: str):
        self.text = text
        try:
            tree = ast.parse(text.strip(), mode="eval")
        except (SyntaxError, ValueError) as error:
            raise InputError(
                f'--where {text!r}: not a valid expression ({error}). An example: meta.source != "GitHub"'
            ) from error
        self._value = self._compile(tree.body)

    def __call__(self, row: Any) -> bool:
        """Whether the row is selected.

        Raises:
            MissingColumn: if the row lacks a path of the expression.
            InputError: if values cannot be compared, such as a number with a string.
        """
        return bool(self._value(row))

    def _compile(self, node: ast.AST) -> Callable[[Any], Any]:
        """Compiles a node of the expression to a function of a row."""
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
            f"--where {self.text!r}: {ast.unparse(node)!r} is not supported. Use paths, values, == != < <= > >=, in, "
            "not in, and, or, not, parentheses"
        )

    def _compare(self, ops: Sequence[type], sides: Sequence[Callable[[Any], Any]], row: Any) -> bool:
        """Evaluates a chain of comparisons up to the first false one."""
        left = sides[0](row)
        for op, side in zip(ops, sides[1:], strict=True):
            right = side(row)
            try:
                if not _COMPARISONS[op](left, right):
                    return False
            except TypeError as error:
                raise InputError(
                    f"--where {self.text!r}: {left!r} and {right!r} cannot be compared ({error})"
                ) from error
            left = right
        return True


def _is_path(node: ast.AST) -> bool:
    """Whether a node is a dotted path."""
    return isinstance(node, ast.Name) or (isinstance(node, ast.Attribute) and _is_path(node.value))
