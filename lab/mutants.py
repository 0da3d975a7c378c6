"""The mutants of a Python source: small changes of one expression or statement each that tests should notice."""

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult},
    **{ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult},
    **{ast.Break: ast.Continue, ast.Continue: ast.Break},
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
WITH_DEFAULT = {"get": 2, "pop": 2, "next": 2, "getattr": 3}  # number of arguments, the default included
SYMMETRIC = ("min", "max", "isclose", "maximum", "minimum", "isinstance")
LOGGERS = ("log", "logger", "logging", "warnings")


@dataclass(frozen=True)
class Mutant:
    """One change of a file.

    Attributes:
        file: path of the file, relative to the root of the checkout.
        line: line of the change.
        lines: first and last line of its statement, without the body of a compound statement; (0, 0) for a statement
            that runs when the module is imported.
        before, after: the changed lines.
        source: the whole file with the change.
    """

    file: str
    line: int
    lines: tuple[int, int]
    before: str
    after: str
    source: str


def mutants(file: str, source: str) -> list[Mutant]:
    """All mutants of a source, in the order of its lines.

    Docstrings, annotations, imports, decorators, log messages, messages of exceptions, `__all__`, and blocks under
    `if TYPE_CHECKING` stay as they are.
    """
    code, starts = source.encode(), [0]
    for line in code.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for node, after, lines in _changes(ast.parse(source), (0, 0)):
        first = starts[node.lineno - 1] + node.col_offset
        last = starts[node.end_lineno - 1] + node.end_col_offset
        text = ast.unparse(after)
        if isinstance(after, ast.BinOp | ast.BoolOp | ast.Compare | ast.UnaryOp):
            text = f"({text})"
        head, tail = code[starts[node.lineno - 1] : first], code[last : starts[node.end_lineno]]
        before, changed = (
            b" ".join((head + part + tail).partition(b"  #")[0].split()).decode()
            for part in (code[first:last], text.encode())
        )
        found.append(
            Mutant(
                file,
                node.lineno,
                lines,
                before,
                changed,
                (code[:first] + text.encode() + code[last:]).decode(),
            )
        )
    return sorted(found, key=lambda mutant: mutant.line)


def _changes(node: ast.AST, lines: tuple[int, int]) -> Iterator[tuple[Any, ast.AST, tuple[int, int]]]:
    """Yield a node, the node to put in its place, and the lines of the statement, for each change below `node`."""
    if _is_skipped(node):
        return
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        lines = (node.body[0].lineno, node.end_lineno or 0)
    elif isinstance(node, ast.stmt) and not isinstance(node, ast.ClassDef) and lines != (0, 0):
        body = getattr(node, "body", None)
        lines = (node.lineno, body[0].lineno - 1 if body else node.end_lineno or 0)
        lines = (lines[0], max(lines))
    for after in _replacements(node):
        yield node, after, lines
    test = getattr(node, "test", None)
    if isinstance(test, ast.Name | ast.Attribute | ast.Call):
        yield test, ast.UnaryOp(ast.Not(), test), lines
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        if isinstance(node, ast.Raise):  # its message
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _changes(child, lines)


def _is_skipped(node: ast.AST) -> bool:
    if isinstance(node, ast.JoinedStr | ast.Import | ast.ImportFrom | ast.Assert):
        return True  # before Python 3.12, the places inside an f-string are wrong
    if isinstance(node, ast.Expr):
        call = node.value
        logs = isinstance(call, ast.Call) and ast.unparse(call.func).partition(".")[0].strip("_") in LOGGERS
        return logs or isinstance(call, ast.Constant)
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"


def _with(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _replacements(node: ast.AST) -> Iterator[ast.AST]:
    match node:
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                yield _with(node, ops=[*ops[:i], SWAPS[type(op)](), *ops[i + 1 :]])
        case ast.BoolOp(op=op) | ast.BinOp(op=op) if type(op) in SWAPS:
            if not (isinstance(node, ast.BinOp) and (_is_text(node.left) or _is_text(node.right))):
                yield _with(node, op=SWAPS[type(op)]())
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield operand
        case ast.Constant(value=value):
            yield from map(ast.Constant, _other_values(value))
        case ast.Name(id=name) if name in NAMES:
            yield ast.Name(NAMES[name])
        case ast.Call():
            yield from _other_calls(node)
        case ast.stmt():
            yield from _other_statements(node)


def _is_text(node: ast.AST) -> bool:
    """True for a literal that nothing can be subtracted from: any test would notice."""
    is_string = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return is_string or isinstance(node, ast.JoinedStr | ast.List | ast.Tuple)


def _other_values(value: object) -> list[bool | int | float]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1]
    return [2 * value] if isinstance(value, float) and value else []


def _other_calls(node: ast.Call) -> Iterator[ast.AST]:
    """Yield the call with its first two arguments swapped, and without its default."""
    name = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
    if (
        len(node.args) > 1
        and name not in SYMMETRIC
        and not any(isinstance(arg, ast.Starred) for arg in node.args[:2])
    ):
        yield _with(node, args=[node.args[1], node.args[0], *node.args[2:]])
    if len(node.args) == WITH_DEFAULT.get(name):
        yield _with(node, args=node.args[:-1])


def _other_statements(node: ast.stmt) -> Iterator[ast.AST]:
    if isinstance(node, ast.AugAssign) and type(node.op) in SWAPS:
        yield _with(node, op=SWAPS[type(node.op)]())
    match node:
        case ast.Break() | ast.Continue():
            yield SWAPS[type(node)]()
        case ast.Return(value=ast.expr() as value) if ast.unparse(value) != "None":
            yield ast.Return(ast.Constant(None))
        case (
            ast.Expr(value=ast.Call() | ast.Await())
            | ast.Raise()
            | ast.Return(value=None)
            | ast.AugAssign()
            | ast.Assign(targets=[ast.Attribute() | ast.Subscript()])
        ):
            yield ast.Pass()
