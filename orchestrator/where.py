"""Constraints: `where` expressions over the fields of a trial.

A constraint comes from a file that somebody else may have written, so it is never given
to `eval`. Python's own parser reads it, a short list of node kinds is turned into
closures once, and everything else is refused by name. What is left cannot loop, call,
reach an attribute of a Python object, or build anything large: arithmetic takes numbers
of at most 64 bits, and an expression is at most 1,000 characters long.

Silence is the danger on the other side: a comparison that is never true would drop
points without a word. So names are checked before any point is made, a word that a field
cannot hold is an error, and so are ordering null and comparing text with a number.
"""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from orchestrator import fields
from orchestrator.errors import Place, did_you_mean, one_line

MAX_LENGTH = 1_000
"""Characters of an expression."""
MAX_NESTING = 40
"""Operators inside one another."""
MAX_TEXT = 200
"""Characters of one text in an expression."""

Read = Callable[[str], Any]
"""Answers a dotted name with its value at a point."""
Term = Callable[[Read], Any]

_LITERALS = {"true": True, "false": False, "null": None}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_ORDER: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_CALLS: dict[str, Callable[..., Any]] = {"min": min, "max": max, "abs": abs}
_REFUSED: dict[type[ast.AST], str] = {
    ast.Pow: "** is not allowed",
    ast.Is: "write == in place of is",
    ast.IsNot: "write != in place of is not",
    ast.Call: "only min, max and abs can be called",
    ast.NamedExpr: ":= is not allowed",
    ast.Lambda: "lambda is not allowed",
    ast.JoinedStr: "f-strings are not allowed",
    ast.Subscript: "[…] after a name is not allowed",
    ast.Attribute: "a dot may only stand inside a name",
    ast.IfExp: "if … else is not allowed",
    ast.Starred: "* before a name is not allowed",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Constraint:
    """One compiled expression."""

    text: str
    """As written."""
    place: Place
    """Where it is written."""
    names: tuple[str, ...]
    """Dotted names that it reads, each once."""
    _test: Term = field(repr=False, compare=False)

    def holds(self, read: Read) -> bool:
        """Whether a point is kept.

        Raises:
            NoAnswer: null or text is put in order, zero divides, or the value is neither
                true nor false.
        """
        try:
            return _truth(self._test(read), "the expression")
        except (_Refused, ArithmeticError) as error:
            raise NoAnswer(_message(self.text, error)) from None


class NoAnswer(ValueError):
    """A constraint that says nothing about a point. The message names the expression."""


class Undecided(Exception):
    """Raised by a reader of names: what a name stands for is not known before the model runs."""


class _Refused(ValueError):
    """An expression, or a step of one, that is not allowed."""


def compile_constraint(text: str, place: Place) -> Constraint:
    """The constraint that `text` says.

    Raises:
        SweepError: it is no expression of this small language, or names no field.
    """
    text = text.strip()
    compiler = _Compiler()
    try:
        if len(text) > MAX_LENGTH:
            raise _Refused(f"an expression holds at most {MAX_LENGTH:,} characters")
        test = compiler.term(_parse(text), 0)
    except _Refused as error:
        raise place.error(_message(text, error)) from None
    return Constraint(text=text, place=place, names=tuple(compiler.names), _test=test)


def _parse(text: str) -> ast.expr:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        hint = ""
        if any(text.count(a) != text.count(b) for a, b in ("()", "[]")):
            hint = "; quote an expression that holds a comma or a bracket"
        raise _Refused(f"this is not an expression{hint}") from None


class _Compiler:
    """Turns nodes into closures, and collects the names on the way."""

    def __init__(self) -> None:
        self.names: dict[str, None] = {}

    def term(self, node: ast.expr, depth: int) -> Term:
        if depth > MAX_NESTING:
            raise _Refused(f"more than {MAX_NESTING} operators inside one another")
        depth += 1
        match node:
            case ast.Constant(value=value):
                return _constant(value)
            case ast.Name() | ast.Attribute():
                return self._name(node)
            case ast.List(elts=items) | ast.Tuple(elts=items):
                terms = [self.term(item, depth) for item in items]
                return lambda read: [term(read) for term in terms]
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                inner, label = self.term(operand, depth), ast.unparse(operand)
                return lambda read: not _truth(inner(read), label)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as op, operand=operand):
                inner, label = self.term(operand, depth), ast.unparse(operand)
                sign = -1 if isinstance(op, ast.USub) else 1
                return lambda read: sign * _number(inner(read), label)
            case ast.BoolOp(op=op, values=values):
                return self._bool(isinstance(op, ast.And), values, depth)
            case ast.BinOp(op=op, left=left, right=right) if type(op) in _ARITHMETIC:
                return self._arithmetic(_ARITHMETIC[type(op)], left, right, depth)
            case ast.Compare():
                return self._compare(node, depth)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _CALLS:
                return self._call(name, args, depth)
            case _:
                raise _Refused(_why(node))

    def _name(self, node: ast.expr) -> Term:
        name = _dotted(node)
        if name in _LITERALS:
            return _constant(_LITERALS[name])
        if name is None:
            raise _Refused(_REFUSED[ast.Attribute])
        field = fields.find(name)
        if name not in fields.readable() and (field is None or name == field.key):
            if field is not None:
                raise _Refused(f"{name} is a block; name one of its fields")
            hint = did_you_mean(name, sorted(fields.readable()))
            hint = hint or ("" if "." in name else "; a word stands in quotes")
            raise _Refused(f"{one_line(name, 60)} is no field of a trial{hint}")
        self.names[name] = None
        return lambda read: read(name)

    def _bool(self, every: bool, values: list[ast.expr], depth: int) -> Term:
        terms = [(self.term(value, depth), ast.unparse(value)) for value in values]
        if every:
            return lambda read: all(_truth(term(read), label) for term, label in terms)
        return lambda read: any(_truth(term(read), label) for term, label in terms)

    def _arithmetic(
        self, apply: Callable[[Any, Any], Any], left: ast.expr, right: ast.expr, depth: int
    ) -> Term:
        a, b = self.term(left, depth), self.term(right, depth)
        label_a, label_b = ast.unparse(left), ast.unparse(right)
        return lambda read: apply(_number(a(read), label_a), _number(b(read), label_b))

    def _call(self, name: str, args: list[ast.expr], depth: int) -> Term:
        if (name == "abs") != (len(args) == 1):
            raise _Refused(
                f"{name} takes {'one number' if name == 'abs' else 'two or more numbers'}"
            )
        call = _CALLS[name]
        terms = [(self.term(arg, depth), ast.unparse(arg)) for arg in args]
        return lambda read: call(*[_number(term(read), label) for term, label in terms])

    def _compare(self, node: ast.Compare, depth: int) -> Term:
        sides = [node.left, *node.comparators]
        terms = [self.term(side, depth) for side in sides]
        labels = [ast.unparse(side) for side in sides]
        steps = []
        for i, op in enumerate(node.ops):
            _possible(sides[i], sides[i + 1])
            _possible(sides[i + 1], sides[i])
            steps.append(_step(op, labels[i], labels[i + 1], sides[i + 1]))

        def compare(read: Read) -> bool:
            left = terms[0](read)
            for step, term in zip(steps, terms[1:], strict=True):
                right = term(read)
                if not step(left, right):
                    return False
                left = right
            return True

        return compare


def _constant(value: object) -> Term:
    if isinstance(value, str) and len(value) > MAX_TEXT:
        raise _Refused(f"a text of more than {MAX_TEXT} characters")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise _Refused("a whole number must fit in 64 bits")
    if not (value is None or isinstance(value, str | int | float)):
        raise _Refused(f"{type(value).__name__} values are not allowed")
    return lambda read: value


def _dotted(node: ast.expr) -> str | None:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


def _why(node: ast.expr) -> str:
    kind: ast.AST = node.op if isinstance(node, ast.BinOp) else node
    return _REFUSED.get(
        type(kind), "only names, numbers, texts, lists, comparisons, and, or, not, + - * / // %"
    )


def _step(op: ast.cmpop, left: str, right: str, right_side: ast.expr) -> Callable[[Any, Any], bool]:
    """One link of a chain of comparisons."""
    if type(op) in _ORDER:
        before = _ORDER[type(op)]

        def ordered(a: Any, b: Any) -> bool:
            for value, label in ((a, left), (b, right)):
                if value is None:
                    raise _Refused(f"{label} is null here, and null has no order")
            if _sort(a) != _sort(b) or _sort(a) not in ("number", "text"):
                raise _Refused(f"{left} is {_say(a)} and {right} is {_say(b)}: no order")
            return before(a, b)

        return ordered
    match op:
        case ast.Eq():
            return lambda a, b: _equal(a, b, left)
        case ast.NotEq():
            return lambda a, b: not _equal(a, b, left)
        case ast.In() | ast.NotIn():
            if isinstance(right_side, ast.Constant):
                raise _Refused("in takes a list")
            wanted = isinstance(op, ast.In)

            def contained(a: Any, b: Any) -> bool:
                if not isinstance(b, list | tuple):
                    raise _Refused(f"in takes a list, but {right} is {_say(b)}")
                return any(_equal(a, item, left) for item in b) is wanted

            return contained
        case _:
            raise _Refused(_REFUSED[type(op)])


def _possible(side: ast.expr, other: ast.expr) -> None:
    """Refuses to compare a field with a value that it never has."""
    name = _dotted(side) or ""
    field = fields.find(name)
    if field is None or name != field.key:
        return
    for item in other.elts if isinstance(other, ast.List | ast.Tuple) else [other]:
        word = item.value if isinstance(item, ast.Constant) else None
        if field.kind == "choice" and isinstance(word, str) and word not in field.choices:
            hint = did_you_mean(word, field.choices)
            raise _Refused(f"{name} is never {one_line(word, 60)!r}{hint}")
        null = isinstance(item, ast.Name | ast.Constant) and ast.unparse(item) in ("null", "None")
        if null and not field.optional and name.count(".") == 1:
            raise _Refused(f"{name} is never null")


def _equal(a: Any, b: Any, left: str) -> bool:
    if a is None or b is None:
        return a is b
    if _sort(a) != _sort(b):
        field = fields.find(left)
        if field is not None and field.switch and {_sort(a), _sort(b)} == {"truth", "text"}:
            return False
        raise _Refused(f"{left} is {_say(a)}, which never equals {_say(b)}")
    return bool(a == b)


def _sort(value: Any) -> str:
    if type(value) is int or type(value) is float:
        return "number"
    if isinstance(value, bool):
        return "truth"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return "text"
    return "list" if isinstance(value, list | tuple) else "block"


def _number(value: Any, label: str) -> Any:
    if _sort(value) != "number":
        raise _Refused(f"{label} is {_say(value)} here, and arithmetic takes numbers")
    return value


def _truth(value: Any, label: str) -> bool:
    if not isinstance(value, bool):
        raise _Refused(f"{label} is {_say(value)}, neither true nor false")
    return value


def _say(value: Any) -> str:
    return fields.describe(value)


def _message(text: str, error: Exception) -> str:
    why = "division by zero" if isinstance(error, ZeroDivisionError) else str(error)
    return f"{one_line(text, 120)!r}: {why}"
